"""The report: its structure, the numbers behind its marks, what it must never hold."""

import dataclasses
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, reject, settings
from msgspec import structs
from report_cases import MADE_BY, QUESTIONS, TOPOLOGIES, answered, page_of, report_of
from report_reader import Node, Plot, read
from strategies_planner import worlds
from typer.testing import CliRunner

from planner.answer import Answer, answer
from planner.breakdown import breakdown
from planner.cli_plan import app
from planner.explain import shapes
from planner.failure import NoPlan
from planner.objective import score
from planner.report import report_html
from planner.report_ops import stage_rows
from planner.report_search import tokens_per_gpu, tokens_per_user
from planner.report_timeline import lone_prompt, watch
from planner.space import Rejected
from plans.chunks import WorkTable
from plans.codec import load_file
from plans.mesh import coordinates
from plans.plan import Plan
from plans.topology import NodeType
from plans.workload import mean_length

ROOT = Path(__file__).parents[2]
EVIL = "<img src=x onerror=alert(1)>\"'&amp;</svg></style><script>alert(2)</script>"


@pytest.fixture(params=QUESTIONS)
def case(request) -> tuple[Answer, Node]:
    return report_of(request.param)[0], page_of(request.param)


@pytest.fixture
def main_case() -> tuple[Answer, bytes, Node]:
    return *report_of("two stages"), page_of("two stages")


# --- structure ----------------------------------------------------------------------------------


def test_the_page_is_whole_and_names_are_unique(case):
    _, page = case  # reading it already showed that every element is closed in order
    (heading,) = page.all("h1")
    ids = [node["id"] for node in page.walk() if "id" in node.attributes]
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    assert case[0].plan.parallelism.tp == int(re.findall(r"tp (\d+)", heading.text)[0])
    named = [
        name for node in page.walk() for name in node.attributes.get("aria-labelledby", "").split()
    ]
    assert set(named) <= set(ids)


def test_every_drawing_has_a_title_and_a_description_and_every_figure_its_numbers(case):
    _, page = case
    drawings = page.all("svg", role="img")
    assert len(drawings) >= 12
    for drawing in drawings:
        title, description = drawing.children[:2]
        assert (title.tag, description.tag) == ("title", "desc")
        assert title.text
        assert description.text
    for each in page.all("figure"):
        (numbers,) = each.all("table")
        assert numbers.all("caption")
        assert len(numbers.all("tr")) >= 2, each["id"]


def test_all_that_scrolls_can_be_reached_by_keyboard(case):
    scrolling = [node for node in case[1].walk() if node.attributes.get("class") == "scroll"]
    assert scrolling
    assert all(node["tabindex"] == "0" and node["aria-label"] for node in scrolling)


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_file_refers_to_nothing_outside_and_runs_nothing(name):
    text, page = report_of(name)[1].decode(), page_of(name)
    outside = re.findall(r"https?://[^\"' ]*|url\([^)]*\)|@import[^;]*", text)
    assert set(outside) <= {"http://www.w3.org/2000/svg"}
    tags = {node.tag for node in page.walk()}
    assert not tags & {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
    names = {name for node in page.walk() for name in node.attributes}
    assert not [name for name in names if name.startswith("on") or name in {"src", "href"}]
    (policy,) = page.all("meta", http_equiv="Content-Security-Policy")
    assert "default-src 'none'" in policy["content"]


def test_the_same_plan_gives_the_same_bytes(main_case):
    given_, report, _ = main_case
    assert report_html(given_.found, given_.plan) == report


def test_the_command_writes_the_same_report_in_another_process_and_hashes_only_programs(
    tmp_path, monkeypatch
):
    flags = ["--model", "llama3-8b", "--gpus", "1", "--workload", "chat", "--no-kernels", "--out"]
    subprocess.run(
        [sys.executable, "-m", "planner.cli_plan", *flags, "there"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, [*flags, "here"]).exit_code == 0
    there, here = (tmp_path / name / "report.html" for name in ("there", "here"))
    assert there.read_bytes() == here.read_bytes()
    assert "--model llama3-8b" in read(here.read_bytes()).text
    assert load_file(tmp_path / "here/plan.yaml", Plan).files == {}


# --- numbers ------------------------------------------------------------------------------------


def test_first_tokens_in_the_chart_are_those_of_the_plan(case):
    given_, page = case
    plot = Plot.of(page, "chart-ttft")
    marks = plot.group.all("circle", data_alone="")
    assert [mark["data-alone"] for mark in marks] == list(given_.plan.predicted.ttft_s)
    for mark in marks:
        tokens, seconds = plot.spot(mark)
        assert int(mark["data-alone"]) in tokens
        assert given_.plan.predicted.ttft_s[mark["data-alone"]] in seconds


def test_first_tokens_under_load_are_those_of_the_replay_in_the_plan(case):
    given_, page = case
    point = given_.plan.predicted.replay
    plot = Plot.of(page, "chart-ttft")
    marks = plot.group.any(data_tokens="")
    assert len(marks) <= point.requests
    worst = point.ttft_s["all"].max
    spots = [plot.spot(mark)[1] for mark in marks]
    if point.undecided == 0 and worst is not None:  # every request is in the percentiles
        assert len(marks) == point.requests
        assert any(worst in spot for spot in spots)
        assert not any(spot.low > worst for spot in spots)


def test_marks_of_shapes_stand_at_what_was_predicted_for_them(case):
    given_, page = case
    found = given_.found
    ranks = dict(shapes(found))
    rate, user = Plot.of(page, "chart-rate"), Plot.of(page, "chart-user")
    for plot in (rate, user):
        assert {int(mark["data-rank"]) for mark in plot.group.any(data_rank="")} == set(ranks)
    for mark in rate.group.any(data_rank=""):
        each = ranks[int(mark["data-rank"])]
        across, up = rate.spot(mark)
        assert each.ttft_longest_s in across
        assert score(each.world, each) in up
    workload, gpus = given_.world.workload, given_.world.gpus
    answers = sum(one.share * mean_length(one.output_tokens) for one in workload.classes)
    answers /= sum(one.share for one in workload.classes)
    for mark in user.group.any(data_rank=""):
        each = ranks[int(mark["data-rank"])]
        across, up = user.spot(mark)
        assert 1 / each.tbt_full_s in across
        assert each.capacity.rps * answers / gpus in up
        assert tokens_per_user(each) in across
        assert tokens_per_gpu(each) in up


def test_nothing_in_the_chart_beats_the_frontier(case):
    given_, page = case
    plot = Plot.of(page, "chart-rate")
    (line,) = plot.group.all("polyline", **{"class": "frontier"})
    steps = plot.points(line)
    assert all(later.high >= earlier.low for (_, earlier), (_, later) in pairwise(steps))
    for _, each in shapes(given_.found):
        reached = [up.high for across, up in steps if across.low <= each.ttft_longest_s]
        assert score(each.world, each) <= max(reached) * (1 + 1e-9)


def test_step_curves_follow_the_step_time_formula(main_case):
    given_, _, page = main_case
    plan = given_.plan
    plot = Plot.of(page, "chart-step")
    curves = {line["data-curve"]: plot.points(line) for line in plot.group.all("polyline")}
    prefixes = {"new prompt": 0, "behind 16k": 1 << 14, "behind 256k": 1 << 18}
    assert plan.parallelism.kvp == 1
    for name, prefix in prefixes.items():
        for index, (chunk, seconds) in enumerate(curves[name]):
            tokens = min(32 << index, plan.scheduler.max_step_tokens)
            assert tokens in chunk
            assert plan.step_time.step_s([(tokens, prefix)]) in seconds
    margin = 1 + plan.step_time.margin
    budgets = [plot.y.number(line["y1"]) for line in plot.group.all("line", data_budget="")]
    assert plan.scheduler.step_budget_s / margin in budgets[0]
    assert plan.scheduler.idle_budget_s / margin in budgets[1]


def test_the_curve_of_one_group_shows_where_kvp_is_forced():
    plan, page = report_of("kvp")[0].plan, page_of("kvp")
    assert plan.parallelism.kvp > 1
    plot = Plot.of(page, "chart-step")
    (alone,) = [
        line for line in plot.group.all("polyline") if line["data-curve"].endswith("one group")
    ]
    tokens = plan.scheduler.min_chunk_tokens
    context = plan.limits.context_tokens
    assert plan.step_time.step_s([(tokens, context - tokens)]) in plot.points(alone)[0][1]


def test_the_schedule_is_that_of_the_plan(case):
    given_, page = case
    plot = Plot.of(page, "chart-schedule")
    rows = [(int(r["data-until"]), int(r["data-chunk"])) for r in plot.group.all("rect")]
    chunks = given_.plan.prefill.chunks
    assert rows == [(row.until_tokens, row.chunk_tokens) for row in chunks]
    (line,) = plot.group.all("polyline")
    for (until, size), row in zip(plot.points(line)[1::2], chunks, strict=True):
        assert row.until_tokens in until
        assert row.chunk_tokens in size


def test_memory_bars_are_the_plans_memory_and_no_stage_exceeds_the_worst(case):
    given_, page = case
    memory = given_.plan.memory
    plot = Plot.of(page, "chart-memory")
    filled = 0
    for part in ("weights", "activations", "reserved", "kv"):
        (bar,) = plot.group.all("rect", data_row="worst of all", data_part=part)
        assert getattr(memory, f"{part}_bytes") / 1e9 in plot.x.length(bar["width"])
        assert filled / 1e9 in plot.x.number(bar["x"])
        filled += getattr(memory, f"{part}_bytes")
    rows = stage_rows(given_.plan)
    for part in ("weights", "kv"):
        most = getattr(memory, f"{part}_bytes")
        assert all(sizes[part] <= most for _, sizes in rows)
        if rows and given_.plan.parallelism.spp <= 8:
            assert max(sizes[part] for _, sizes in rows) == most


def test_bars_of_ops_are_the_breakdown_and_light_is_never_longer(case):
    given_, page = case
    rows = breakdown(given_.found.ranked[0])
    steps = list(dict.fromkeys(row.step for row in rows))
    for index, step in enumerate(steps):
        plot = Plot.of(page, f"chart-ops-{index}")
        for row in (row for row in rows if row.step == step):
            (bar,) = plot.group.all("rect", data_op=row.op)
            (light,) = plot.group.all("rect", data_light=row.op)
            assert row.seconds in plot.x.length(bar["width"])
            assert row.light_s in plot.x.length(light["width"])
            assert float(light["width"]) <= float(bar["width"])


def test_percentiles_in_the_chart_are_those_of_the_replay(case):
    given_, page = case
    point = given_.plan.predicted.replay
    for name, rows in (("ttft", point.ttft_s), ("tbt", point.tbt_s)):
        plot = Plot.of(page, f"chart-{name}-percentiles")
        for who in ("short", "long"):
            values = dict(
                zip(("P50", "P90", "P99", "worst"), structs.astuple(rows[who]), strict=True)
            )
            for label, value in values.items():
                marks = plot.group.any(data_who=f"{who} prompts", data_percentile=label)
                assert len(marks) == (value is not None)
                for mark in marks:
                    assert value in plot.x.number(mark["data-at"].split()[0])


def test_sensitivity_bars_are_ratios_of_scores(main_case):
    given_, _, page = main_case
    best = given_.found.ranked[0]
    base = score(best.world, best)
    bars = page.svg("chart-sensitivity").all("rect", data_ratio="")
    ratios = [each.score / base for each in given_.found.sensitivity if each.degrees]
    assert [float(bar["data-ratio"]) for bar in bars] == ratios
    assert ratios


# --- timelines ----------------------------------------------------------------------------------


def test_a_lone_prompt_ends_when_the_work_table_says(case):
    plan = case[0].plan
    tokens = plan.limits.context_tokens
    slices = lone_prompt(plan, tokens)
    work = WorkTable(plan.prefill.chunks, plan.step_time, plan.kv.tokens_per_kvp_shard)
    ends = [each.end_s for each in slices if each.kind == "long"]
    assert max(ends) == work.solo_s(tokens)
    by_stage: dict[int, float] = {}
    for each in slices:  # a stage does one thing at a time
        assert each.start_s >= by_stage.get(each.stage, 0.0)
        by_stage[each.stage] = each.end_s
    tokens_at = [each for each in slices if each.kind == "decode" and each.stage == 0]
    done = [each for each in slices if each.stage == plan.parallelism.spp - 1]
    for each in tokens_at:  # a token starts only once the one before is there
        assert any(one.end_s == each.start_s for one in done if one.number == each.number - 1)


def test_slices_stand_where_their_times_are(main_case):
    given_, _, page = main_case
    slices = lone_prompt(given_.plan, given_.plan.limits.context_tokens)
    wanted = {(each.number, each.stage): each for each in slices}
    plot = Plot.of(page, "chart-drain")
    bars = plot.group.all("rect")
    assert len(bars) > 20
    for bar in bars:
        each = wanted[int(bar["data-step"]), int(bar["data-stage"])]
        assert each.start_s in plot.x.number(bar["x"])
        length = plot.x.length(bar["width"])
        low = plot.x.low  # a linear axis that does not begin at zero
        assert low + (each.end_s - each.start_s) in type(length)(
            low + length.low, low + length.high
        )


def test_the_watched_run_is_the_replay_in_the_plan(case):
    plan = case[0].plan
    seen = watch(plan)
    assert len(seen.steps) <= plan.predicted.replay.steps
    first = seen.first_tokens
    assert all(each.ttft_s > 0 for each in first)
    if plan.predicted.replay.finished == plan.predicted.replay.requests:
        times = sorted(each.ttft_s for each in first)
        assert times[-1] == plan.predicted.replay.ttft_s["all"].max


def test_a_plan_without_a_replay_has_a_report_without_one(main_case):
    given_, _, _ = main_case
    predicted = structs.replace(given_.plan.predicted, replay=None, goodput_rps=None)
    page = read(report_html(given_.found, structs.replace(given_.plan, predicted=predicted)))
    assert "percentiles" not in {node.attributes.get("id", "") for node in page.walk()}
    assert not page.all("svg", id="chart-mix")


# --- places -------------------------------------------------------------------------------------


def test_few_nodes_are_drawn_each_and_many_once_a_kind(case):
    given_, page = case
    plan = given_.plan
    nodes = [svg for svg in page.all("svg", role="img") if svg["id"].startswith("chart-node-")]
    few = plan.topology.nodes <= 4
    assert len(nodes) == plan.topology.nodes if few else len(nodes) < plan.topology.nodes
    for svg in nodes:
        assert len(svg.all("rect", data_device="")) == plan.topology.devices_per_node
    if few:
        for rank, (node, device) in enumerate(plan.placement.rank_map):
            (square,) = nodes[node].all("rect", data_device=str(device))
            place = coordinates(plan.parallelism, rank)
            assert f"tp {place.tp}, stage {place.stage}, KVP {place.group}" in square.text


def test_the_mesh_has_a_cell_for_each_tp_group_that_is_shown(case):
    given_, page = case
    p = given_.plan.parallelism
    cells = [rect["data-cell"] for rect in page.svg("chart-mesh").all("rect", data_cell="")]
    shown = min(p.replicas, max(24 // p.kvp, 1))
    assert len(set(cells)) == len(cells) == shown * p.spp * p.kvp
    more = p.replicas - shown
    assert (f"and {more} more replicas" in page.svg("chart-mesh").text) == (more > 0)


@pytest.mark.parametrize(
    ("node", "hardware", "gpus"),
    [("hgx-h100-rails", "h100", 16), ("h100-nvl-pairs", "h100-nvl", 8)],
)
def test_every_wire_of_a_fabric_is_drawn(node, hardware, gpus):
    given_ = answered(model="llama3-8b", gpus=gpus, node=node, hardware=hardware, workload="chat")
    page = read(report_html(given_.found, given_.plan))
    kind = load_file(TOPOLOGIES / f"{node}.yaml", NodeType)
    joins = [f"{one} {other}" for wires in kind.fabric.wires for one, other in wires.joins]
    drawn = [line["data-wire"] for line in page.svg("chart-node-0").any(data_wire="")]
    if given_.plan.topology.nodes == 1:  # ports are left out where there is nothing to reach
        joins = [pair for pair in joins if "nic" not in pair]
    assert sorted(drawn) == sorted(joins)


# --- what comes from outside --------------------------------------------------------------------


def test_names_from_outside_stay_text(main_case):
    given_, _, plain = main_case
    plan, found = given_.plan, given_.found
    evil = structs.replace(
        plan,
        name=EVIL,
        made_by=structs.replace(plan.made_by, command=EVIL, medha=EVIL),
        model=structs.replace(plan.model, name=EVIL),
        workload=structs.replace(plan.workload, name=EVIL),
        topology=structs.replace(plan.topology, device=EVIL),
        predicted=structs.replace(
            plan.predicted, bound_by=EVIL, provenance={EVIL: EVIL}, notes=(EVIL,)
        ),
    )
    found = dataclasses.replace(
        found,
        objective=EVIL,
        why=(EVIL,),
        ledger=(Rejected(label=EVIL, constraint=EVIL, need=EVIL, have=EVIL),),
        verdicts=("", *(EVIL for _ in found.verdicts[1:])),
        sensitivity=tuple(dataclasses.replace(each, label=EVIL) for each in found.sensitivity),
    )
    report = report_html(found, evil)
    page = read(report)
    tags = {node.tag for node in page.walk()}
    assert not tags & {"img", "script"}
    assert page.text.count(EVIL) >= 10
    assert not [name for node in page.walk() for name in node.attributes if name.startswith("on")]
    assert len(page.all("svg", role="img")) == len(plain.all("svg", role="img"))


# --- any question -------------------------------------------------------------------------------


@settings(max_examples=5)
@given(world=worlds())
def test_every_answer_has_a_report(world):
    try:
        given_ = answer(world, name=lambda _: "p", made_by=MADE_BY)
    except NoPlan:
        reject()
    page = read(report_html(given_.found, given_.plan))
    assert len(page.all("svg", role="img")) >= 10

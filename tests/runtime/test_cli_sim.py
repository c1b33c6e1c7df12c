"""medha-sim as a user meets it: figures, files, and messages with the right exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import sixteen_gpu_plan, tiny_plan
from typer.testing import CliRunner

from plans.codec import dump_file
from plans.mesh import Parallelism
from plans.plan import Plan
from runtime.arrivals import Load, offer
from runtime.cli_sim import app, main
from runtime.simulate import assign, simulate

ROOT = Path(__file__).resolve().parents[2]
LIGHT = ("--qps", "20", "--duration", "3")


def bundle(folder: Path, plan: Plan | None = None) -> Path:
    dump_file(folder / "plan.yaml", plan or tiny_plan())
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def json_of(*arguments: object) -> dict:
    def forbidden(token):
        raise AssertionError(token)

    return json.loads(run(*arguments, "--json", "-"), parse_constant=forbidden)


def test_the_plans_own_workload_is_served_to_its_end(tmp_path):
    found = json_of(bundle(tmp_path), *LIGHT)
    everyone = found["classes"]["all"]
    assert everyone["requests"] == everyone["finished"] > 20
    assert found["policy"] == "lars-lanes"
    assert found["source"] == "workload tiny-mix"
    assert 0 < everyone["ttft_s"]["p50"] <= everyone["ttft_s"]["p99"] <= everyone["ttft_s"]["max"]


def test_a_plan_file_is_as_good_as_its_bundle(tmp_path):
    folder = bundle(tmp_path)
    both = [json_of(path, *LIGHT) for path in (folder, folder / "plan.yaml")]
    for found in both:
        del found["wall_s"]  # the only figure that is not virtual
    assert both[0] == both[1]


def test_a_trace_keeps_its_times_and_classes_split_at_the_plans_length(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,16,4\n1,900,4\n2.5,32,4\n")
    found = json_of(bundle(tmp_path), "--trace", trace)
    assert {name: each["requests"] for name, each in found["classes"].items()} == {
        "all": 3,
        "short": 2,
        "long": 1,
    }
    assert found["arrivals"] == "trace"
    assert found["makespan_s"] > 2.5


def test_an_empty_system_answers_in_the_predicted_time(tmp_path):
    """One request alone: TTFT is the plan's own prediction for its length."""
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,256,4\n")
    plan = tiny_plan()
    found = json_of(bundle(tmp_path, plan), "--trace", trace, "--policy", "fcfs")
    predicted = plan.predicted.ttft_s["256"]
    # The packer may cut chunks shorter than the schedule to keep its margin, never longer.
    assert predicted * (1 - 1e-9) <= found["classes"]["all"]["ttft_s"]["max"] <= predicted * 1.5


def test_several_policies_and_seeds_stand_side_by_side(tmp_path):
    folder = bundle(tmp_path)
    flags = (*LIGHT, "--policy", "fcfs", "--policy", "lars,chunk=64", "--seeds", 2)
    runs = json_of(folder, *flags)["runs"]
    assert [(each["policy"], each["seed"]) for each in runs] == [
        ("fcfs", 0),
        ("lars,chunk=64", 0),
        ("fcfs", 1),
        ("lars,chunk=64", 1),
    ]
    assert runs[0]["classes"]["all"]["requests"] == runs[1]["classes"]["all"]["requests"]
    text = run(folder, *flags)
    for expected in ("fcfs", "lars,chunk=64", "TTFT p99, s", "goodput", "median over the seeds"):
        assert expected in text


def test_json_to_a_file_leaves_the_tables(tmp_path):
    path = tmp_path / "figures.json"
    assert "TTFT p50" in run(bundle(tmp_path), *LIGHT, "--json", path)
    assert json.loads(path.read_text())["policy"] == "lars-lanes"


def test_a_timeline_and_a_plot_are_written(tmp_path):
    timeline, plot = tmp_path / "timeline.json", tmp_path / "ttft.svg"
    run(bundle(tmp_path), *LIGHT, "--timeline", timeline, "--plot", plot)
    events = json.loads(timeline.read_text())["traceEvents"]
    assert {"queue", "decode", "waiting", "KV pages"} <= {event["name"] for event in events}
    assert all(event.get("dur", 0) >= 0 for event in events)
    assert "<svg" in plot.read_text()


def test_slices_of_a_stage_do_not_overlap(tmp_path):
    path = tmp_path / "timeline.json"
    plan = tiny_plan(parallelism=Parallelism(spp=2))
    run(bundle(tmp_path, plan), *LIGHT, "--timeline", path)
    slices = [
        (event["tid"], event["ts"], event["dur"])
        for event in json.loads(path.read_text())["traceEvents"]
        if event["ph"] == "X" and event["pid"] == 1
    ]
    assert {track for track, _, _ in slices} == {0, 1}
    for track in (0, 1):
        ends = 0.0
        for start, length in sorted((ts, dur) for tid, ts, dur in slices if tid == track):
            assert start >= ends - 1e-3  # microseconds: float64 at 1e9 us is exact to 1e-7
            ends = start + length


def failure(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["medha-sim", *(str(each) for each in arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--policy", "larz"), "unknown scheduling policy 'larz'; nearest: lars"),
        (("--policy", "fcfs,chunk=none"), "is not chunk=N"),
        (("--qps", "0"), "--qps 0.0: must be above 0"),
        (("--qps", "nan"), "--qps nan: must be above 0"),
        (("--duration", "-1"), "--duration -1.0: must be above 0"),
        (("--trace", "none.csv"), "none.csv: no such file"),
        (("--trace", "trace.parquet"), "trace.parquet: a trace ends in"),
        (("--plot", "figure.gif"), "ends in one of .pdf, .png, .svg"),
        (("--policy", "fcfs", "--policy", "lars", "--timeline", "t.json"), "holds one run"),
        (("--json", "no/such/folder/x.json", *LIGHT), "does not exist"),
        (("--json", ".", *LIGHT), "is a folder"),
        (("--json", "plan.yaml", *LIGHT), "--json plan.yaml: would replace an input (BUNDLE)"),
        (("--decisions", "./plan.yaml"), "would replace an input (BUNDLE)"),
        (("--trace", "t.csv", "--plot", "t.csv.png", "--json", "t.csv"), "input (--trace)"),
        (("--decisions", "d", "--json", "./d"), "--decisions d: is the file of --json too"),
        (("--decisions", "-"), "--decisions -: stdout is not for this one"),
        (("--qps", "1e-320"), "must be at least 1e-09"),
        (("--qps", "1e300"), "at most 10,000,000"),
        (("--qps", "1", "--duration", "1e300"), "at most 10,000,000"),
        (("--arrivals", "trace"), "has no arrivals"),
        (("--flag-that-is-not"), "No such option"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_why(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    given = (flags,) if isinstance(flags, str) else flags
    status, errors = failure(monkeypatch, capsys, bundle(tmp_path), *given)
    assert message in errors
    assert status == 2


def test_seeds_of_a_trace_without_anything_random_are_refused(tmp_path, monkeypatch, capsys):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,16,4\n1,90,4\n")
    flags = ("--trace", trace, "--seeds", 2)
    status, errors = failure(monkeypatch, capsys, bundle(tmp_path), *flags)
    assert (status, "has nothing random" in errors) == (2, True)
    assert len(json_of(bundle(tmp_path), *flags, "--qps", 5, "--arrivals", "poisson")["runs"]) == 2


def test_a_bundle_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    status, errors = failure(monkeypatch, capsys, tmp_path / "none")
    assert status == 2
    assert f"{tmp_path / 'none'}: no such file" in errors


def test_a_broken_plan_is_refused_with_the_path_of_the_field(tmp_path, monkeypatch, capsys):
    path = bundle(tmp_path) / "plan.yaml"
    path.write_text(path.read_text().replace("page_tokens: 16", "page_tokens: 17"))
    status, errors = failure(monkeypatch, capsys, tmp_path)
    assert status == 2
    assert "kv.page_tokens" in errors


def test_only_json_is_on_stdout_of_the_process(tmp_path):
    flags = [*LIGHT, "--json", "-"]
    result = subprocess.run(
        [sys.executable, "-m", "runtime.cli_sim", str(bundle(tmp_path)), *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout)["policy"] == "lars-lanes"
    assert result.stderr == ""


def test_replicas_share_the_requests_and_lose_none(tmp_path):
    plan = tiny_plan(parallelism=Parallelism(replicas=3))
    load = Load(qps=60.0, duration_s=4.0)
    requests = offer(plan.workload, load, context_tokens=plan.limits.context_tokens).requests
    shares = assign(plan, requests)
    assert sorted(each.number for share in shares for each in share) == list(range(len(requests)))
    assert min(len(share) for share in shares) > len(requests) / 6
    result = simulate(plan, requests, "lars")
    assert sorted(each.request.number for each in result.records) == list(range(len(requests)))
    gaps = sum(each.generated - 1 for each in result.records)
    assert len(result.short_gaps_s) + len(result.long_gaps_s) == gaps


def test_a_plan_of_real_size_is_served_by_either_policy(tmp_path):
    flags = ("--qps", "0.05", "--duration", "30", "--policy", "fcfs", "--policy", "lars")
    for each in json_of(bundle(tmp_path, sixteen_gpu_plan()), *flags)["runs"]:
        assert each["classes"]["all"]["finished"] == each["classes"]["all"]["requests"]

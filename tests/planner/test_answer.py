"""Whole answers: objectives, hard targets in replay, self-checks, and why a plan is what it is."""

import dataclasses

import pytest
from hypothesis import given, reject, settings
from msgspec import structs
from strategies_planner import by_datasheet, tiny_device, tiny_topology, tiny_workload, worlds

from planner.answer import answer, best_point, fewest_gpus, longest_context, misses, reevaluated
from planner.catalog import load_device, load_model, load_workload, topology_for
from planner.cost import MARGIN
from planner.failure import NoPlan
from planner.replay import delivered_rps
from planner.search import search
from planner.selfcheck import SelfCheckFailed, verify
from planner.world import make_world
from plans.errors import UsageError
from plans.model import Model, Rope
from plans.plan import MadeBy
from plans.topology import Topology

MADE_BY = MadeBy(medha="0", effort="quick", seed=0, command="medha-plan")


def world_of(model, gpus, *, hardware="h100", workload="paper-mix-5", **changes):
    device = load_device(hardware)
    return make_world(
        model=load_model(model),
        device=by_datasheet(device),
        topology=topology_for(device, gpus),
        workload=load_workload(workload),
        **changes,
    )


def machines(count) -> Topology:
    return topology_for(load_device("h100"), count)


def answered(world, **changes):
    made_by = structs.replace(MADE_BY, **changes)
    return answer(world, name=lambda _: "p", made_by=made_by, machines=machines)


@pytest.fixture(scope="module")
def main_answer():
    return answered(world_of("llama3-70b", 16))


# --- every answer -------------------------------------------------------------------------------


@settings(max_examples=15)
@given(world=worlds())
def test_every_answer_passes_every_self_check_and_uses_the_gpus_it_says(world):
    device = world.device

    def machine(count):
        if count > 8:
            raise UsageError("no such machine")
        return tiny_topology(device, per_node=count)

    try:
        given = answer(world, name=lambda _: "p", made_by=MADE_BY, machines=machine)
    except NoPlan:
        reject()
    p = given.plan.parallelism
    assert p.tp * p.spp * p.kvp * p.replicas + p.idle == world.gpus
    assert given.plan.predicted.replay is not None
    assert given.found.replays[0] == given.plan.predicted.replay
    assert len(given.found.replays) == len(given.found.ranked) == len(given.found.verdicts)
    assert given.found.why


def test_the_same_question_gives_the_same_answer(main_answer):
    assert answered(world_of("llama3-70b", 16)) == main_answer


def test_an_edited_plan_is_evaluated_to_what_the_planner_said(main_answer):
    plan = main_answer.plan
    again = reevaluated(plan)
    assert again.predicted.ttft_s == plan.predicted.ttft_s
    assert again.predicted.capacity_rps == plan.predicted.capacity_rps
    assert again.predicted.replay.arrival_rps == plan.predicted.replay.arrival_rps


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("lone-request", lambda plan: structs.replace(plan.step_time, hop_latency_s=-1e-4)),
        ("one-group", lambda plan: structs.replace(plan.step_time, overhead_s=float("nan"))),
    ],
)
def test_a_plan_that_breaks_a_self_check_names_it(main_answer, monkeypatch, name, broken):
    found, plan = main_answer.found, main_answer.plan
    monkeypatch.setattr("planner.selfcheck.check_plan", lambda *_, **__: None)
    monkeypatch.setattr(f"planner.selfcheck.{name.replace('-', '_')}", lambda _: iter(["broken"]))
    with pytest.raises(SelfCheckFailed) as caught:
        verify(found, structs.replace(plan, step_time=plan.step_time))
    assert caught.value.name == name
    assert caught.value.exit_status == 1


def test_a_candidate_that_was_missed_fails_the_neighbour_check(main_answer):
    found, plan = main_answer.found, main_answer.plan
    wide = [each for each in found.ranked if each.candidate.parallelism.kvp == 2][:1]
    crippled = dataclasses.replace(found, ranked=tuple(wide), verdicts=("",), replays=(None,))
    with pytest.raises(SelfCheckFailed, match=r"neighbours.*kvp 1 x 2 replicas was missed"):
        verify(crippled, plan)


# --- objectives ---------------------------------------------------------------------------------


def test_latency_takes_fewer_replicas_than_goodput():
    quick = search(world_of("llama3-8b", 8, workload="chat", objective="latency")).ranked[0]
    busy = search(world_of("llama3-8b", 8, workload="chat")).ranked[0]
    assert quick.candidate.parallelism.tp > busy.candidate.parallelism.tp
    assert quick.ttft_longest_s < busy.ttft_longest_s


def test_fewest_gpus_sustain_the_rate_and_one_machine_less_does_not():
    world = world_of("llama3-8b", 8, workload="chat", objective="min-gpus", rate_rps=50.0)
    smaller, found = fewest_gpus(world, machines)
    assert found.ranked[0].capacity.rps >= 50.0
    assert smaller.gpus < 8
    with pytest.raises(NoPlan) as caught:
        search(smaller.with_devices(machines(smaller.gpus - 1)))
    assert caught.value.constraint == "rate"


def test_fewest_gpus_need_a_rate():
    with pytest.raises(UsageError, match="--rate"):
        fewest_gpus(world_of("llama3-8b", 8), machines)


def test_a_rate_out_of_reach_names_the_nearest_that_is_not():
    with pytest.raises(NoPlan) as caught:
        search(world_of("llama3-8b", 1, workload="chat", rate_rps=1000.0))
    assert caught.value.constraint == "rate"
    nearest = float(caught.value.nearest.removeprefix("--rate "))
    assert search(world_of("llama3-8b", 1, workload="chat", rate_rps=nearest)).ranked


def test_the_longest_context_holds_and_a_longer_one_does_not():
    world = world_of("llama3-8b", 2, workload="chat", objective="max-context")
    longest = longest_context(world)
    limit_s = world.targets.tbt_s
    held = search(world_of("llama3-8b", 2, workload="chat", context_tokens=longest))
    assert held.ranked[0].tbt_full_s * (1 + MARGIN) <= limit_s
    longer = world_of("llama3-8b", 2, workload="chat", context_tokens=longest + 1024)
    with pytest.raises(NoPlan, match=r"^memory"):  # 50 ms would allow more, the KV pages do not
        search(longer)


# --- hard targets -------------------------------------------------------------------------------


def test_a_plan_with_targets_meets_them_in_replay():
    world = world_of("llama3-8b", 2, workload="chat", ttft_slo_s=0.5, tbt_slo_s=0.03)
    plan = answered(world).plan
    assert not misses(world, plan.predicted.replay)
    assert plan.predicted.replay.ttft_s["short"].p90 <= 0.5
    assert plan.predicted.replay.tbt_s["all"].p99 <= 0.03


def test_targets_missed_at_the_rate_asked_for_end_with_the_nearest_value():
    with pytest.raises(NoPlan) as caught:
        search(world_of("llama3-8b", 1, workload="chat", ttft_slo_s=0.001))
    alone_s = float(caught.value.nearest.removeprefix("--ttft-slo "))
    world = world_of("llama3-8b", 1, workload="chat", ttft_slo_s=alone_s, rate_rps=21.0)
    with pytest.raises(NoPlan) as caught:
        answered(world)
    assert caught.value.constraint == "ttft"
    assert "at --rate 21" in caught.value.need
    assert float(caught.value.nearest.removeprefix("--ttft-slo ")) > alone_s


def test_a_later_finalist_takes_the_lead_only_by_more_than_chance(main_answer):
    point = structs.replace(main_answer.plan.predicted.replay, requests=25, undecided=0)

    def best(first, second, requests=25):
        points = [
            structs.replace(point, attainment=each, requests=requests) for each in (first, second)
        ]
        return best_point(points, [0, 1])

    # of 25 requests a share of 0.8 is uncertain by 0.08, two of them differ by 0.11 by chance
    assert best(0.8, 0.8) == best(0.8, 0.96) == 0
    assert best(0.5, 1.0) == 1
    assert best(0.8, 0.96, requests=400) == 1
    assert best(0.96, 0.8, requests=400) == 0


# --- why ----------------------------------------------------------------------------------------


def pairs_of_gpus():
    """Eight nodes of two GPUs, as cards bridged in pairs are: tp ends at two."""
    world = world_of("llama3-70b", 16)
    machine = structs.replace(world.topology, nodes=8, devices_per_node=2)
    return dataclasses.replace(world, topology=machine)


@pytest.mark.parametrize(
    "make", [pairs_of_gpus, lambda: world_of("llama3-70b", 16, tbt_slo_s=0.024)]
)
def test_70b_at_a_million_tokens_gets_kvp_where_only_it_keeps_the_step(make):
    world = make()
    given = answer(world, name=lambda _: "p", made_by=MADE_BY)
    assert given.plan.parallelism.kvp > 1
    for each in given.found.ranked:
        if each.candidate.parallelism.kvp == 1:
            assert each.tbt_full_s * (1 + MARGIN) > world.targets.tbt_s
    text = " ".join(given.found.why)
    assert f"kvp {given.plan.parallelism.kvp}: " in text
    assert "without it" in text
    assert "A group joins every" in text


def test_70b_at_a_million_tokens_under_50_ms_gets_kvp_on_16_a100_and_the_plan_says_why():
    """Their memory gives a token at full context too late for the step budget of 30 ms."""
    world = world_of("llama3-70b", 16, hardware="a100", tbt_slo_s=0.05)
    given = answer(world, name=lambda _: "p", made_by=MADE_BY)
    best, budget_s = given.found.ranked[0], world.scheduler.step_budget_s
    assert world.limits.context_tokens == 1 << 20
    assert given.plan.parallelism.kvp == 2
    assert best.tbt_full_s < budget_s
    assert all(
        each.tbt_full_s > budget_s
        for each in given.found.ranked
        if each.candidate.parallelism.kvp == 1
    )
    said = given.found.why[0]
    assert said.startswith("kvp 2: without it a token at 1m takes ")
    assert "above the step budget of 30 ms" in said
    assert "shared by 2 groups, 512k tokens each" in said


def test_16_h100_keep_50_ms_without_kvp_and_the_plan_says_from_when_on_they_need_it():
    world = world_of("llama3-70b", 16, tbt_slo_s=0.05)
    given = answer(world, name=lambda _: "p", made_by=MADE_BY)
    best = given.found.ranked[0]
    assert given.plan.parallelism.kvp == 1
    said = given.found.why[0]
    assert said.startswith("kvp 1: a token at 1m takes ")
    limit_ms = float(said.partition("A limit below ")[2].split()[0])
    assert limit_ms == pytest.approx(best.tbt_full_s * (1 + MARGIN) * 1e3, rel=0.01)
    tighter = answer(
        world_of("llama3-70b", 16, tbt_slo_s=limit_ms * 0.9e-3),
        name=lambda _: "p",
        made_by=MADE_BY,
    )
    assert tighter.plan.parallelism.kvp > 1


def test_the_text_says_what_stages_and_chunks_give(main_answer):
    text = " ".join(main_answer.found.why)
    assert "spp 2: chunks of one prompt follow each other" in text
    assert "1.9" in text  # nearly the two stages
    assert "chunks fall from" in text
    assert "bound by" in text


def test_sensitivity_names_what_would_change_the_plan(main_answer):
    labels = {change.label: change for change in main_answer.found.sensitivity}
    assert {"8 GPUs", "32 GPUs", "time between tokens 25 ms", "links x 2"} <= set(labels)
    assert labels["time between tokens 25 ms"].differs
    assert not labels["links x 2"].differs
    assert all(change.text for change in labels.values())


# --- full effort --------------------------------------------------------------------------------


def small_world():
    """A model of a few megabytes on two devices, whose requests take milliseconds."""
    device = tiny_device()
    shape = {"family": "llama", "name": "small", "layers": 4, "hidden": 128, "heads": 8}
    rest = {"kv_heads": 2, "head_dim": 16, "ffn": 256, "vocab": 256, "context_limit": 8192}
    return make_world(
        model=Model(**shape, **rest, rope=Rope(theta=1e4)),
        device=device,
        topology=tiny_topology(device, per_node=2),
        workload=tiny_workload(2000),
    )


def test_full_effort_measures_the_capacity_that_another_seed_delivers_within_5_per_cent():
    world = small_world()
    plan = answer(world, name=lambda _: "p", made_by=structs.replace(MADE_BY, effort="full")).plan
    capacity_rps = plan.predicted.capacity_rps
    assert any("the formula says" in note for note in plan.predicted.notes)
    assert delivered_rps(plan, rate_rps=1.3 * capacity_rps, seed=11) == pytest.approx(
        capacity_rps, rel=0.05
    )


def test_full_effort_finds_a_rate_at_which_nine_of_ten_are_in_time():
    plan = answer(
        small_world(), name=lambda _: "p", made_by=structs.replace(MADE_BY, effort="full")
    ).plan
    point = plan.predicted.replay
    assert point.attainment >= 0.9
    assert 0 < point.goodput_rps <= point.arrival_rps <= plan.predicted.capacity_rps


# --- dtypes -------------------------------------------------------------------------------------


def test_other_dtypes_are_considered_only_where_asked_and_said_aloud():
    usual = search(world_of("llama3-70b", 4, workload="chat"))
    assert all(each.candidate.kv_dtype is None for each in usual.ranked)
    asked = answered(
        world_of(
            "llama3-70b", 4, workload="chat", weight_dtypes=("bf16", "fp8"), kv_dtypes=("fp8",)
        )
    )
    assert asked.plan.model.weight_dtype == "fp8"
    assert asked.plan.kv.dtype == "fp8"
    assert asked.found.ranked[0].capacity.rps > usual.ranked[0].capacity.rps
    notes = " ".join(asked.plan.predicted.notes)
    assert "no program is emitted: fp8 weights cannot be run yet" in notes
    assert "keys and values rounded to fp8" in notes


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"])
def test_experts_and_latent_attention_are_planned_and_known_to_be_no_program_yet(name):
    best = search(world_of(name, 16, hardware="h200", workload="chat")).ranked[0]
    assert best.world.model.unsupported
    if name == "deepseek-v3":  # one latent vector of 576 numbers, on each of the tp ranks
        page = best.candidate.page_tokens * max(best.candidate.stage_layers) * 576 * 2
        assert best.footprint.memory.kv_bytes == best.footprint.kv.pages_per_rank * page


def test_a_plan_without_a_program_says_so():
    plan = answered(world_of("deepseek-v3", 16, hardware="h200", workload="chat")).plan
    text = "mixture of experts and latent attention and fp8 weights cannot be run yet"
    assert any(text in note for note in plan.predicted.notes)

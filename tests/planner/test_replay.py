"""Replays in virtual time: Little's law, the mix, percentiles, capacity that is delivered."""

import math
from collections import Counter

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from strategies_planner import by_datasheet, worlds

from planner.assemble import to_plan
from planner.catalog import load_device, load_model, load_workload, topology_for
from planner.failure import NoPlan
from planner.replay import delivered_rps, offered, percentiles, replay
from planner.search import search
from planner.world import make_world
from plans.check import check_plan
from plans.chunks import WorkTable
from plans.plan import MadeBy
from plans.workload import length_at

MADE_BY = MadeBy(medha="0", effort="quick", seed=0, command="medha-plan")


def best_of(world):
    return to_plan(world, search(world).ranked[0], name="p", made_by=MADE_BY)


def plan_of(model, gpus, *, hardware="h100", workload="chat", **changes):
    device = load_device(hardware)
    return best_of(
        make_world(
            model=load_model(model),
            device=by_datasheet(device),
            topology=topology_for(device, gpus),
            workload=load_workload(workload),
            **changes,
        )
    )


@settings(max_examples=15)
@given(world=worlds(), load=st.sampled_from([0.3, 0.9, 1.5]), seed=st.integers(0, 3))
def test_every_small_plan_runs_and_keeps_littles_law(world, load, seed):
    try:
        plan = best_of(world)
    except NoPlan:
        reject()
    rate_rps = load * plan.predicted.capacity_rps
    point = replay(plan, rate_rps=rate_rps, seed=seed, steps=400)
    right = point.arrivals_per_s * point.time_in_system_mean_s
    assert point.in_system_mean == pytest.approx(right, rel=0.01)
    assert 0 <= point.utilisation <= 1
    assert point.goodput_rps <= point.arrival_rps
    assert point.finished + point.undecided <= point.requests
    predicted = plan.predicted
    predicted = type(predicted)(
        **{field: getattr(predicted, field) for field in predicted.__struct_fields__}
        | {"replay": point, "goodput_rps": point.goodput_rps}
    )
    check_plan(
        type(plan)(
            **{field: getattr(plan, field) for field in plan.__struct_fields__}
            | {"predicted": predicted}
        )
    )


def test_lengths_are_stratified_and_the_commonest_class_comes_in_tens():
    workload = load_workload("paper-mix-5")
    requests = offered(workload, count=41, rate_rps=1.0, seed=3, context_tokens=1 << 20)
    assert [each.arrival_s for each in requests] == sorted(each.arrival_s for each in requests)
    assert requests[0].arrival_s == 0.0
    assert Counter(each.class_name for each in requests) == {"short": 40, "long": 2}
    long = next(each for each in workload.classes if each.name == "long")
    prompts = sorted(each.prompt_tokens for each in requests if each.class_name == "long")
    assert prompts == [length_at(long.input_tokens, 0.25), length_at(long.input_tokens, 0.75)]


def test_another_seed_shuffles_the_same_lengths():
    workload = load_workload("paper-mix-5")
    one, two = (
        offered(workload, count=60, rate_rps=1.0, seed=seed, context_tokens=1 << 20)
        for seed in (0, 1)
    )
    assert sorted(each.prompt_tokens for each in one) == sorted(each.prompt_tokens for each in two)
    assert [each.prompt_tokens for each in one] != [each.prompt_tokens for each in two]


def test_the_same_seed_gives_the_same_replay():
    plan = plan_of("llama3-8b", 1)
    one, two = (replay(plan, rate_rps=5.0, seed=1, steps=300) for _ in range(2))
    assert one == two


def test_nothing_starts_sooner_than_alone():
    plan = plan_of("llama3-8b", 1)
    point = replay(plan, rate_rps=0.5 * plan.predicted.capacity_rps, seed=0, steps=2000)
    work = WorkTable(plan.prefill.chunks, plan.step_time, plan.kv.tokens_per_kvp_shard)
    shortest = min(row.input_tokens[0][1] for row in plan.workload.classes)
    assert point.ttft_s["all"].p50 >= work.solo_s(shortest)


def test_a_busier_plan_is_never_better_in_time():
    plan = plan_of("llama3-8b", 1)
    shares = [
        replay(plan, rate_rps=load * plan.predicted.capacity_rps, seed=0, steps=3000).attainment
        for load in (0.3, 3.0)
    ]
    assert shares[0] > 0.9 > shares[1]


def test_what_nobody_can_judge_yet_is_counted_and_in_no_percentile():
    plan = plan_of("llama3-70b", 16, workload="paper-mix-5")
    point = replay(plan, rate_rps=0.2, seed=0, steps=200)
    assert point.undecided
    assert point.ttft_s["long"].p50 is None
    assert point.ttft_s["short"].max is not None


def test_a_late_request_that_never_started_makes_percentiles_empty_not_small():
    row = percentiles(__import__("numpy").array([0.1, 0.2, math.inf]))
    assert (row.p50, row.p90, row.max) == (0.2, None, None)


def test_replicas_share_the_rate():
    plan = plan_of("llama3-8b", 2)
    assert plan.parallelism.replicas == 2
    point = replay(plan, rate_rps=8.0, seed=0, steps=4000, count=40)
    assert point.requests == 40
    assert point.arrivals_per_s < 5  # of one replica


@pytest.mark.parametrize(
    ("model", "gpus", "workload", "tails"),
    [("llama3-8b", 1, "chat", 4), ("llama3-70b", 4, "chat", 4)],
)
def test_the_runtime_delivers_the_predicted_capacity(model, gpus, workload, tails):
    """Within 5 % of the formula, by another seed than the plan's; the tail itself is 1 / 4 of it.

    Half of that tail is taken as busy, which leaves at most 1 / 8 beside the 5 %; measured 1-6 %.
    test_answer.py holds the measured capacity of full effort to 5 %.
    """
    plan = plan_of(model, gpus, workload=workload)
    capacity_rps = plan.predicted.capacity_rps
    delivered = delivered_rps(plan, rate_rps=1.3 * capacity_rps, seed=7, tails=tails)
    assert delivered == pytest.approx(capacity_rps, rel=0.05 + 1 / (2 * tails))

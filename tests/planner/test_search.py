"""The search: equal to brute force, hard targets, sound plans, sensible choices at scale."""

import dataclasses
import itertools

import pytest
from hypothesis import given, reject, settings
from strategies_planner import tiny_topology, tiny_workload, worlds

from planner.assemble import evaluate, to_plan
from planner.catalog import load_device, load_model, load_workload, topology_for
from planner.cost import MARGIN
from planner.search import NoPlan, price, round_up, search, smallest_fitting
from planner.space import Candidate, check_tp, cut_layers
from planner.world import make_world
from plans.check import check_plan
from plans.errors import Infeasible
from plans.mesh import Parallelism
from plans.plan import MadeBy

MADE_BY = MadeBy(medha="0", effort="quick", seed=0, command="medha-plan")


def brute_force(world):
    """Score of the documented choice among all products of degrees, fewer replicas included."""
    topology = world.topology
    priced = []
    degrees = range(1, world.gpus + 1)
    for tp, spp, kvp, replicas in itertools.product(degrees, repeat=4):
        groups = topology.nodes * (topology.devices_per_node // tp)
        if spp * kvp * replicas > groups or spp > world.model.layers:
            continue
        parallelism = Parallelism(
            tp=tp,
            spp=spp,
            kvp=kvp,
            replicas=replicas,
            idle=world.gpus - tp * spp * kvp * replicas,
        )
        try:
            check_tp(world.model, tp)
            stages = cut_layers(world.model.layers, spp)
            priced.append(price(world, Candidate(parallelism=parallelism, stages=stages)))
        except Infeasible:
            continue
    target_s, idle_s = world.targets.tbt_s, world.scheduler.idle_budget_s
    quick = [one for one in priced if one.tbt_full_s * (1 + MARGIN) <= target_s]
    roomy = [one for one in quick if one.least_chunk_s * (1 + MARGIN) <= idle_s]
    group = roomy or quick or priced
    if not group:
        return None
    ttft = world.targets.ttft
    limit_s = max(ttft.multiplier * min(one.ttft_longest_s for one in group), ttft.floor_s)
    return max(one.score for one in group if one.ttft_longest_s <= limit_s)


@settings(max_examples=30)
@given(world=worlds())
def test_search_equals_brute_force(world):
    best = brute_force(world)
    if best is None:
        with pytest.raises(NoPlan):
            search(world)
    else:
        assert search(world).ranked[0].score == best


@settings(max_examples=40)
@given(world=worlds())
def test_every_feasible_candidate_becomes_a_plan_that_passes_every_check(world):
    try:
        found = search(world)
    except NoPlan:
        reject()
    for priced in found.ranked[:3]:
        plan = to_plan(world, priced, name="drawn", made_by=MADE_BY, notes=found.notes)
        check_plan(plan)
        assert evaluate(plan) == plan
        if plan.parallelism.idle:
            assert any("idle" in note for note in plan.predicted.notes)


@settings(max_examples=30)
@given(world=worlds())
def test_every_candidate_is_ranked_or_rejected_with_both_sides(world):
    try:
        found = search(world)
    except NoPlan as error:
        rows = error.ledger
        labels = []
    else:
        rows = found.ledger
        labels = [each.candidate.label for each in found.ranked]
        assert len(found.verdicts) == len(labels)
    assert labels or rows
    assert all(row.constraint and row.need and row.have for row in rows)
    assert len(set(labels)) == len(labels)
    assert not set(labels) & {row.label for row in rows}


@settings(max_examples=30)
@given(world=worlds())
def test_the_nearest_value_of_an_impossible_target_is_possible(world):
    for field, flag in (("ttft_slo_s", "--ttft-slo"), ("tbt_slo_s", "--tbt-slo")):
        impossible = dataclasses.replace(world, **{field: 1e-9})
        with pytest.raises(NoPlan) as caught:
            search(impossible)
        if caught.value.constraint not in {"ttft", "tbt"}:
            continue  # nothing fits at all
        assert caught.value.nearest.startswith(flag)
        value = float(caught.value.nearest.split()[1])
        assert search(dataclasses.replace(world, **{field: value})).ranked


def test_round_up_gives_three_digits_and_never_less():
    assert round_up(0.0123412) == 0.0124
    assert round_up(1234.0) == 1240.0
    assert round_up(0.5) == 0.5


# --- choices that an expert would make ----------------------------------------------------------


def world_of(model, gpus, *, hardware="h100", workload="paper-mix-5", **changes):
    device = load_device(hardware)
    return make_world(
        model=load_model(model),
        device=device,
        topology=topology_for(device, gpus),
        workload=load_workload(workload),
        **changes,
    )


def test_70b_with_a_million_tokens_on_16_gpus_pipelines_two_nodes():
    found = search(world_of("llama3-70b", 16))
    p = found.ranked[0].candidate.parallelism
    assert (p.tp, p.spp, p.kvp, p.replicas, p.idle) == (8, 2, 1, 1, 0)
    assert "yarn x 128" in found.notes[0]


def test_chat_on_a_small_model_takes_replicas():
    p = search(world_of("llama3-8b", 8, workload="chat")).ranked[0].candidate.parallelism
    assert (p.tp * p.spp * p.kvp, p.replicas) == (1, 8)


def test_kvp_is_chosen_where_only_it_keeps_the_time_between_tokens():
    world = world_of("llama3-70b", 64, context_tokens=4 << 20)
    found = search(world)
    p = found.ranked[0].candidate.parallelism
    assert p.kvp > 1
    assert all(
        each.tbt_full_s * (1 + MARGIN) > world.targets.tbt_s
        for each in found.ranked
        if each.candidate.parallelism.kvp == 1
    )


def test_seven_gpus_leave_none_idle_unless_that_is_better():
    found = search(world_of("qwen2.5-0.5b", 7, workload="chat"))
    assert found.ranked[0].candidate.parallelism.idle == 0


def test_405b_on_one_gpu_names_memory_and_a_sufficient_number():
    world = world_of("llama3.1-405b", 1)
    with pytest.raises(NoPlan) as caught:
        search(world)
    assert caught.value.constraint == "memory"
    device = load_device("h100")
    machines = [topology_for(device, gpus) for gpus in (8, 16, 24, 32)]
    # weights 812 GB and KV 541 GB: over 16 GPUs 84.6 GB each, more than the 80.6 GB unreserved
    assert smallest_fitting(world, machines) == 24


def test_a_model_that_fits_nowhere_has_no_sufficient_number():
    world = world_of("llama3.1-405b", 1)
    assert smallest_fitting(world, [tiny_topology(load_device("h100"), per_node=1)]) is None


def test_lengths_beyond_the_context_are_noted():
    world = dataclasses.replace(world_of("llama3-8b", 1, context_tokens=4096))
    assert any("cut at" in note for note in world.notes)
    assert tiny_workload().max_context_tokens  # the helper's own bound is a real length

"""The search: equal to brute force, hard targets, sound plans, sensible choices at scale."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from strategies_planner import by_datasheet, tiny_topology, tiny_workload, worlds

from planner import search as module
from planner.assemble import evaluate, to_plan
from planner.catalog import load_device, load_model, load_workload, topology_for
from planner.cost import MARGIN
from planner.failure import NoPlan, round_down, round_up
from planner.objective import score
from planner.price import price
from planner.search import search, smallest_fitting
from planner.space import Candidate, check_tp, cut_layers
from planner.world import make_world
from plans.check import check_plan
from plans.errors import Infeasible
from plans.mesh import Parallelism
from plans.plan import MadeBy

MADE_BY = MadeBy(medha="0", effort="quick", seed=0, command="medha-plan")


def every_candidate(world):
    """All products of degrees, fewer replicas included, in every page size and spread."""
    topology = world.topology
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
        for page, spread in itertools.product((64, 128), range(1, kvp + 1)):
            try:
                check_tp(world.model, tp)
                yield price(
                    world,
                    Candidate(
                        parallelism=parallelism,
                        stages=cut_layers(world.model.layers, spp),
                        page_tokens=page,
                        spread=spread,
                    ),
                )
            except Infeasible:
                continue


def brute_force(world, spreads):
    """Score of the documented choice among all candidates of those spreads; None without any."""
    priced = [one for one in every_candidate(world) if spreads(one.candidate)]
    target_s, idle_s = world.targets.tbt_s, world.scheduler.idle_budget_s
    quick = [one for one in priced if one.tbt_full_s * (1 + MARGIN) <= target_s]
    roomy = [one for one in quick if one.least_chunk_s * (1 + MARGIN) <= idle_s]
    group = roomy or quick or priced
    if not group:
        return None
    ttft = world.targets.ttft
    limit_s = max(ttft.multiplier * min(one.ttft_longest_s for one in group), ttft.floor_s)
    if world.objective == "latency":
        limit_s = math.inf
    return max(score(world, one) for one in group if one.ttft_longest_s <= limit_s)


def halved(candidate):
    """Whether its groups are all of them, or half, a quarter, ... of them, as the search has it."""
    wide = candidate.parallelism.kvp
    while wide > max(candidate.groups, 1):
        wide = (wide + 1) // 2
    return wide == candidate.groups and (candidate.groups > 1 or candidate.parallelism.kvp == 1)


@settings(max_examples=12)
@given(world=worlds(), objective=st.sampled_from(["goodput", "latency"]))
def test_search_equals_brute_force(world, objective):
    world = dataclasses.replace(world, objective=objective)
    best = brute_force(world, halved)
    if best is None:
        with pytest.raises(NoPlan):
            search(world)
    else:
        assert score(world, search(world).ranked[0]) == best


@settings(max_examples=20)
@given(world=worlds(), objective=st.sampled_from(["goodput", "latency"]))
def test_pruning_changes_no_row_of_the_table(world, objective):
    world = dataclasses.replace(world, objective=objective)
    try:
        whole = search(world)
    except NoPlan:
        reject()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "EXACT_SHAPES", 0)
        patch.setattr(module, "TABLE", 3)
        pruned = search(world)

    def competing(found):
        both = zip(found.ranked, found.verdicts, strict=True)
        return [score(world, each) for each, why in both if not why][:3]

    assert competing(pruned) == competing(whole)
    assert all(row.reason and row.bound and row.best and row.branches for row in pruned.pruned)


@settings(max_examples=12)
@given(world=worlds())
def test_every_shape_is_priced_or_stands_in_the_ledger_or_in_the_proof(world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "EXACT_SHAPES", 0)
        patch.setattr(module, "TABLE", 1)
        try:
            found = search(world)
        except NoPlan:
            reject()
    named = {each.candidate.parallelism for each in found.ranked}
    labels = " ".join(row.label for row in found.ledger)
    for root in module.candidates(world)[0]:
        p = root.parallelism
        covered = any(
            row.label.startswith(f"tp {p.tp} x") and row.label.endswith(f"kvp {p.kvp}")
            for row in found.pruned
        )
        assert p in named or root.label in labels or covered


@settings(max_examples=20)
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


@settings(max_examples=15)
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


@settings(max_examples=15)
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


def test_round_down_gives_three_digits_and_never_more():
    assert round_down(0.0123492) == 0.0123
    assert round_down(0.5) == 0.5


# --- choices that an expert would make ----------------------------------------------------------


def world_of(model, gpus, *, hardware="h100", workload="paper-mix-5", **changes):
    device = load_device(hardware)
    return make_world(
        model=load_model(model),
        device=by_datasheet(device),
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

"""Bounds of shapes and branches: no candidate, in any variant, is better than its bound."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_planner import by_datasheet, worlds

from planner.bound import Bounds
from planner.catalog import load_device, load_model, load_workload, topology_for
from planner.objective import score, score_bound
from planner.price import price
from planner.space import branches, candidates, variants
from planner.world import make_world
from plans.errors import Infeasible


def priced(world, root):
    """Every variant of a shape that fits, with its branch."""
    for branch in branches(root):
        for candidate in variants(world, branch):
            try:
                yield branch, price(world, candidate)
            except Infeasible:
                continue


def assert_bounded(world, root):
    bounds = Bounds(world)
    whole = bounds.of(root)
    for branch, each in priced(world, root):
        own = bounds.of(branch, whole=branch.spread is None and root.parallelism.kvp > 1)
        for bound in (whole, own):
            assert bound.fits
            assert bound.rps >= each.capacity.rps
            assert bound.tbt_full_s <= each.tbt_full_s
            assert bound.least_chunk_s <= each.least_chunk_s
            assert bound.ttft_longest_s <= each.ttft_longest_s
            assert score_bound(world, bound) >= score(world, each)
        assert bounds.ttft_s(branch) <= each.ttft_longest_s


@settings(max_examples=15)
@given(
    world=st.sampled_from(["goodput", "latency"]).flatmap(
        lambda objective: worlds(objective=objective)
    )
)
def test_no_candidate_of_a_small_world_beats_its_bound(world):
    for root in candidates(world)[0]:
        assert_bounded(world, root)


@pytest.mark.parametrize(
    ("model", "gpus", "hardware", "workload", "context"),
    [
        ("llama3-70b", 64, "h100", "paper-mix-5", 1 << 20),
        ("llama3-8b", 48, "h200", "chat", 16384),
        ("deepseek-v3", 32, "h200", "paper-mix-1", 1 << 18),
    ],
)
def test_no_candidate_of_a_real_model_beats_its_bound(model, gpus, hardware, workload, context):
    device = load_device(hardware)
    world = make_world(
        model=load_model(model),
        device=by_datasheet(device),
        topology=topology_for(device, gpus),
        workload=load_workload(workload),
        context_tokens=context,
        kv_dtypes=("bf16", "fp8"),
    )
    for root in candidates(world)[0][::17]:
        assert_bounded(world, root)


@pytest.mark.parametrize(("gpus", "context"), [(2, 32768), (8, 1 << 20)])
def test_no_candidate_of_a_measured_device_beats_its_bound(gpus, context):
    """What several ranks add to a step is shared by the stages: a shape of many has less each."""
    device = load_device("h100")
    world = make_world(
        model=load_model("llama3-8b"),
        device=device,
        topology=topology_for(device, gpus),
        workload=load_workload("chat"),
        context_tokens=context,
    )
    for root in candidates(world)[0]:
        assert_bounded(world, root)


def test_a_bound_is_not_vacuous():
    """On one machine the bound of the best shape is within a factor of two of what it does."""
    device = load_device("h100")
    world = make_world(
        model=load_model("llama3-70b"),
        device=by_datasheet(device),
        topology=topology_for(device, 16),
        workload=load_workload("paper-mix-5"),
    )
    root = next(
        each
        for each in candidates(world)[0]
        if (each.parallelism.tp, each.parallelism.spp, each.parallelism.kvp) == (8, 2, 1)
    )
    bounds, each = Bounds(world), price(world, root)
    assert bounds.of(root).rps < 2 * each.capacity.rps
    assert bounds.ttft_s(root) > each.ttft_longest_s / 2

"""Memory: exact weights, monotone in everything, honest about what does not fit."""

import dataclasses

import pytest
from hypothesis import assume, given, reject
from hypothesis import strategies as st
from msgspec import structs
from strategies_planner import worlds

from planner.memory import (
    activations_bytes,
    footprint,
    page_bytes,
    rank_weights_bytes,
    reachable_context,
    shard_tokens,
)
from planner.space import Candidate, candidates, cut_layers
from plans.errors import Infeasible
from plans.mesh import Parallelism
from plans.model import DTYPE_BYTES


def candidate(world, **degrees):
    parallelism = Parallelism(**degrees)
    return Candidate(
        parallelism=parallelism, stages=cut_layers(world.model.layers, parallelism.spp)
    )


@given(world=worlds())
def test_one_rank_holds_the_whole_model(world):
    assert rank_weights_bytes(world.model, candidate(world)) == world.model.weight_bytes


@given(world=worlds(), data=st.data())
def test_the_ranks_of_a_stage_hold_the_model_once_but_for_norms_and_repeated_kv_heads(world, data):
    """Lower bound: no rank can hold less than its even share of the matrices."""
    each = data.draw(st.sampled_from(candidates(world)[0]))
    p = each.parallelism
    least = world.model.layers * world.model.layer_matmul_parameters / (p.tp * p.spp)
    size = DTYPE_BYTES[world.model.weight_dtype]
    assert rank_weights_bytes(world.model, each) >= least * size


@given(world=worlds(), data=st.data())
def test_parts_add_up_to_the_capacity(world, data):
    each = data.draw(st.sampled_from(candidates(world)[0]))
    try:
        memory = footprint(world, each).memory
    except Infeasible:
        reject()
    parts = ("weights", "activations", "reserved", "kv", "free")
    assert sum(getattr(memory, f"{part}_bytes") for part in parts) == memory.capacity_bytes


@given(world=worlds(), data=st.data())
def test_a_candidate_fits_exactly_up_to_the_context_that_the_error_names(world, data):
    each = data.draw(st.sampled_from(candidates(world)[0]))
    reach = reachable_context(world, each)
    limits = world.limits

    def at(context):
        return dataclasses.replace(world, limits=structs.replace(limits, context_tokens=context))

    if reach:
        footprint(at(reach), each)
    with pytest.raises(Infeasible) as caught:
        footprint(at(reach + 1), each)
    assert caught.value.constraint == "memory"
    assert bool(caught.value.nearest) == bool(reach)


@given(world=worlds(), data=st.data())
def test_a_higher_degree_never_needs_more(world, data):
    first = candidate(world)
    tp = data.draw(st.sampled_from([1, world.model.kv_heads]))
    spp = data.draw(st.integers(1, world.model.layers))
    assume(world.model.ffn % tp == 0 and world.model.vocab % tp == 0)
    more = candidate(world, tp=tp, spp=spp)
    assert rank_weights_bytes(world.model, more) <= rank_weights_bytes(world.model, first)
    assert activations_bytes(world, more) <= activations_bytes(world, first)
    assert page_bytes(world, more) <= page_bytes(world, first)


@given(world=worlds(), kvp=st.integers(1, 8))
def test_shards_are_whole_pages_that_cover_the_context(world, kvp):
    shard = shard_tokens(world, kvp)
    assert shard % world.page_tokens == 0
    assert shard * kvp >= world.limits.context_tokens
    assert (shard - world.page_tokens) * kvp < world.limits.context_tokens


@given(world=worlds())
def test_kv_heads_are_repeated_once_tp_exceeds_them(world):
    heads = world.model.kv_heads
    assert page_bytes(world, candidate(world, tp=heads)) == page_bytes(
        world, candidate(world, tp=4 * heads)
    )


@given(world=worlds())
def test_activations_grow_with_the_step_not_with_the_prompt(world):
    each = candidate(world)
    longer = dataclasses.replace(world, limits=structs.replace(world.limits, context_tokens=10**6))
    wider = dataclasses.replace(
        world, scheduler=structs.replace(world.scheduler, max_step_tokens=16384)
    )
    assert activations_bytes(longer, each) == activations_bytes(world, each)
    assert activations_bytes(wider, each) > activations_bytes(world, each)

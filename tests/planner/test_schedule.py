"""Chunk schedules: within the budget, never rising, the best of all; what moves the first token."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from strategies import step_times
from strategies_planner import by_datasheet

from planner.catalog import load_device, load_model, load_workload, topology_for
from planner.price import price, tbt_s
from planner.schedule import (
    cheapest,
    chunk_sizes,
    estimate_solo_s,
    ladder,
    row_costs,
    row_ends,
    rows_of,
)
from planner.space import Candidate, cut_layers
from planner.world import make_world
from plans.chunks import WorkTable, split_prompt
from plans.mesh import Parallelism


def world_of(model="llama3-70b", gpus=16, **changes):
    device = load_device("h100")
    return make_world(
        model=load_model(model),
        device=by_datasheet(device),
        topology=topology_for(device, gpus),
        workload=load_workload("paper-mix-5"),
        **changes,
    )


def priced(world, *, tp=8, spp=1, kvp=1):
    used = tp * spp * kvp
    parallelism = Parallelism(tp=tp, spp=spp, kvp=kvp, replicas=1, idle=world.gpus - used)
    stages = cut_layers(world.model.layers, spp)
    return price(world, Candidate(parallelism=parallelism, stages=stages))


@settings(max_examples=30)
@given(
    time=step_times(),
    shard=st.sampled_from([4096, 16384, 65536]),
    context=st.sampled_from([9000, 16384, 60000]),
    largest=st.sampled_from([(256, 128, 96, 96), (512, 384, 128, 32), (288, 288, 256, 128)]),
)
def test_no_schedule_that_never_rises_has_a_lower_sum(time, shard, context, largest):
    time = structs.replace(time, overhead_s=time.overhead_s + 1e-6)  # no step takes no time
    untils = row_ends(context)
    most = list(largest[: len(untils)])

    shares = [0.5, 0.3, 0.15, 0.05][: len(untils)]

    def total(chunks):
        costs = row_costs(time, shard, untils, [[chunk] for chunk in chunks])
        reference = row_costs(time, shard, untils, [[chunk] for chunk in most])
        done, base, ratio = 0.0, 0.0, 0.0
        for ((pace, drain),), ((base_pace, base_drain),), share in zip(
            costs, reference, shares, strict=True
        ):
            done, base = done + pace, base + base_pace
            ratio += share * (done + drain) / (base + base_drain)
        return ratio

    sizes = ladder(most[0])
    every = [
        chunks
        for chunks in itertools.product(
            *[[size for size in {*sizes, bound} if size <= bound] for bound in most]
        )
        if list(chunks) == sorted(chunks, reverse=True)
    ]
    found = cheapest(time, shard, untils, most, shares)
    assert tuple(found) in every
    assert total(found) == pytest.approx(min(map(total, every)), rel=1e-12)


@pytest.mark.parametrize(("spp", "kvp"), [(1, 1), (2, 1), (1, 2)])
def test_chunks_keep_the_budget_and_never_rise(spp, kvp):
    world = world_of()
    each = priced(world, spp=spp, kvp=kvp)
    chunks = [chunk for _, chunk in each.sizes]
    assert chunks == sorted(chunks, reverse=True)
    assert each.sizes[-1][0] == world.limits.context_tokens
    least = world.scheduler.min_chunk_tokens
    for tokens, prefix in split_prompt(rows_of(each.sizes), 1 << 20, each.shard_tokens):
        held = prefix % each.shard_tokens
        groups = prefix // each.shard_tokens + 1
        step_s = each.time.step_s([(tokens, held)], (), groups)
        assert tokens <= least or step_s * (1 + each.time.margin) <= world.scheduler.idle_budget_s


@pytest.mark.parametrize(("spp", "kvp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("tokens", [5000, 8192, 100_000, 1 << 20])
def test_the_estimate_is_within_three_per_cent_of_the_recursion(spp, kvp, tokens):
    """The quadrature is exact for whole chunks; a partial one at an edge is the difference."""
    each = priced(world_of(gpus=32), spp=spp, kvp=kvp)
    exact = WorkTable(rows_of(each.sizes), each.time, each.shard_tokens).solo_s(tokens)
    estimate = estimate_solo_s(each.sizes, each.time, tokens, each.shard_tokens)
    assert estimate == pytest.approx(exact, rel=0.03 if tokens > 8192 else 0.2)


def test_a_million_tokens_start_sooner_with_more_stages():
    """One prompt alone gains from stages, by almost their number: chunks overlap."""
    world = world_of(gpus=64)
    times = [priced(world, spp=spp).ttft_longest_s for spp in (1, 2, 4, 8)]
    for fewer, more in itertools.pairwise(times):
        assert 1.7 < fewer / more < 2


def test_chunk_size_moves_the_first_token_both_ways():
    """On stages both small chunks (fixed cost) and large ones (fill and drain) are slower."""
    each = priced(world_of(gpus=64), spp=8)
    times = {
        chunk: WorkTable(rows_of(((8192, chunk),)), each.time, each.shard_tokens).solo_s(8192)
        for chunk in (32, 512, 8192)
    }
    assert times[512] < times[32]
    assert times[512] < times[8192]


def test_more_stages_take_smaller_first_chunks():
    world = world_of(gpus=64)
    assert priced(world, spp=8).sizes[0][1] < priced(world, spp=1).sizes[0][1]


def test_one_stage_takes_the_largest_chunk_that_fits():
    each = priced(world_of())
    (until, chunk), *_ = each.sizes
    budget_s = each.world.scheduler.idle_budget_s / (1 + each.time.margin)
    assert each.time.step_s([(chunk, until)]) <= budget_s
    assert each.time.step_s([(chunk + 128, until)]) > budget_s


def test_a_table_with_a_step_is_searched_on_one_stage_too():
    """Where a larger step costs more a token, the largest chunk is not the best."""
    world = world_of()
    time = priced(world).time
    knots = [
        structs.replace(knot, seconds=knot.seconds + 1e-3 * (knot.at > 512)) for knot in time.matmul
    ]
    jagged = structs.replace(time, matmul=tuple(knots))
    assert chunk_sizes(world, jagged, 1 << 20)[0][1] <= 512


@given(time=step_times(), shard=st.integers(64, 4096), shards=st.integers(1, 4))
def test_a_new_prompts_chunk_beside_a_decode_costs_its_own_time_in_one_group(time, shard, shards):
    """The decode is merged over its groups; the chunk beside it lies in one of them."""
    context = shard * shards
    alone_s, both_s = tbt_s(time, context, shard), tbt_s(time, context, shard, 32)
    assert alone_s == pytest.approx(time.step_s((), [shard], shards))
    own_s = time.step_s([(32, 0)], [shard]) - time.step_s((), [shard])
    assert both_s - alone_s == pytest.approx(own_s, rel=1e-6, abs=1e-12)

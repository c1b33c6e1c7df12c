"""Step times, chunk schedules and capacity: bounds, monotonicity, the exact formulas."""

import dataclasses

import pytest
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st
from msgspec import structs
from strategies import tiny_model
from strategies_planner import tiny_device, tiny_topology, tiny_workload, worlds

from planner.capacity import PromptWork, Work, capacity, demand, mean_tokens, stage_terms
from planner.cost import costed, peak, roofline, step_time
from planner.memory import footprint, shard_tokens
from planner.placement import place
from planner.schedule import (
    chunk_sizes,
    estimate_solo_s,
    rows_of,
    spans,
    with_predictions,
)
from planner.space import candidates
from planner.world import make_world
from plans.chunks import WorkTable, add_sharded_chunk, split_prompt
from plans.errors import Infeasible
from plans.model import DTYPE_BYTES
from plans.steptime import StepLoad
from plans.workload import mean_length, mean_square_length


@st.composite
def cases(draw):
    """A world, a candidate of it, its step times and its shard length."""
    world = draw(worlds())
    each = draw(st.sampled_from(candidates(world)[0]))
    time = step_time(world, each, place(world.topology, each.parallelism))
    return world, each, time, shard_tokens(world, each.parallelism.kvp)


@given(case=cases(), tokens=st.integers(1, 8192), prefix=st.integers(0, 10**6))
def test_no_step_beats_the_peak_or_the_bandwidth(case, tokens, prefix):
    world, each, time, _ = case
    p, model = each.parallelism, world.model
    flops = model.matmul_flops(tokens) / p.tp
    attention = model.attention_flops(tokens, prefix) / p.tp
    weights = model.layers * model.layer_matmul_parameters * DTYPE_BYTES[model.weight_dtype] / p.tp
    bound_s = max(
        flops / peak(world, model.weight_dtype) + attention / peak(world, world.kv_dtype),
        weights / world.device.memory_bandwidth_bytes_per_s,
    )
    assert time.step_s([(tokens, prefix)]) >= bound_s


@given(case=cases())
def test_the_head_of_fp8_weights_reads_bf16(case):
    world, each, _, _ = case
    placed, peaks = place(world.topology, each.parallelism), world.device.peak_flops_per_s
    device = structs.replace(world.device, peak_flops_per_s=peaks | {"fp8": 2 * peaks["bf16"]})
    plain, fp8 = (
        dataclasses.replace(
            world, device=device, model=structs.replace(world.model, weight_dtype=dtype)
        )
        for dtype in ("bf16", "fp8")
    )
    head = roofline(fp8, each, placed).head
    read = 2 * world.model.vocab * world.model.hidden / each.parallelism.tp
    assert head[0].seconds >= read * (1 - 1e-9) / device.memory_bandwidth_bytes_per_s
    assert head == roofline(plain, each, placed).head


@given(case=cases())
def test_chunks_over_keys_in_fp8_take_the_measured_rate_and_a_plan_says_so(case):
    """2.3 times as long as over keys in bf16, 0.44 of the rate; half the bytes where they bind."""
    world, each, _, _ = case
    assume(world.model.weight_dtype == "bf16")
    placed = place(world.topology, each.parallelism)
    plain, fp8 = (
        costed(dataclasses.replace(world, kv_dtype=dtype), each, placed)
        for dtype in ("bf16", "fp8")
    )
    assert fp8.time.pair_s == pytest.approx(2.3 * plain.time.pair_s)
    assert plain.time.key_s / 2 <= fp8.time.key_s <= 2.3 * plain.time.key_s * (1 + 1e-9)
    assert fp8.time.decode_key_s <= plain.time.decode_key_s
    assert any("fp8" in note for note in fp8.notes)
    assert not plain.notes


@given(case=cases(), tokens=st.integers(1, 8000), more=st.integers(0, 500))
def test_time_never_falls_with_tokens_prefix_or_batch(case, tokens, more):
    _, _, time, _ = case
    assert time.step_s([(tokens, 100)]) <= time.step_s([(tokens + more, 100)])
    assert time.step_s([(tokens, 100)]) <= time.step_s([(tokens, 100 + more)])
    assert time.step_s((), [tokens]) <= time.step_s((), [tokens + more])
    assert time.step_s((), [tokens]) <= time.step_s((), [tokens, more + 1])


@given(case=cases())
def test_tables_rise_and_reach_the_largest_step(case):
    world, _, time, _ = case
    for table, most in (
        (time.matmul, world.scheduler.max_step_tokens),
        (time.head, world.limits.sequences),
    ):
        assert [knot.at for knot in table] == sorted({knot.at for knot in table})
        assert [knot.seconds for knot in table] == sorted(knot.seconds for knot in table)
        assert table[0].at == 1
        assert table[-1].at >= most


def test_a_dtype_that_the_device_lacks_is_infeasible_by_name():
    device = tiny_device(peak_flops_per_s={"fp32": 1e12})
    world, each = one_device_world(device)
    with pytest.raises(Infeasible, match="tiny-gpu has fp32"):
        step_time(world, each, place(world.topology, each.parallelism))


def one_device_world(device, **changes):
    world = make_world(
        model=tiny_model(context_limit=8192),
        device=device,
        topology=tiny_topology(device, per_node=1),
        workload=tiny_workload(),
        **changes,
    )
    return world, candidates(world)[0][0]


# --- the chunk schedule -------------------------------------------------------------------------


@given(case=cases())
def test_every_chunk_fits_the_idle_budget_or_is_the_smallest(case):
    world, _, time, shard = case
    sizes = chunk_sizes(world, time, shard)
    for tokens, prefix in split_prompt(rows_of(sizes), world.limits.context_tokens, shard):
        if tokens <= world.scheduler.min_chunk_tokens:
            continue
        for behind in range(min(2, prefix // shard + 1)):
            load = StepLoad(time)
            add_sharded_chunk(load, tokens, prefix, shard, behind=behind)
            # 1e-9: the same sum in another order
            assert load.seconds() * (1 + time.margin) <= world.scheduler.idle_budget_s * (1 + 1e-9)


@given(case=cases())
def test_rows_cover_the_context_and_chunks_never_rise(case):
    world, _, time, shard = case
    sizes = chunk_sizes(world, time, shard)
    untils, chunks = zip(*sizes, strict=True)
    assert untils[-1] == world.limits.context_tokens
    assert list(untils) == sorted(set(untils))
    assert list(chunks) == sorted(set(chunks), reverse=True)
    assert chunks[0] <= world.scheduler.max_step_tokens
    for chunk in chunks:
        assert chunk % world.page_tokens == 0 or chunk % 32 == 0
        assert chunk >= world.scheduler.min_chunk_tokens


@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(case=cases())
def test_a_larger_chunk_would_break_the_budget(case):
    world, _, time, shard = case
    sizes = chunk_sizes(world, time, shard)
    budget_s = world.scheduler.idle_budget_s / (1 + time.margin)
    until, chunk = sizes[0]
    unit = 128 if chunk >= 128 else 32
    assume(chunk < world.scheduler.max_step_tokens and until <= shard)
    assume(time.stages == 1)  # on more stages smaller chunks may be better
    load = StepLoad(time)
    load.add_chunk(chunk + unit, until)
    assert load.seconds() > budget_s


@given(case=cases(), data=st.data())
def test_spans_tile_the_prompt_with_the_chunks_of_the_schedule(case, data):
    world, _, time, shard = case
    sizes = chunk_sizes(world, time, shard)
    tokens = data.draw(st.integers(1, world.limits.context_tokens))
    pieces = spans(sizes, tokens, shard)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == tokens
    expected = list(split_prompt(rows_of(sizes), tokens, shard))
    walked = [
        (min(chunk, end - at), at)
        for first, end, chunk in pieces
        for at in range(first, end, chunk)
    ]
    assert walked == expected


@given(case=cases())
def test_predictions_of_rows_are_the_exact_stage_recursion(case):
    world, _, time, shard = case
    sizes = chunk_sizes(world, time, shard)
    rows, _ = with_predictions(sizes, time, shard)
    for row in rows:
        assert row.predicted_s == WorkTable(rows, time, shard).solo_s(row.until_tokens)


def test_estimate_of_a_long_prefill_is_close_to_the_recursion_over_its_chunks():
    """Hundreds of chunks: what the spans ignore is at most one chunk a row, so a few per cent."""
    device = tiny_device(memory_bytes=1 << 34)
    world, _ = one_device_world(device, context_tokens=1 << 18)
    for each in candidates(dataclasses.replace(world, topology=tiny_topology(device)))[0]:
        time = step_time(world, each, place(tiny_topology(device), each.parallelism))
        shard = shard_tokens(world, each.parallelism.kvp)
        sizes = chunk_sizes(world, time, shard)
        exact_s = WorkTable(rows_of(sizes), time, shard).solo_s(1 << 18)
        assert estimate_solo_s(sizes, time, 1 << 18, shard) == pytest.approx(exact_s, rel=0.05)


# --- capacity -----------------------------------------------------------------------------------


@given(
    case=cases(),
    chunks=st.lists(st.tuples(st.integers(1, 500), st.integers(0, 5000)), max_size=3),
    decodes=st.lists(st.integers(1, 5000), max_size=3),
    groups=st.integers(1, 4),
)
def test_terms_of_a_stage_sum_to_the_step_time_formula(case, chunks, decodes, groups):
    _, _, time, _ = case
    attention_s = sum(
        max((c * p + c * (c + 1) // 2) * time.pair_s, (c + p) * time.key_s) for c, p in chunks
    )
    decode_s = sum(kv * time.decode_key_s + time.decode_sequence_s for kv in decodes)
    tokens = sum(c for c, _ in chunks) + len(decodes)
    work = Work(
        tokens=tokens,
        samples=len(chunks) + len(decodes),
        chunk_attention_s=attention_s,
        decode_attention_s=decode_s,
        merge_tokens=tokens * (groups - 1),
    )
    for stage in range(time.stages):
        expected = time.stage_s(stage, chunks, decodes, groups)
        assert sum(stage_terms(time, stage, work).values()) == pytest.approx(expected, rel=1e-9)


@given(case=cases(), data=st.data())
def test_work_of_a_prompt_is_the_sum_over_its_chunks(case, data):
    """Exact tokens and merges; attention a bound, as spans take the mean of a maximum."""
    world, _, time, shard = case
    sizes = chunk_sizes(world, time, shard)
    tokens = data.draw(st.integers(1, world.limits.context_tokens))
    work = PromptWork(sizes, time, world.limits.context_tokens, shard).of(tokens)
    expected_tokens = merges = 0
    for chunk, prefix in split_prompt(rows_of(sizes), tokens, shard):
        groups = prefix // shard + 1
        expected_tokens += chunk * groups
        merges += chunk * groups * (groups - 1)
    assert work.tokens == pytest.approx(expected_tokens)
    assert work.merge_tokens == pytest.approx(merges)
    assert work.chunk_attention_s > 0


def test_means_over_a_class_are_those_of_the_quantile_table():
    table = ((0.0, 3), (0.25, 40), (0.9, 900), (1.0, 5000))
    assert mean_tokens(table, 10**9) == pytest.approx(mean_length(table))
    assert mean_tokens(table, 10**9, power=2) == pytest.approx(mean_square_length(table))


@given(case=cases())
def test_capacity_keeps_littles_law_and_every_limit(case):
    world, each, time, shard = case
    try:
        room = footprint(world, each)
    except Infeasible:
        reject()
    sizes = chunk_sizes(world, time, shard)
    rate = capacity(
        world, each.parallelism, time, sizes, pool_tokens=room.pool_tokens, shard_tokens=shard
    )
    need = demand(world, time, sizes, shard)
    per_replica = rate.rps / each.parallelism.replicas
    assert rate.decoding == pytest.approx(per_replica * need.output_tokens * rate.step_s)
    assert rate.decoding <= world.limits.sequences * (1 + 1e-9)
    held = per_replica * need.decode_kv_tokens * rate.step_s
    assert held <= room.pool_tokens * each.parallelism.kvp * (1 + 1e-9)
    assert rate.rps > 0


@given(case=cases())
def test_a_shorter_step_budget_never_adds_capacity(case):
    world, each, time, shard = case
    sizes = chunk_sizes(world, time, shard)
    tight = dataclasses.replace(
        world,
        scheduler=structs.replace(world.scheduler, step_budget_s=world.scheduler.step_budget_s / 2),
    )
    full, half = (
        capacity(one, each.parallelism, time, sizes, pool_tokens=10**12, shard_tokens=shard)
        for one in (world, tight)
    )
    assume("sequence limit" not in {full.bound_by, half.bound_by})  # shorter steps hold fewer
    assert half.rps <= full.rps * (1 + 1e-6)  # bisection stops at 2**-40 of its range


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_collectives_of_a_layer_are_two_rings_over_the_slowest_link(tp):
    """A ring all-reduce of n ranks sends 2 (n - 1) / n of a vector over each link."""
    device = tiny_device()
    world = make_world(
        model=tiny_model(heads=8, kv_heads=8, hidden=64, head_dim=8, ffn=64, vocab=64),
        device=device,
        topology=tiny_topology(device, per_node=tp),
        workload=tiny_workload(),
    )
    candidate = next(
        each for each in candidates(world)[0] if each.parallelism.tp == tp == world.gpus
    )
    (link,) = world.topology.links[:1]
    time = roofline(world, candidate, place(world.topology, candidate.parallelism))
    sent = 2 * (tp - 1) / tp * world.model.hidden * DTYPE_BYTES[world.model.plain_dtype]
    rate = link.bandwidth_bytes_per_s * link.efficiency
    assert time.comm_token_s == pytest.approx(2 * sent / rate)
    assert time.comm_latency_s == pytest.approx(2 * link.latency_s)

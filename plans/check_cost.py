"""Invariants of what a plan costs: step times, chunks, budgets, memory and predictions.

Each function yields (path, message) for every place that breaks it; plans/check.py runs them.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from math import inf

from plans.chunks import (
    ChunkRow,
    WorkTable,
    add_sharded_chunk,
    least_solo_s,
    split_prompt,
)
from plans.model import DTYPE_BYTES
from plans.plan import Plan, Replay
from plans.steptime import Knot, StepLoad

MOST_CHUNKS = 1 << 20
"""Of one prompt; checks and predictions visit each. 27m tokens in chunks of 32 have fewer."""
LITTLE = 0.01
"""Relative difference that is allowed between the two sides of Little's law."""
SOLO_LENGTHS = 64
"""Lengths of the workload at which a prompt's least time is compared with its time alone."""
TOLERANCE = 1e-6
"""Relative: far above the rounding of 1e5 summed terms (1e-11), far below any meaning."""


def stage_layers(plan: Plan) -> Iterator[tuple[str, str]]:
    lengths = tuple(end - first for first, end in plan.stages)
    if plan.step_time.stage_layers != lengths:
        yield (
            "step_time.stage_layers",
            f"{list(plan.step_time.stage_layers)}, the stages hold {list(lengths)} layers",
        )


def _rising(table: tuple[Knot, ...], path: str) -> Iterator[tuple[str, str]]:
    for row, (before, knot) in enumerate(pairwise(table), start=1):
        if knot.at <= before.at:
            yield f"{path}[{row}].at", f"{knot.at} does not exceed the row before it ({before.at})"
        if knot.seconds < before.seconds:
            yield (
                f"{path}[{row}].seconds",
                f"{knot.seconds} is below the row before it ({before.seconds})",
            )


def tables(plan: Plan) -> Iterator[tuple[str, str]]:
    if not plan.step_time.matmul:
        yield "step_time.matmul", "is empty, matrix products take time"
    yield from _rising(plan.step_time.matmul, "step_time.matmul")
    yield from _rising(plan.step_time.head, "step_time.head")


def chunks(plan: Plan) -> Iterator[tuple[str, str]]:
    rows, most = plan.prefill.chunks, plan.scheduler.max_step_tokens
    if not rows or rows[-1].until_tokens < plan.limits.context_tokens:
        reach = rows[-1].until_tokens if rows else 0
        yield (
            "prefill.chunks",
            f"end at {reach} tokens, limits.context_tokens is {plan.limits.context_tokens}",
        )
    if (count := _chunks_at_most(rows)) > MOST_CHUNKS:
        yield "prefill.chunks", f"{count} chunks in the longest prompt; at most {MOST_CHUNKS}"
    for row, each in enumerate(rows):
        if each.chunk_tokens > most:
            yield (
                f"prefill.chunks[{row}].chunk_tokens",
                f"{each.chunk_tokens} exceeds scheduler.max_step_tokens {most}",
            )
    for row, (before, each) in enumerate(pairwise(rows), start=1):
        if each.until_tokens <= before.until_tokens:
            yield (
                f"prefill.chunks[{row}].until_tokens",
                f"{each.until_tokens} does not exceed the row before it ({before.until_tokens})",
            )
        if each.chunk_tokens > before.chunk_tokens:
            yield (
                f"prefill.chunks[{row}].chunk_tokens",
                (
                    f"{each.chunk_tokens} exceeds the row before it ({before.chunk_tokens}); "
                    "chunks never grow with the prefix"
                ),
            )


def _chunks_at_most(rows: tuple[ChunkRow, ...]) -> int:
    """Chunks of a prompt that ends where the rows end, not counting cuts between KV shards."""
    starts = (0, *(each.until_tokens for each in rows))
    return sum(
        -(-(each.until_tokens - start) // each.chunk_tokens)
        for start, each in zip(starts, rows, strict=False)
    )


def chunk_seconds(plan: Plan) -> Iterator[tuple[str, str]]:
    work = WorkTable(plan.prefill.chunks, plan.step_time, plan.kv.tokens_per_kvp_shard)
    for row, each in enumerate(plan.prefill.chunks):
        solo_s = work.solo_s(each.until_tokens)
        if abs(each.predicted_s - solo_s) > TOLERANCE * solo_s:
            yield (
                f"prefill.chunks[{row}].predicted_s",
                f"{each.predicted_s}, but step_time gives {solo_s} for {each.until_tokens} tokens",
            )


def chunk_budget(plan: Plan) -> Iterator[tuple[str, str]]:
    """The worst chunk of each row, summed over the stages, over-estimated by the margin."""
    rows, shard = plan.prefill.chunks, plan.kv.tokens_per_kvp_shard
    worst = dict.fromkeys(range(len(rows)), (0.0, 0, 0))
    row = 0
    for tokens, prefix in split_prompt(rows, rows[-1].until_tokens, shard):
        while prefix >= rows[row].until_tokens:
            row += 1
        if tokens <= plan.scheduler.min_chunk_tokens:
            continue
        load = StepLoad(plan.step_time)  # of the slowest group: an older shard is full
        add_sharded_chunk(load, tokens, prefix, shard, behind=int(prefix >= shard))
        worst[row] = max(worst[row], (load.seconds(), tokens, prefix))
    budget_s, margin = plan.scheduler.idle_budget_s, plan.step_time.margin
    for row, (seconds, tokens, prefix) in worst.items():
        if seconds * (1 + margin) > budget_s * (1 + TOLERANCE):
            yield (
                f"prefill.chunks[{row}].chunk_tokens",
                (
                    f"{tokens} tokens behind {prefix} take {seconds:.6g} s x (1 + margin {margin}) "
                    f"= {seconds * (1 + margin):.6g} s, scheduler.idle_budget_s is {budget_s}"
                ),
            )


def budgets(plan: Plan) -> Iterator[tuple[str, str]]:
    how = plan.scheduler
    if how.step_budget_s > how.idle_budget_s:
        yield (
            "scheduler.step_budget_s",
            f"{how.step_budget_s} exceeds idle_budget_s {how.idle_budget_s}",
        )
    if how.min_chunk_tokens > how.max_step_tokens:
        yield (
            "scheduler.min_chunk_tokens",
            f"{how.min_chunk_tokens} exceeds max_step_tokens {how.max_step_tokens}",
        )


def policy(plan: Plan) -> Iterator[tuple[str, str]]:
    # Which names exist is the runtime's to say; here only that it can be one: NAME@engine,key=x.
    if not re.fullmatch(r"[a-z][a-z0-9-]*(@[a-z0-9-]+)?(,\w+=[\w.-]+)*", plan.scheduler.policy):
        yield "scheduler.policy", f"{plan.scheduler.policy!r} is no name of a policy, such as lars"


def page_bytes(plan: Plan) -> int:
    """Bytes of one KV page on the rank that holds most layers."""
    layers = max(end - first for first, end in plan.stages)
    tp, kv = plan.parallelism.tp, plan.kv
    return layers * plan.model.rank_page_bytes(tp, kv.page_tokens, kv.dtype)


def kv_shards(plan: Plan) -> Iterator[tuple[str, str]]:
    kv, kvp, wanted = plan.kv, plan.parallelism.kvp, plan.limits.context_tokens
    if kv.tokens_per_kvp_shard % kv.page_tokens:
        yield (
            "kv.tokens_per_kvp_shard",
            f"{kv.tokens_per_kvp_shard} is no multiple of page_tokens {kv.page_tokens}",
        )
    if kvp * kv.tokens_per_kvp_shard < wanted:
        yield (
            "kv.tokens_per_kvp_shard",
            (
                f"kvp {kvp} x {kv.tokens_per_kvp_shard} = {kvp * kv.tokens_per_kvp_shard} tokens, "
                f"limits.context_tokens is {wanted}"
            ),
        )


def kv_pool(plan: Plan) -> Iterator[tuple[str, str]]:
    kv = plan.kv
    wanted = min(kv.tokens_per_kvp_shard, plan.limits.context_tokens)
    if kv.pages_per_rank * kv.page_tokens < wanted:
        yield (
            "kv.pages_per_rank",
            (
                f"{kv.pages_per_rank} pages x {kv.page_tokens} tokens = "
                f"{kv.pages_per_rank * kv.page_tokens}, one request needs {wanted} in a group"
            ),
        )


def memory_sum(plan: Plan) -> Iterator[tuple[str, str]]:
    memory, device_bytes = plan.memory, plan.topology.device_memory_bytes
    parts = ("weights", "activations", "reserved", "kv", "free")
    sizes = [getattr(memory, f"{part}_bytes") for part in parts]
    if sum(sizes) != memory.capacity_bytes:
        terms = " + ".join(f"{part} {size}" for part, size in zip(parts, sizes, strict=True))
        yield "memory", f"{terms} = {sum(sizes)} bytes, capacity_bytes is {memory.capacity_bytes}"
    if memory.capacity_bytes != device_bytes:
        yield (
            "memory.capacity_bytes",
            f"{memory.capacity_bytes}, topology.device_memory_bytes is {device_bytes}",
        )


def kv_bytes(plan: Plan) -> Iterator[tuple[str, str]]:
    wanted = plan.kv.pages_per_rank * page_bytes(plan)
    if plan.memory.kv_bytes != wanted:
        yield (
            "memory.kv_bytes",
            (
                f"{plan.memory.kv_bytes}, but pages_per_rank {plan.kv.pages_per_rank} x "
                f"{page_bytes(plan)} bytes a page = {wanted}"
            ),
        )


def weights(plan: Plan) -> Iterator[tuple[str, str]]:
    """A lower bound, since norms, biases and repeated KV heads come on top."""
    model, tp = plan.model, plan.parallelism.tp
    ends_bytes = model.embedding_parameters * DTYPE_BYTES[model.plain_dtype]

    def stage_bytes(first: int, end: int) -> int:
        others = (end - first) * model.other_layer_parameters()
        products = model.stage_parameters(first, end) - others
        ends = (first == 0) + (end == model.layers)  # embedding, head
        if ends == 2 and model.tie_embeddings:
            ends = 1
        return (products * DTYPE_BYTES[model.weight_dtype] + ends * ends_bytes) // tp

    least = max(stage_bytes(first, end) for first, end in plan.stages)
    if plan.memory.weights_bytes < least:
        yield (
            "memory.weights_bytes",
            (
                f"{plan.memory.weights_bytes}, but the matrices of a stage, embedding and head "
                f"included, have {least} bytes at tp {tp}"
            ),
        )


def predicted(plan: Plan) -> Iterator[tuple[str, str]]:
    expected = plan.predicted
    for field in ("ttft_s", "tbt_s"):
        for key in getattr(expected, field):
            if not re.fullmatch(r"[1-9][0-9]*", key) or int(key) > plan.limits.context_tokens:
                yield (
                    f'predicted.{field}["{key}"]',
                    f"is no token count up to limits.context_tokens {plan.limits.context_tokens}",
                )
    for field in ("capacity_rps", "error_band"):
        if getattr(expected, field) < 0:
            yield f"predicted.{field}", f"{getattr(expected, field)} is negative"
    for term, origin in expected.provenance.items():
        if not re.fullmatch(r"measured|interpolated|formula|extrapolated by \S+", origin):
            yield (
                f'predicted.provenance["{term}"]',
                f"{origin!r} is none of measured, interpolated, formula, extrapolated by x",
            )


def predicted_bounds(plan: Plan) -> Iterator[tuple[str, str]]:
    """No prediction for a lone request is below what the plan's own step times add up to."""
    shard, time = plan.kv.tokens_per_kvp_shard, plan.step_time
    work = WorkTable(plan.prefill.chunks, time, shard)
    for key, seconds in plan.predicted.ttft_s.items():
        least_s = work.solo_s(int(key))
        if seconds < least_s * (1 - TOLERANCE):
            yield f'predicted.ttft_s["{key}"]', f"{seconds} is below its work of {least_s} s"
    for key, seconds in plan.predicted.tbt_s.items():
        context = int(key)
        groups = -(-context // shard)
        least_s = time.step_s(decode_kv_tokens=[min(context, shard)], kvp_groups=groups)
        if seconds < least_s * (1 - TOLERANCE):
            yield f'predicted.tbt_s["{key}"]', f"{seconds} is below one step of {least_s} s"


def replay(plan: Plan) -> Iterator[tuple[str, str]]:
    """Little's law within 1 %, shares that are shares, percentiles that rise, nothing from nothing.

    Arrivals beyond the capacity are allowed: the plan then says how it does when overloaded.
    """
    point = plan.predicted.replay
    if point is None:
        if plan.predicted.goodput_rps is not None:
            yield "predicted.goodput_rps", "is given without predicted.replay, which it comes from"
        return
    if plan.predicted.goodput_rps != point.goodput_rps:
        yield "predicted.goodput_rps", f"is not predicted.replay.goodput_rps {point.goodput_rps}"
    for field in ("utilisation", "attainment"):
        if not 0 <= getattr(point, field) <= 1:
            yield f"predicted.replay.{field}", f"{getattr(point, field)} is no share"
    if not 0 <= point.goodput_rps <= point.arrival_rps * (1 + TOLERANCE):
        yield (
            "predicted.replay.goodput_rps",
            f"{point.goodput_rps} is not within 0 and arrival_rps {point.arrival_rps}",
        )
    right = point.arrivals_per_s * point.time_in_system_mean_s
    if abs(point.in_system_mean - right) > LITTLE * max(point.in_system_mean, right):
        yield (
            "predicted.replay.in_system_mean",
            (
                f"{point.in_system_mean}, but arrivals_per_s {point.arrivals_per_s} x "
                f"time_in_system_mean_s {point.time_in_system_mean_s} = {right} (Little's law)"
            ),
        )
    if point.least_slowdown is not None:
        least = _least_slowdown(plan)
        if point.least_slowdown < least * (1 - TOLERANCE):
            yield (
                "predicted.replay.least_slowdown",
                (
                    f"a prompt starts in {point.least_slowdown:.3f} of its time alone; no cut of it"
                    f" is faster than {least:.3g}"
                ),
            )
    yield from _rising_percentiles(point)


def _least_slowdown(plan: Plan) -> float:
    """Least TTFT under load over that alone: 1 but for prompts that other chunks suit better.

    The schedule is best for the mix of lengths and not for each, so a prompt that a busy step cuts
    smaller may start sooner than alone; never sooner than any cut of it could (least_solo_s).
    """
    shard, time = plan.kv.tokens_per_kvp_shard, plan.step_time
    work = WorkTable(plan.prefill.chunks, time, shard)
    context = plan.limits.context_tokens
    tables = [each.input_tokens for each in plan.workload.classes]
    low = max(min(context, *(table[0][1] for table in tables)), 1)
    high = max(min(max(table[-1][1] for table in tables), context), low)
    lengths = {
        round(low * (high / low) ** (step / (SOLO_LENGTHS - 1))) for step in range(SOLO_LENGTHS)
    }
    shares = [least_solo_s(time, each, shard) / work.solo_s(each) for each in sorted(lengths)]
    return min(1.0, *shares)


def _rising_percentiles(point: Replay) -> Iterator[tuple[str, str]]:
    for field in ("ttft_s", "tbt_s"):
        for name, row in getattr(point, field).items():
            values = [row.p50, row.p90, row.p99, row.max]
            known = [inf if value is None else value for value in values]
            if known != sorted(known):
                yield f"predicted.replay.{field}.{name}", f"percentiles {values} do not rise"

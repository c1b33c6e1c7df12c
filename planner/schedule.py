"""The chunk schedule of a plan: how large a chunk a lone prompt may take at each prefix.

Rows by doubling prefix. The chunk of a row is the largest whose predicted step, summed over the
stages and with the margin on top, stays within idle_budget_s at the row's end, where attention is
dearest; whole pages while a page fits, then multiples of 32. So early chunks are large, late ones
small, and a step takes about equally long everywhere (arXiv 2409.17264v5, section 3.2).
"""

from bisect import bisect_right

from planner.world import World
from plans.chunks import ChunkRow, WorkTable, add_sharded_chunk
from plans.steptime import StepLoad, StepTime

FIRST_ROW_TOKENS = 8192
FINE_TOKENS = 32
"""Granularity below a page: half of the smallest tensor-core tile."""


def chunk_sizes(world: World, time: StepTime, shard_tokens: int) -> tuple[tuple[int, int], ...]:
    """(until_tokens, chunk_tokens) rows; neighbours of equal chunks are one row."""
    context = world.limits.context_tokens
    most = world.scheduler.max_step_tokens
    rows: list[tuple[int, int]] = []
    until = 0
    while until < context:
        until = min(max(2 * until, FIRST_ROW_TOKENS), context)
        most = min(most, _chunk(world, time, shard_tokens, until, most))
        if rows and rows[-1][1] == most:
            rows.pop()
        rows.append((until, most))
    return tuple(rows)


def _chunk(world: World, time: StepTime, shard_tokens: int, until: int, most: int) -> int:
    budget_s = world.scheduler.idle_budget_s / (1 + time.margin)
    fits = most
    newest = min(until, shard_tokens)  # the most that the newest shard holds within the row
    groups = (until - 1) // shard_tokens + 1
    empty = StepLoad(time)
    fits = min(fits, empty.largest_chunk(newest, budget_s, most, kvp_groups=groups))
    if groups > 1:
        older = empty.largest_chunk(shard_tokens, budget_s, most, kvp_groups=groups, keys_only=True)
        fits = min(fits, older)
    unit = world.page_tokens if fits >= world.page_tokens else FINE_TOKENS
    return max(fits // unit * unit, world.scheduler.min_chunk_tokens)


def least_chunk_step_s(world: World, time: StepTime, shard_tokens: int) -> float:
    """Predicted step of the smallest chunk at the context limit, on the slowest group."""
    tokens = world.scheduler.min_chunk_tokens
    prefix = max(world.limits.context_tokens - tokens, 0)
    return max(
        sharded_chunk_s(
            time, stage=None, tokens=tokens, prefix=prefix, shard_tokens=shard_tokens, behind=behind
        )
        for behind in range(min(2, prefix // shard_tokens + 1))
    )


def sharded_chunk_s(
    time: StepTime,
    *,
    stage: int | None,
    tokens: int,
    prefix: int,
    shard_tokens: int,
    behind: int,
) -> float:
    """Seconds of one chunk on one stage (None: all) in the group `behind` the newest one."""
    load = StepLoad(time, stage=stage)
    add_sharded_chunk(load, tokens, prefix, shard_tokens, behind=behind)
    return load.seconds()


def with_predictions(
    sizes: tuple[tuple[int, int], ...], time: StepTime, shard_tokens: int
) -> tuple[tuple[ChunkRow, ...], WorkTable]:
    """The rows with the exact time of a lone prompt as long as each reaches, and their table."""
    blank = rows_of(sizes)
    table = WorkTable(blank, time, shard_tokens)
    rows = tuple(
        ChunkRow(until_tokens=until, chunk_tokens=chunk, predicted_s=table.solo_s(until))
        for until, chunk in sizes
    )
    return rows, table


def rows_of(sizes: tuple[tuple[int, int], ...]) -> tuple[ChunkRow, ...]:
    """Rows whose time is not known yet."""
    return tuple(
        ChunkRow(until_tokens=until, chunk_tokens=chunk, predicted_s=0.0) for until, chunk in sizes
    )


def spans(
    sizes: tuple[tuple[int, int], ...], tokens: int, shard_tokens: int
) -> list[tuple[int, int, int]]:
    """(first, end, chunk) of the stretches of a prompt with one chunk size and one newest shard."""
    ends = [until for until, _ in sizes]
    found = []
    first = 0
    while first < tokens:
        row = min(bisect_right(ends, first), len(sizes) - 1)
        edge = (first // shard_tokens + 1) * shard_tokens
        end = min(edge, tokens, ends[row] if ends[row] > first else tokens)
        found.append((first, end, sizes[row][1]))
        first = end
    return found


def estimate_solo_s(
    sizes: tuple[tuple[int, int], ...], time: StepTime, tokens: int, shard_tokens: int
) -> float:
    """Seconds to the first token of a lone prompt, without walking its chunks.

    The chunks of a span rise linearly in time, so its midpoint times their number is their sum; the
    slowest stage sets the pace and the last chunk still passes the others. Within a few per cent of
    WorkTable.solo_s (a test holds it to that), at a thousandth of the cost.
    """
    pace_s = last_s = last_slowest_s = 0.0
    for first, end, chunk in spans(sizes, tokens, shard_tokens):
        tokens_each = min(chunk, end - first)
        count = (end - first) / tokens_each
        stage_s = _stage_seconds(time, tokens_each, (first + end - tokens_each) // 2, shard_tokens)
        pace_s += count * max(stage_s)
        last_s, last_slowest_s = sum(stage_s), max(stage_s)
    return pace_s + last_s - last_slowest_s


def _stage_seconds(time: StepTime, tokens: int, prefix: int, shard_tokens: int) -> list[float]:
    """Time of one chunk on each stage, the slowest group of each; equal stages computed once."""
    behinds = range(min(2, prefix // shard_tokens + 1))
    known: dict[tuple[int, bool], float] = {}
    seconds = []
    for stage, layers in enumerate(time.stage_layers):
        kind = (layers, stage == time.stages - 1)
        if kind not in known:
            known[kind] = max(
                sharded_chunk_s(
                    time,
                    stage=stage,
                    tokens=tokens,
                    prefix=prefix,
                    shard_tokens=shard_tokens,
                    behind=behind,
                )
                for behind in behinds
            )
        seconds.append(known[kind])
    return seconds

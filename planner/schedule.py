"""The chunk schedule of a plan: which chunk a lone prompt takes at each prefix.

Rows by doubling prefix. A chunk may take the idle budget at most: the predicted step, summed over
the stages, with the margin on top, at the row's end, where attention is dearest. Below that bound
smaller chunks cost fixed time and weight reads, and larger ones leave stages idle while the first
chunk fills the pipeline and the last one drains it. The sizes chosen minimise

    sum over rows of  share x W(until) / W(until) with the largest chunks
    W(n)  = sum of the chunks' times on the slowest stage + the most that one takes on the others
    share = of the workload's prompts that end in the row, or a hundredth where fewer do

by dynamic programming over rows and a ladder of sizes, never rising with the prefix: exact for this
sum (a test compares it with every schedule). So early chunks are large, late ones small, and a step
takes about equally long everywhere (arXiv 2409.17264v5, section 3.2); with more stages they shrink.
"""

from bisect import bisect_right
from itertools import accumulate, pairwise

from planner.world import World
from plans.chunks import ChunkRow, WorkTable, add_sharded_chunk
from plans.steptime import StepLoad, StepTime
from plans.workload import Quantile, Workload

FIRST_ROW_TOKENS = 8192
"""End of the first row on one stage; on p stages a p-th of it, since p chunks fill them."""
LEAST_ROW_TOKENS = 512
ROUNDING = 1e-9
"""Relative, of knots on one straight line."""
LEAST_SHARE = 0.01
COARSE_TOKENS = 128
"""Granularity from here on: the query tile of the attention kernels, and the largest page."""
FINE_TOKENS = 32
"""Granularity below that: half of the smallest tensor-core tile."""
STEPS_PER_DOUBLING = 4
"""Rungs of the ladder of sizes between a power of two and the next, where granularity allows."""


def chunk_sizes(world: World, time: StepTime, shard_tokens: int) -> tuple[tuple[int, int], ...]:
    """(until_tokens, chunk_tokens) rows; neighbours of equal chunks are one row."""
    untils = row_ends(world.limits.context_tokens, time.stages)
    largest = []
    most = world.scheduler.max_step_tokens
    for until in untils:
        most = min(most, _largest(world, time, shard_tokens, until, most))
        largest.append(most)
    if time.stages == 1 and _cheaper_by_size(time, world.scheduler.max_step_tokens):
        best = largest  # nothing to fill or drain, and fixed time spreads over more tokens
    else:
        shares = ending_shares(world.workload, untils)
        best = cheapest(time, shard_tokens, untils, largest, shares)
    rows: list[tuple[int, int]] = []
    for until, chunk in zip(untils, best, strict=True):
        if rows and rows[-1][1] == chunk:
            rows.pop()
        rows.append((until, chunk))
    return tuple(rows)


def row_ends(context: int, stages: int = 1) -> list[int]:
    """Prefixes at which rows end: doubling, the last one the context limit."""
    first = 1 << (FIRST_ROW_TOKENS // stages).bit_length() - 1
    first = max(first, LEAST_ROW_TOKENS)
    untils: list[int] = []
    until = 0
    while until < context:
        until = min(max(2 * until, first), context)
        untils.append(until)
    return untils


def ending_shares(workload: Workload, untils: list[int]) -> list[float]:
    """Share of the workload's prompts that end in each row, the longest ones in the last."""
    below = [
        sum(each.share * _share_below(each.input_tokens, until) for each in workload.classes)
        for until in untils[:-1]
    ]
    ends = [0.0, *below, sum(each.share for each in workload.classes)]
    return [max(high - low, LEAST_SHARE) for low, high in pairwise(ends)]


def _share_below(table: tuple[Quantile, ...], tokens: int) -> float:
    """Share of the lengths of a quantile table that are at most `tokens`."""
    if tokens < table[0][1]:
        return 0.0
    for (low_q, low), (high_q, high) in pairwise(table):
        if tokens < high:
            return low_q + (tokens - low) / (high - low) * (high_q - low_q)
    return 1.0


def ladder(most: int) -> list[int]:
    """Chunk sizes to choose from, largest first: `most`, then rungs of the grid below it."""
    rungs = {most}
    power = FINE_TOKENS
    while power < most:
        unit = max(power // STEPS_PER_DOUBLING, min(COARSE_TOKENS, power))
        rungs |= set(range(power, min(2 * power, most), unit))
        power *= 2
    return sorted(rungs, reverse=True)


def cheapest(
    time: StepTime,
    shard_tokens: int,
    untils: list[int],
    largest: list[int],
    shares: list[float],
) -> list[int]:
    """The chunk of each row by dynamic programming; `largest` never rises.

    No chunk is longer than its row, so that the end of a row cuts none; the last row has no other
    behind it.
    """
    rows = [*(until - first for first, until in pairwise([0, *untils[:-1]])), largest[-1]]
    largest = list(accumulate(map(min, largest, rows), min))
    reference = row_costs(time, shard_tokens, untils, [[most] for most in largest])
    done = 0.0
    weights = []
    for ((pace, drain),), share in zip(reference, shares, strict=True):
        done += pace
        weights.append(share / (done + drain))
    sizes = ladder(largest[0])
    allowed = [[size for size in {*sizes, most} if size <= most] for most in largest]
    allowed = [sorted(row, reverse=True) for row in allowed]
    costs = row_costs(time, shard_tokens, untils, allowed)
    best: list[tuple[float, list[int]]] = [(0.0, [])]
    bound = [allowed[0][0]]  # smallest chunk so far, of each partial schedule in `best`
    for row, (choices, priced) in enumerate(zip(allowed, costs, strict=True)):
        later = sum(weights[row:])
        grown, limits = [], []
        for size, (pace, drain) in zip(choices, priced, strict=True):
            sofar = min(
                (partial for partial, limit in zip(best, bound, strict=True) if size <= limit),
                key=lambda partial: partial[0],
                default=None,
            )
            if sofar is not None:
                grown.append((sofar[0] + pace * later + drain * weights[row], [*sofar[1], size]))
                limits.append(size)
        best, bound = grown, limits
    return min(best, key=lambda partial: partial[0])[1]


def row_costs(
    time: StepTime, shard_tokens: int, untils: list[int], choices: list[list[int]]
) -> list[list[tuple[float, float]]]:
    """(seconds on the slowest stage over the row, most seconds that a chunk takes elsewhere)."""
    found = []
    first = 0
    for until, sizes in zip(untils, choices, strict=True):
        found.append([_row_cost(time, shard_tokens, first, until, size) for size in sizes])
        first = until
    return found


def _row_cost(
    time: StepTime, shard_tokens: int, first: int, until: int, size: int
) -> tuple[float, float]:
    pace_s = drain_s = 0.0
    edge = min(max(first, shard_tokens), until)  # behind it an older shard, always full, decides
    for low, high in ((first, edge), (edge, until)):
        whole, rest = divmod(high - low, size)
        for count, tokens, end in ((whole, size, high - rest), (1, rest, high)):
            if count and tokens:
                begin = low if tokens == size else end - rest
                prefix = (begin + end - tokens) // 2  # of the middle one: times rise linearly
                stage_s = _stage_seconds(time, tokens, prefix, shard_tokens)
                slowest_s = max(stage_s)
                pace_s += count * slowest_s
                # a shorter rest waits behind the chunk before it on every stage
                drain_s = max(drain_s, sum(stage_s) - slowest_s)
    return pace_s, drain_s


def _cheaper_by_size(time: StepTime, most: int) -> bool:
    """Whether no table has a point where a larger step costs more a token than a smaller one."""
    rows = [(knot.at, knot.seconds / knot.at) for knot in time.matmul if knot.at <= most]
    return all(later[1] <= earlier[1] * (1 + ROUNDING) for earlier, later in pairwise(rows))


def _largest(world: World, time: StepTime, shard_tokens: int, until: int, most: int) -> int:
    """Largest chunk within the idle budget at a row's end; the minimal one where none is."""
    budget_s = world.scheduler.idle_budget_s / (1 + time.margin)
    newest = min(until, shard_tokens)  # the most that the newest shard holds within the row
    groups = (until - 1) // shard_tokens + 1
    empty = StepLoad(time)
    fits = min(most, empty.largest_chunk(newest, budget_s, most, kvp_groups=groups))
    if groups > 1:
        older = empty.largest_chunk(shard_tokens, budget_s, most, kvp_groups=groups, keys_only=True)
        fits = min(fits, older)
    unit = COARSE_TOKENS if fits >= COARSE_TOKENS else FINE_TOKENS
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
    slowest stage sets the pace, and the longest chunk fills or drains the others. Within a few per
    cent of WorkTable.solo_s (a test holds it to that), at a thousandth of the cost.
    """
    pace_s = drain_s = 0.0
    for first, end, chunk in spans(sizes, tokens, shard_tokens):
        tokens_each = min(chunk, end - first)
        count = (end - first) / tokens_each
        stage_s = _stage_seconds(time, tokens_each, (first + end - tokens_each) // 2, shard_tokens)
        pace_s += count * max(stage_s)
        drain_s = max(drain_s, sum(stage_s) - max(stage_s))
    return pace_s + drain_s


def _stage_seconds(
    time: StepTime, tokens: int, prefix: int, shard_tokens: int
) -> tuple[float, ...]:
    """Time of one chunk on each stage, in its slowest group: an older shard where there is one."""
    load = StepLoad(time)
    add_sharded_chunk(load, tokens, prefix, shard_tokens, behind=int(prefix >= shard_tokens))
    return load.stages_s()

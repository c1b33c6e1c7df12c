"""The chunk schedule of a plan, and the work of a prefill that follows it.

A row says: while the prefix is shorter than `until_tokens`, a lone request takes chunks of
`chunk_tokens`. The packer only ever shrinks them. A chunk never crosses a KVP shard boundary.
"""

from bisect import bisect_right
from collections.abc import Iterator
from typing import Annotated

from msgspec import Meta, Struct

from plans.model import Count
from plans.steptime import StepLoad, StepTime


class ChunkRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prefix range of the schedule."""

    until_tokens: Count
    """The row holds for prefixes below this; rows rise, the last reaches the context limit."""
    chunk_tokens: Count
    predicted_s: Annotated[float, Meta(ge=0)]
    """Predicted time to the first token of a lone prompt of until_tokens tokens."""


class Prefill(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How prompts are cut when nothing else runs."""

    chunks: tuple[ChunkRow, ...]


def chunk_at(rows: tuple[ChunkRow, ...], prefix_tokens: int) -> int:
    """Chunk of the schedule at a prefix, cut at the row's end; the last row holds beyond its own.

    The cut keeps a lone prompt at the chunks that its predicted time is made of.
    """
    for row in rows:  # a handful
        if prefix_tokens < row.until_tokens:
            return min(row.chunk_tokens, row.until_tokens - prefix_tokens)
    return rows[-1].chunk_tokens


def _next_chunk(rows: tuple[ChunkRow, ...], prefix: int, shard_tokens: int) -> int:
    """Chunk of a long prompt at a prefix: the row's size, cut at row and shard edges."""
    row = bisect_right(rows, prefix, key=lambda each: each.until_tokens)
    chunk = rows[min(row, len(rows) - 1)].chunk_tokens
    if row < len(rows):
        chunk = min(chunk, rows[row].until_tokens - prefix)
    return min(chunk, (prefix // shard_tokens + 1) * shard_tokens - prefix)


def split_prompt(
    rows: tuple[ChunkRow, ...], tokens: int, shard_tokens: int
) -> Iterator[tuple[int, int]]:
    """(chunk, prefix) tokens of a lone prompt, in order; chunks stop at row and shard edges."""
    prefix = 0
    while prefix < tokens:
        chunk = min(_next_chunk(rows, prefix, shard_tokens), tokens - prefix)
        yield chunk, prefix
        prefix += chunk


def add_sharded_chunk(
    load: StepLoad, tokens: int, prefix_tokens: int, shard_tokens: int, *, behind: int = 0
) -> None:
    """Adds a chunk to the load of the group that is `behind` shards before the newest one.

    Shard i holds tokens [i x shard_tokens, (i + 1) x shard_tokens); the newest one is causal and
    written to, older ones are full and only read (design: KVP).
    """
    newest = prefix_tokens // shard_tokens
    if behind == 0:
        load.add_chunk(tokens, prefix_tokens - newest * shard_tokens, kvp_groups=newest + 1)
    else:
        load.add_chunk(tokens, shard_tokens, kvp_groups=newest + 1, keys_only=True)


QUERY_ROWS = 128
"""Tokens times query heads of a KV head that chunk attention takes at a time, on Hopper."""


def query_tile(group: int) -> int:
    """Tokens of a tile of queries, for so many query heads of a KV head: a power of two."""
    return max(1 << (QUERY_ROWS // group).bit_length() >> 1, 1)


def idle_queries(tile: int, prefix: int, tokens: int) -> int:
    """Queries that a chunk's tiles have room for and no token fills.

    Tiles begin at multiples of their size, but for the only one of a chunk that fits into one.
    """
    if tokens <= tile:
        return tile - tokens
    return prefix % tile + -(prefix + tokens) % tile


def least_solo_s(step_time: StepTime, tokens: int, shard_tokens: int) -> float:
    """Seconds that no way of cutting a prompt goes below, nor company in its steps.

    The stage of most layers multiplies every token at the cheapest rate of its table, once at
    least, and looks at every causal pair in the group that has most of them; the other stages see
    one step at least. A chunk's share of a step that others fill is no less than that rate.
    """
    matmul = step_time.matmul
    beyond = 0.0  # a table of one row is flat; others go on with their last slope
    if len(matmul) > 1:
        before, last = matmul[-2:]
        beyond = (last.seconds - before.seconds) / (last.at - before.at)
    rate_s = min(beyond, *(knot.seconds / knot.at for knot in matmul)) if matmul else 0.0
    first_s = matmul[0].seconds if matmul else 0.0
    longest = min(tokens, shard_tokens)
    pairs = longest * longest / 2 + max(tokens - longest, 0) * shard_tokens
    layer_s = max(rate_s * tokens, first_s) + pairs * step_time.pair_s
    layers = max(step_time.stage_layers)
    others = sum(step_time.stage_layers) - layers
    return step_time.stages * step_time.overhead_s + layers * layer_s + others * first_s


class WorkTable:
    """Predicted seconds of lone prefills: W(n) of LARS, by the stage recursion.

    Chunk i enters stage k when chunk i left stage k-1 and chunk i-1 left stage k; with p stages it
    enters the first no sooner than chunk i-p left the last, since no more steps are in flight than
    there are stages. The boundaries of full chunks are computed once, up to the longest prompt
    asked for; a query adds one chunk.
    """

    def __init__(self, rows: tuple[ChunkRow, ...], step_time: StepTime, shard_tokens: int) -> None:
        """Empty table; rows and shard_tokens are the plan's."""
        self._rows = rows
        self._time = step_time
        self._shard_tokens = shard_tokens
        self._ends = [0]  # prefix at each boundary
        self._left = [tuple(0.0 for _ in range(step_time.stages))]  # when it left each stage

    def _advance(self, at: int, tokens: int) -> tuple[float, ...]:
        """When the chunk behind boundary `at` leaves each stage."""
        left, prefix = self._left[at], self._ends[at]
        shard = self._shard_tokens
        load = StepLoad(self._time)
        # All older shards are alike, and never faster than the newest: they are full.
        add_sharded_chunk(load, tokens, prefix, shard, behind=int(prefix >= shard))
        after = []
        before = at + 1 - len(left)
        arrival = self._left[before][-1] if before > 0 else 0.0
        for free, seconds in zip(left, load.stages_s(), strict=True):
            arrival = max(arrival, free) + seconds
            after.append(arrival)
        return tuple(after)

    def solo_s(self, tokens: int) -> float:
        """Seconds to the first token of a lone prompt; 0 for no tokens."""
        if tokens <= 0:
            return 0.0
        while self._ends[-1] < tokens:
            prefix = self._ends[-1]
            chunk = _next_chunk(self._rows, prefix, self._shard_tokens)
            self._left.append(self._advance(len(self._left) - 1, chunk))
            self._ends.append(prefix + chunk)
        at = bisect_right(self._ends, tokens) - 1
        rest = tokens - self._ends[at]
        return (self._advance(at, rest) if rest else self._left[at])[-1]

    def remaining_s(self, tokens: int, done_tokens: int) -> float:
        """Seconds of a prefill that are left after done_tokens: W(tokens) - W(done), at least 0."""
        return max(self.solo_s(tokens) - self.solo_s(done_tokens), 0.0)

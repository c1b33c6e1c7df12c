"""The only step-time formula: how long one step of one stage takes, in seconds.

The planner fills the coefficients, the simulator sleeps by them, LARS and the packer decide by
them.

    stage_s = overhead
            + layers x ( matmul(T) + sum max(pairs x pair_s, keys x key_s)        chunk attention
                         + sum kv x decode_key_s + sequences x decode_sequence_s  decode attention
                         + comm_latency + T x comm_token_s                        tensor parallel
                         + merge_latency + T x (groups - 1) x merge_token_s )     KV parallel
            + hop(T)  on every stage but the last,   head(samples)  on the last

T is all tokens of the step, pairs = tokens x prefix + tokens (tokens + 1) / 2 and keys = prefix +
tokens of one chunk. All layers are alike, so every coefficient is for one layer and the sum over
stages has the same form as one stage: that is what makes the largest feasible chunk a closed form.
Monotone in every argument by construction (tables rise, coefficients are not negative).
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Literal

from msgspec import Meta, Struct

from plans.model import Count

Seconds = Annotated[float, Meta(ge=0)]
Chunk = tuple[int, int]
"""(tokens, prefix_tokens) of one prefill chunk."""


class Knot(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One row of a monotone table, read by linear interpolation."""

    at: Annotated[int, Meta(ge=1)]
    """Tokens or sequences."""
    seconds: Seconds


REMEMBERED = 16_384
"""Points that a table keeps with their seconds: more than a step has tokens."""


class Table(dict[float, float]):
    """A table made ready for many reads: constant before the first row, the last slope beyond it.

    `table[at]` remembers, since schedulers read the same few thousand points again and again.
    Rises in floating point too, not only on paper: every piece is capped by the row it ends at.
    """

    __slots__ = ("_at", "_seconds", "_slopes")

    def __init__(self, knots: tuple[Knot, ...]) -> None:
        """Takes rows whose `at` rises strictly; no rows mean that it costs nothing."""
        super().__init__()
        self._at = [knot.at for knot in knots]
        self._seconds = [knot.seconds for knot in knots]
        self._slopes = [
            (right.seconds - left.seconds) / (right.at - left.at) for left, right in pairwise(knots)
        ]

    def __missing__(self, at: float) -> float:
        """Reads a point for the first time."""
        seconds = self.read(at)
        if len(self) < REMEMBERED:
            self[at] = seconds
        return seconds

    def read(self, at: float) -> float:
        """Seconds at a point; 0 at no tokens and for an empty table."""
        ats, seconds = self._at, self._seconds
        if at <= 0 or not ats:
            return 0.0
        row = bisect_right(ats, at)
        if row == 0:
            return seconds[0]
        if row == len(ats):
            slope = self._slopes[-1] if self._slopes else 0.0
            return seconds[-1] + (at - ats[-1]) * slope
        found_s = seconds[row - 1] + (at - ats[row - 1]) * self._slopes[row - 1]
        end_s = seconds[row]
        return min(end_s, found_s)


def table_s(table: tuple[Knot, ...], at: float) -> float:
    """Seconds at a point, as Table reads it, without making the table ready: for a few reads."""
    if at <= 0 or not table:
        return 0.0
    row = bisect_right(table, at, key=_at)
    if row == 0:
        return table[0].seconds
    last = row == len(table)
    if last and row == 1:
        return table[0].seconds
    left, right = table[row - 2 : row] if last else table[row - 1 : row + 1]
    slope = (right.seconds - left.seconds) / (right.at - left.at)
    if last:
        return right.seconds + (at - right.at) * slope
    found_s = left.seconds + (at - left.at) * slope
    return min(right.seconds, found_s)


def _at(knot: Knot) -> int:
    return knot.at


class StepTime(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, cache_hash=True):
    """Coefficients of the formula above for one plan: one replica, one rank of each stage."""

    source: Literal["profile", "roofline"]
    stage_layers: tuple[Count, ...]
    """Layers of each stage."""
    overhead_s: Seconds
    """Host and launch time of one stage."""
    matmul: tuple[Knot, ...]
    """Seconds of one layer's matrix products and row-wise work over tokens of the step."""
    pair_s: Seconds
    """Chunk attention, compute bound: per (query token, key) pair."""
    key_s: Seconds
    """Chunk attention, bandwidth bound: per key of the chunk's context."""
    decode_key_s: Seconds
    """Decode attention: per KV token read."""
    decode_sequence_s: Seconds
    """Decode attention: per sequence."""
    comm_latency_s: Seconds = 0.0
    comm_token_s: Seconds = 0.0
    """Tensor-parallel collectives of one layer."""
    merge_latency_s: Seconds = 0.0
    merge_token_s: Seconds = 0.0
    """Exchange and merge of partial attention, per token and further KVP group."""
    hop_latency_s: Seconds = 0.0
    hop_token_s: Seconds = 0.0
    """Hand-over to the next stage."""
    head: tuple[Knot, ...] = ()
    """Last norm, vocabulary projection and sampling over sampled sequences."""
    margin: Annotated[float, Meta(ge=0)] = 0.0
    """Share by which the packer over-estimates: the error quantile of the source."""

    @property
    def stages(self) -> int:
        """Number of pipeline stages."""
        return len(self.stage_layers)

    def stage_s(
        self,
        stage: int,
        chunks: Sequence[Chunk] = (),
        decode_kv_tokens: Sequence[int] = (),
        kvp_groups: int = 1,
    ) -> float:
        """Seconds of one step on one stage.

        chunks            (tokens, prefix_tokens) of each prefill chunk; with KVP the prefix that
                          lies in the group looked at
        decode_kv_tokens  KV tokens that each decode reads, its own included
        kvp_groups        groups whose partial results are merged
        """
        return _loaded(StepLoad(self, stage=stage), chunks, decode_kv_tokens, kvp_groups).seconds()

    def step_s(
        self,
        chunks: Sequence[Chunk] = (),
        decode_kv_tokens: Sequence[int] = (),
        kvp_groups: int = 1,
    ) -> float:
        """Seconds of one step summed over its stages: what a decode in it waits for."""
        return sum(_loaded(StepLoad(self), chunks, decode_kv_tokens, kvp_groups).stages_s())


def _loaded(
    load: "StepLoad", chunks: Sequence[Chunk], decode_kv_tokens: Sequence[int], kvp_groups: int
) -> "StepLoad":
    """An empty load with this work added."""
    for tokens, prefix_tokens in chunks:
        load.add_chunk(tokens, prefix_tokens, kvp_groups=kvp_groups)
    for kv_tokens in decode_kv_tokens:
        load.add_decode(kv_tokens, kvp_groups=kvp_groups)
    return load


Work = tuple[int, float, int, int]
"""Tokens, attention seconds of a layer, merge tokens and samples of a step."""


class _Constants:
    """What StepLoad reads again and again from one StepTime."""

    __slots__ = ("head", "hops", "layers", "matmul", "overhead_s", "stages")

    def __init__(self, step_time: StepTime) -> None:
        self.matmul = Table(step_time.matmul)
        self.head = Table(step_time.head)
        self.layers = sum(step_time.stage_layers)
        self.hops = len(step_time.stage_layers) - 1
        self.overhead_s = step_time.overhead_s * step_time.stages
        self.stages: tuple[Work, tuple[float, ...]] = ((-1, 0.0, 0, 0), ())
        """Work that `stages_s` was asked for last, and its answer."""


@lru_cache(maxsize=256)
def _constants(step_time: StepTime) -> _Constants:
    # Loads are made in the scheduler's inner loop; a StepTime keeps its hash, so a hit is cheap.
    return _Constants(step_time)


class StepLoad:
    """A step under construction in one KVP group: add work, read the time, ask what still fits.

    stage None means all stages summed. Adding is O(1); the formula lives here and nowhere else.
    """

    __slots__ = (
        "_attention_s",
        "_constants",
        "_head",
        "_hops",
        "_layers",
        "_merge_tokens",
        "_overhead_s",
        "_time",
        "samples",
        "tokens",
    )

    def __init__(self, step_time: StepTime, *, stage: int | None = None) -> None:
        """Starts empty."""
        self._time = step_time
        self._constants = constants = _constants(step_time)
        if stage is None:
            self._layers = constants.layers
            self._overhead_s = constants.overhead_s
            self._hops = constants.hops
            self._head = True
        else:
            last = constants.hops
            self._layers = step_time.stage_layers[stage]
            self._overhead_s = step_time.overhead_s
            self._hops = int(stage != last)
            self._head = stage == last
        self._attention_s = 0.0  # of one layer
        self._merge_tokens = 0  # tokens x further groups
        self.tokens = 0
        self.samples = 0

    def add_chunk(
        self, tokens: int, prefix_tokens: int, *, kvp_groups: int = 1, keys_only: bool = False
    ) -> None:
        """Adds a prefill chunk.

        kvp_groups  groups that hold the request, whose partial results are merged
        keys_only   an older shard: every query sees all `prefix_tokens` keys, none of its own
        """
        time = self._time
        pairs = tokens * prefix_tokens
        keys = prefix_tokens
        if not keys_only:
            pairs += tokens * (tokens + 1) // 2
            keys += tokens
        compute_s, read_s = pairs * time.pair_s, keys * time.key_s
        self._attention_s += max(compute_s, read_s)
        self._merge_tokens += tokens * (kvp_groups - 1)
        self.tokens += tokens
        self.samples += 1

    def add_decode(self, kv_tokens: int, *, kvp_groups: int = 1) -> None:
        """Adds one decode that reads kv_tokens in this group."""
        time = self._time
        self._attention_s += kv_tokens * time.decode_key_s + time.decode_sequence_s
        self._merge_tokens += kvp_groups - 1
        self.tokens += 1
        self.samples += 1

    def add_decodes(self, sequences: int, kv_tokens: int, *, merges: int = 0) -> None:
        """Adds many decodes at once: their KV tokens in sum, and merges = sum of further groups."""
        time = self._time
        self._attention_s += kv_tokens * time.decode_key_s + sequences * time.decode_sequence_s
        self._merge_tokens += merges
        self.tokens += sequences
        self.samples += sequences

    def seconds(self) -> float:
        """Time of the step as it stands."""
        return self._seconds(self.tokens, self._attention_s, self._merge_tokens, self.samples)

    def stages_s(self) -> tuple[float, ...]:
        """Time of the step on each stage, whatever stage the load was made for.

        Who packs a step asks, and then whoever runs it in virtual time: the second answer is free.
        """
        work = (self.tokens, self._attention_s, self._merge_tokens, self.samples)
        known, answer = self._constants.stages
        if work == known:
            return answer
        time = self._time
        overhead_s = time.overhead_s
        layer_s = self._layer_s(self.tokens, self._attention_s, self._merge_tokens)
        hop_s = time.hop_latency_s + self.tokens * time.hop_token_s
        seconds = [overhead_s + layers * layer_s + hop_s for layers in time.stage_layers]
        head_s = self._constants.head[self.samples]
        seconds[-1] = overhead_s + time.stage_layers[-1] * layer_s + head_s
        answer = tuple(seconds)
        self._constants.stages = work, answer
        return answer

    def largest_chunk(
        self,
        prefix_tokens: int,
        budget_s: float,
        most_tokens: int,
        *,
        at_least: int = 1,
        kvp_groups: int = 1,
        keys_only: bool = False,
    ) -> int:
        """Largest chunk in [at_least, most_tokens] that keeps `seconds()` within budget_s, else 0.

        Exact, since the time rises with the chunk: the chord over the interval that is left says
        where to read the formula next, and every fourth reading halves the interval instead, so
        that no table makes it slow. A handful of readings; one or two where the answer is an end.
        """
        if most_tokens < at_least:
            return 0
        seconds = self._with_chunk(prefix_tokens, kvp_groups - 1, keys_only=keys_only)
        high, high_s = most_tokens, seconds(most_tokens)
        if high_s <= budget_s:
            return high
        low, low_s = at_least, high_s if at_least == most_tokens else seconds(at_least)
        if low_s > budget_s:
            return 0
        readings = 0
        while high - low > 1:
            readings += 1
            if readings % 4:
                share = (budget_s - low_s) / (high_s - low_s)
                chunk = min(max(low + int(share * (high - low)), low + 1), high - 1)
            else:
                chunk = (low + high) // 2
            chunk_s = seconds(chunk)
            if chunk_s <= budget_s:
                low, low_s = chunk, chunk_s
            else:
                high, high_s = chunk, chunk_s
        return low

    def _with_chunk(
        self, prefix_tokens: int, others: int, *, keys_only: bool
    ) -> Callable[[int], float]:
        """The function from a chunk's tokens to `seconds()` with that chunk added.

        What does not change with the chunk is read once, the rest is `_seconds` and `add_chunk`
        written out, with the same operations in the same order: the packer asks several times a
        step, and an answer must not depend on who asks.
        """
        time = self._time
        pair_s, key_s = time.pair_s, time.key_s
        comm_latency_s, comm_token_s = time.comm_latency_s, time.comm_token_s
        merge_latency_s, merge_token_s = time.merge_latency_s, time.merge_token_s
        hop_latency_s, hop_token_s = time.hop_latency_s, time.hop_token_s
        matmul_s = self._constants.matmul
        overhead_s, layers, hops = self._overhead_s, self._layers, self._hops
        head_s = self._constants.head[self.samples + 1] if self._head else 0.0
        held, attention_s, merged = self.tokens, self._attention_s, self._merge_tokens

        def seconds(chunk: int) -> float:
            tokens = held + chunk
            pairs, keys = chunk * prefix_tokens, prefix_tokens
            if not keys_only:
                pairs += chunk * (chunk + 1) // 2
                keys += chunk
            compute_s, read_s = pairs * pair_s, keys * key_s
            layer_s = matmul_s[tokens] + (attention_s + max(compute_s, read_s))
            layer_s += comm_latency_s + tokens * comm_token_s
            merge_tokens = merged + chunk * others
            if merge_tokens:
                layer_s += merge_latency_s + merge_tokens * merge_token_s
            step_s = overhead_s + layers * layer_s
            if hops:
                step_s += hops * (hop_latency_s + tokens * hop_token_s)
            return step_s + head_s

        return seconds

    def _layer_s(self, tokens: int, attention_s: float, merge_tokens: int) -> float:
        time = self._time
        layer_s = self._constants.matmul[tokens] + attention_s
        if tokens:
            layer_s += time.comm_latency_s + tokens * time.comm_token_s
        if merge_tokens:
            layer_s += time.merge_latency_s + merge_tokens * time.merge_token_s
        return layer_s

    def _seconds(self, tokens: int, attention_s: float, merge_tokens: int, samples: int) -> float:
        time = self._time
        seconds = self._overhead_s
        seconds += self._layers * self._layer_s(tokens, attention_s, merge_tokens)
        if self._hops:
            seconds += self._hops * (time.hop_latency_s + tokens * time.hop_token_s)
        if self._head:
            seconds += self._constants.head[samples]
        return seconds

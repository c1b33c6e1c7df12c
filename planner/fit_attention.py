"""Attention from measured rows: the time of a call, and coefficients of the step-time formula.

A call of any size and heads follows the law of planner/attention_law.py. The formula knows less:

    a chunk     u(x) + max(a (L x + x (x + 1) / 2), g (L + x)): x queries behind a prefix of L
    decodes     c + s batch + g keys in sum

Its coefficients have the least sum of relative errors to the law over the calls that a plan can
make: chunks up to its largest step and keys up to its context, of no particular sizes, since a law
of tiles is at its lowest where they are full. Least squares would let the few calls of a dozen
microseconds, where tiles count most, decide the rates of long ones. None is negative. Heads that
were not measured follow the law at their own tiles, with what it leaves of the most similar ones.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from planner.attention_law import (
    CHUNK_START,
    DECODE_START,
    Fitted,
    chunk_features,
    chunk_us,
    decode_features,
    decode_us,
    fitted,
)
from planner.attention_work import Heads
from planner.estimates import (
    MOST_FACTOR,
    MOST_LINEAR_FACTOR,
    Estimate,
    Floats,
    Origin,
    OutOfRange,
    nonnegative,
)
from planner.profiles import Row


class ChunkTime(NamedTuple):
    """A chunk's attention in one layer: start(tokens) + max(pairs x pair_s, keys x key_s)."""

    at: tuple[int, ...]
    """Tokens for which the start is known; straight between them."""
    start_s: tuple[float, ...]
    pair_s: float
    key_s: float

    def start(self, tokens: float) -> float:
        """Seconds that neither pairs nor keys explain: launch, tiles in part filled, the merge."""
        if tokens > self.at[-1]:
            return self.start_s[-1] * tokens / self.at[-1]
        return float(np.interp(tokens, self.at, self.start_s))

    def seconds(self, tokens: int, prefix: int) -> float:
        """Time of a chunk."""
        pairs = tokens * prefix + tokens * (tokens + 1) / 2
        return self.start(tokens) + max(pairs * self.pair_s, (prefix + tokens) * self.key_s)


class DecodeTime(NamedTuple):
    """Decode attention in one layer: start + sequences x sequence_s + keys x key_s."""

    start_s: float
    sequence_s: float
    key_s: float

    def seconds(self, batch: int, keys: int) -> float:
        """Time of decodes of so many keys each."""
        return self.start_s + batch * self.sequence_s + batch * keys * self.key_s


ROUNDS = 12
"""Turns between the rates of a chunk and the side on which each row is; few rows change theirs."""
BESIDE_S = 5e-6
"""Least time of what else a layer does beside attention, of the smallest ranks: errors count
relative to both in sum."""


def fit_chunk(tokens: Floats, prefix: Floats, seconds: Floats) -> ChunkTime:
    """Least relative error in sum: starts that rise, and a rate on each row's own side."""
    pairs, keys = tokens * prefix + tokens * (tokens + 1) / 2, prefix + tokens
    at = np.array(_steps(int(tokens.min()), 2, int(tokens.max())), dtype=float)
    rises = np.clip((tokens[:, None] - at[:-1]) / np.diff(at), 0.0, 1.0)
    starts = np.concatenate([np.ones((len(tokens), 1)), rises], axis=1)
    a, g = float(np.min(seconds / pairs)), float(np.min(seconds / keys))
    found: Floats = np.zeros(len(at) + 2)
    weight: Floats = np.ones(len(tokens))
    for _ in range(ROUNDS):
        compute = a * pairs >= g * keys
        sides = [np.where(compute, pairs, 0.0), np.where(compute, 0.0, keys)]
        columns = np.concatenate([starts, np.stack(sides, axis=1)], axis=1)
        found, weight = nonnegative(columns, seconds, beside=BESIDE_S, weight=weight)
        a, g = float(found[-2]) or a, float(found[-1]) or g
    return ChunkTime(
        at=tuple(int(each) for each in at),
        start_s=tuple(float(each) for each in np.cumsum(found[:-2])),
        pair_s=a,
        key_s=g,
    )


def fit_decode(batch: Floats, keys: Floats, seconds: Floats) -> DecodeTime:
    """Least relative error in sum."""
    columns = np.stack([np.ones_like(batch), batch, batch * keys], axis=1)
    found: Floats = np.zeros(3)
    weight: Floats = np.ones(len(batch))
    for _ in range(ROUNDS):
        found, weight = nonnegative(columns, seconds, beside=BESIDE_S, weight=weight)
    return DecodeTime(*(float(each) for each in found))


LEAST_CHUNK = 32
"""Tokens of the shortest chunk that coefficients are fitted to."""
MOST_TOKENS = 8192
"""Tokens of the longest, where nobody says."""
MOST_BATCH = 256
"""Decodes of the largest step that coefficients are fitted to."""
FIRST_KEYS = 128
"""Keys of the shortest of their sequences."""
POINTS, LEAST_POINTS = 256, 24
"""Calls that coefficients are fitted to, and of those with the least of the first size."""
MOST_KEY_BYTES = 64e9
"""Keys and values of all sequences of a step in one layer: more than any device has."""


class Attention:
    """Times of attention by heads, from tables whose last two columns are a call's sizes."""

    def __init__(self, chunks: Sequence[Row], decodes: Sequence[Row]) -> None:
        """Finds the constants of both laws; coefficients are fitted when they are asked for."""
        self._chunks = fitted(chunks, chunk_us, chunk_features, CHUNK_START)
        self._decodes = fitted(decodes, decode_us, decode_features, DECODE_START)
        self._most_chunk_keys = _most_keys(chunks, with_first=True)
        self._most_decode_keys = _most_keys(decodes, with_first=False)
        self._chunk_fits: dict[tuple[Heads, int, int], ChunkTime] = {}
        self._decode_fits: dict[tuple[Heads, int], DecodeTime] = {}

    def chunk_s(self, heads: Heads, tokens: int, prefix: int) -> Estimate:
        """Time of one chunk; raises OutOfRange."""
        like, origin = self._like_chunk(heads, prefix + tokens)
        us = self._chunks.us(heads, [(tokens, prefix)], like)
        return Estimate(float(us[0]) * 1e-6, origin)

    def decode_s(self, heads: Heads, batch: int, keys: int) -> Estimate:
        """Time of decodes of so many keys each; raises OutOfRange."""
        like, origin = self._like_decode(heads, keys)
        us = self._decodes.us(heads, [(batch, keys)], like)
        return Estimate(float(us[0]) * 1e-6, origin)

    def chunk(
        self, heads: Heads, most_keys: int, most_tokens: int = MOST_TOKENS
    ) -> tuple[ChunkTime, Origin]:
        """Coefficients for contexts of up to most_keys; raises OutOfRange."""
        like, origin = self._like_chunk(heads, most_keys)
        asked = (heads, most_keys, most_tokens)
        if asked not in self._chunk_fits:
            sizes = chunk_sizes_of(most_keys, most_tokens)
            us = self._chunks.us(heads, sizes, like)
            tokens, prefix = np.array(sizes, dtype=float).T
            self._chunk_fits[asked] = fit_chunk(tokens, prefix, us * 1e-6)
        return self._chunk_fits[asked], origin

    def decode(self, heads: Heads, most_keys: int) -> tuple[DecodeTime, Origin]:
        """Coefficients for contexts of up to most_keys; raises OutOfRange."""
        like, origin = self._like_decode(heads, most_keys)
        asked = (heads, most_keys)
        if asked not in self._decode_fits:
            _, kv_heads, head_dim = heads
            sizes = [
                (batch, keys)
                for batch, keys in decode_sizes_of(most_keys)
                if 4.0 * kv_heads * head_dim * batch * keys <= MOST_KEY_BYTES
            ]
            us = self._decodes.us(heads, sizes, like)
            batch, keys = np.array(sizes, dtype=float).T
            self._decode_fits[asked] = fit_decode(batch, keys, us * 1e-6)
        return self._decode_fits[asked], origin

    def _like_chunk(self, heads: Heads, keys: int) -> tuple[Heads, Origin]:
        return _like("attention_chunk", heads, keys, self._chunks, self._most_chunk_keys)

    def _like_decode(self, heads: Heads, keys: int) -> tuple[Heads, Origin]:
        return _like("attention_decode", heads, keys, self._decodes, self._most_decode_keys)


def chunk_sizes_of(most_keys: int, most_tokens: int) -> list[tuple[int, int]]:
    """Tokens and prefixes of chunks of a plan, evenly spread in logarithms."""
    most_tokens = min(most_tokens, most_keys)
    least = min(LEAST_CHUNK, most_tokens)
    found = []
    for first, second in _spread():
        tokens = round(least * (most_tokens / least) ** first)
        room = most_keys - tokens
        prefix = round(LEAST_CHUNK * ((room / LEAST_CHUNK + 1) ** second - 1))
        found.append((tokens, min(prefix, room)))
    return found


def decode_sizes_of(most_keys: int) -> list[tuple[int, int]]:
    """Sequences and keys of each of decodes of a plan, evenly spread in logarithms."""
    least = min(FIRST_KEYS, most_keys)
    return [
        (round(MOST_BATCH**first), round(least * (most_keys / least) ** second))
        for first, second in _spread()
    ]


def _spread() -> list[tuple[float, float]]:
    """Points of the unit square without a pattern, and on the side where the first size is least.

    Sizes at powers of two would all fill their tiles, which most calls do not. Where a budget is
    spent chunks are the least there are, of whatever prefix: the only ones that keys bind.
    """
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    inside = [((each + 0.5) / POINTS, each * golden % 1.0) for each in range(POINTS)]
    return [(0.0, each / LEAST_POINTS) for each in range(LEAST_POINTS + 1)] + inside


def _steps(first: int, ratio: int, last: int) -> list[int]:
    """first, first x ratio and so on, and last."""
    found = [min(first, last)]
    while found[-1] * ratio < last:
        found.append(found[-1] * ratio)
    return found if found[-1] == last else [*found, last]


def _most_keys(rows: Sequence[Row], *, with_first: bool) -> dict[Heads, int]:
    """Longest context among the rows of each set of heads."""
    found: dict[Heads, int] = {}
    for row in rows:
        heads, kv_heads, head_dim, first, second = (int(part) for part in row.key)
        key = (heads, kv_heads, head_dim)
        found[key] = max(found.get(key, 0), second + (first if with_first else 0))
    return found


def _like(
    term: str, heads: Heads, keys: int, law: Fitted, most: dict[Heads, int]
) -> tuple[Heads, Origin]:
    """Measured heads most like these, and how far the answer is from what was measured.

    The law is one for all heads, so the longest context that any were measured with counts.
    """
    nearest, factor = _nearest(term, heads, law.left)
    return nearest, _reach(term, max(most.values()), keys, factor)


def _nearest(term: str, heads: Heads, known: Iterable[Heads]) -> tuple[Heads, float]:
    """Measured heads most like these, and by what factor they differ; raises OutOfRange."""

    def distance(other: Heads) -> tuple[bool, float]:
        apart = sum(abs(math.log2(own / its)) for own, its in zip(heads, other, strict=True))
        return other[2] != heads[2], apart

    nearest = min(known, key=distance)
    factor = float(2.0 ** distance(nearest)[1])
    if factor > MOST_FACTOR:
        asked, have = (f"{h}/{k} heads of {d}" for h, k, d in (heads, nearest))
        raise OutOfRange(term, asked, f"nearest {have}", factor)
    return nearest, factor


def _reach(term: str, measured: int, asked: int, factor: float) -> Origin:
    """Origin of coefficients for so many keys; other heads count from a factor of two on."""
    reach = asked / measured
    if reach > MOST_LINEAR_FACTOR:
        raise OutOfRange(term, f"{asked} keys", f"up to {measured}", reach)
    return Origin(max(reach, factor if factor > 2 else 1.0, 1.0), interpolated=True)

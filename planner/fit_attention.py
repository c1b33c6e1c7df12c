"""Attention from measured rows: coefficients of the step-time formula by heads.

    a chunk     u(x) + max(a (L x + x (x + 1) / 2), g (L + x)): x queries behind a prefix of L
    decodes     c + s batch + g keys in sum

No coefficient is negative. Other heads than the measured ones take the nearest, scaled by width.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from planner.estimates import (
    MOST_FACTOR,
    MOST_LINEAR_FACTOR,
    Floats,
    Origin,
    OutOfRange,
    nonnegative,
)
from planner.profiles import Row

Mask = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
Heads = tuple[int, int, int]
"""Query heads and KV heads of one rank, head size."""


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


ROUNDS = 60
"""Turns between the coefficients of a chunk; they settle within twenty."""
BESIDE_S = 20e-6
"""Least time of what else a layer does beside a chunk: errors count relative to both in sum."""


def fit_chunk(tokens: Floats, prefix: Floats, seconds: Floats) -> ChunkTime:
    """Least error relative to a layer, by turns: starts, then the rate on each row's own side."""
    pairs, keys = tokens * prefix + tokens * (tokens + 1) / 2, prefix + tokens
    at, group = np.unique(tokens, return_inverse=True)
    weight = (seconds + BESIDE_S) ** -2.0
    a, g = float(np.min(seconds / pairs)), float(np.min(seconds / keys))
    start = np.zeros(len(at))
    for _ in range(ROUNDS):
        rest = (seconds - np.maximum(a * pairs, g * keys)) * weight
        start = np.bincount(group, rest) / np.bincount(group, weight)
        start = np.maximum.accumulate(np.maximum(start, 0.0))
        left, compute = seconds - start[group], a * pairs >= g * keys
        a = _slope(left, pairs, weight, compute) or a
        g = _slope(left, keys, weight, ~compute) or g
    return ChunkTime(
        at=tuple(int(each) for each in at),
        start_s=tuple(float(each) for each in start),
        pair_s=a,
        key_s=g,
    )


def _slope(seconds: Floats, amount: Floats, weight: Floats, rows: Mask) -> float:
    """Seconds an amount on some rows; 0 where there are none or the best is negative."""
    square = float(np.sum((amount * amount * weight)[rows]))
    return max(float(np.sum((seconds * amount * weight)[rows])) / square, 0.0) if square else 0.0


def fit_decode(batch: Floats, keys: Floats, seconds: Floats) -> DecodeTime:
    """Least relative error."""
    columns = np.stack([np.ones_like(batch), batch, batch * keys], axis=1)
    return DecodeTime(*(float(each) for each in nonnegative(columns, seconds)))


class Attention:
    """Coefficients of attention by heads, from tables whose last two columns are its sizes."""

    def __init__(self, chunks: Sequence[Row], decodes: Sequence[Row]) -> None:
        """Fits a set of heads when it is first asked for."""
        self._chunks = _by_heads(chunks)
        self._decodes = _by_heads(decodes)
        self._chunk_fits: dict[Heads, ChunkTime] = {}
        self._decode_fits: dict[Heads, DecodeTime] = {}

    def chunk(self, heads: Heads, most_keys: int) -> tuple[ChunkTime, Origin]:
        """Coefficients for contexts of up to most_keys; raises OutOfRange."""
        nearest, factor = _nearest("attention_chunk", heads, self._chunks)
        rows = self._chunks[nearest]
        origin = _reach("attention_chunk", float(np.max(rows[0] + rows[1])), most_keys, factor)
        if nearest not in self._chunk_fits:
            self._chunk_fits[nearest] = fit_chunk(*rows)
        found = self._chunk_fits[nearest]
        wide, kv_wide = _widths(heads, nearest)
        scaled = ChunkTime(found.at, found.start_s, found.pair_s * wide, found.key_s * kv_wide)
        return scaled, origin

    def decode(self, heads: Heads, most_keys: int) -> tuple[DecodeTime, Origin]:
        """Coefficients for contexts of up to most_keys; raises OutOfRange."""
        nearest, factor = _nearest("attention_decode", heads, self._decodes)
        rows = self._decodes[nearest]
        origin = _reach("attention_decode", float(np.max(rows[1])), most_keys, factor)
        if nearest not in self._decode_fits:
            self._decode_fits[nearest] = fit_decode(*rows)
        found = self._decode_fits[nearest]
        wide, kv_wide = _widths(heads, nearest)
        return DecodeTime(found.start_s, found.sequence_s * wide, found.key_s * kv_wide), origin


def _by_heads(rows: Sequence[Row]) -> dict[Heads, tuple[Floats, Floats, Floats]]:
    """First size, second size and seconds of the rows of each set of heads."""
    groups: dict[Heads, list[tuple[float, float, float]]] = {}
    for row in rows:
        heads, kv_heads, head_dim, first, second = (int(part) for part in row.key)
        found = groups.setdefault((heads, kv_heads, head_dim), [])
        found.append((float(first), float(second), row.us * 1e-6))
    return {heads: tuple(np.array(found).T) for heads, found in groups.items()}


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


def _reach(term: str, measured: float, asked: int, factor: float) -> Origin:
    """Origin of coefficients for so many keys; other heads count from a factor of two on."""
    reach = asked / measured
    if reach > MOST_LINEAR_FACTOR:
        raise OutOfRange(term, f"{asked} keys", f"up to {measured:.0f}", reach)
    return Origin(max(reach, factor if factor > 2 else 1.0, 1.0), interpolated=True)


def _widths(heads: Heads, nearest: Heads) -> tuple[float, float]:
    """Ratios of the widths of queries and of keys."""
    return heads[0] * heads[2] / (nearest[0] * nearest[2]), heads[1] * heads[2] / (
        nearest[1] * nearest[2]
    )

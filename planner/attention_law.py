"""The time of attention's kernels as a law of a few constants, found from measured rows.

Work is counted in tiles as the kernel cuts it (planner/attention_work.py); the constants are those
of the device, one set for all heads, in microseconds. p joins two limits where neither hides the
other at once.

    chunk    start + group x head + ((tiles x tile + waves x wave)^p + (bytes / rate)^p)^(1/p)
             + merge, pieces x piece and partial bytes / their rate where keys are cut;
             a tile takes a constant and a part in proportion to the head size
    decodes  start + group x head + merge and pieces x piece where keys are cut
             + sum over waves of n items: wave + tiles x ((n x tile bytes / rate)^p + tile^p)^(1/p)

What the law leaves is kept as a share, interpolated over the two sizes of a call: the chip's clock,
and what caches do. Chosen by leaving out one fitted row at a time, on an H100: the law alone is off
by 2.7 % at the median and 9.5 % at P90 for chunks, 3.9 and 8.0 % for decodes; with the shares 2.5
and 7.9, 2.7 and 6.5 %. Rows that are kept for checks had no part in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from planner.attention_work import TILE_KEYS, TILE_ROWS, Heads, chunk_work, decode_work
from planner.estimates import Floats
from planner.profiles import Row

Law = Callable[[Floats, Floats], Floats]
"""Microseconds of calls [R] from the logarithms of the constants and their features [R, F]."""
Features = Callable[[Heads, int, int], tuple[float, ...]]

SPREAD = 0.05
"""A row whose own spread is this share counts half for the constants, and for its neighbours as
if it lay a step of the grid away."""
OCTAVES = 2.0
"""Distance at which a neighbour's share counts as one unit: a step of the measured grid."""
NEAR = 1e-3
"""Keeps the weight of the point itself finite; its share is then met within a per cent."""
TURNS = 60
MEGABYTES = 1e6
"""Rates are in bytes a microsecond, which are MB a second."""


def chunk_features(heads: Heads, tokens: int, prefix: int) -> tuple[float, ...]:
    """What the law of chunks reads."""
    query_heads, kv_heads, head_dim = heads
    work = chunk_work(heads, tokens, prefix)
    key_bytes = 4.0 * kv_heads * head_dim * (prefix + tokens)
    part_bytes = 8.0 * work.slots * TILE_ROWS * head_dim
    return (
        *(work.tiles, work.waves, work.pieces, query_heads / kv_heads),
        *(head_dim / 128, key_bytes / MEGABYTES, part_bytes / MEGABYTES),
    )


CHUNK_START = (1.0, 0.2, 0.7, 0.8, 4.0, 0.35, 2.5, 0.1, 0.3, 2.0)
"""Where the search for the constants begins; it ends at the same from within a factor of two."""


def chunk_us(logs: Floats, features: Floats) -> Floats:
    """The law of chunks."""
    start, head, fixed, wide, wave, read, merge, piece, part, sharp = np.exp(logs)
    tiles, waves, pieces, group, size, key_mb, part_mb = features.T
    run = tiles * (fixed + wide * size) + waves * wave
    body = _joined(run, key_mb * read, sharp)
    merged = np.where(pieces > 0, merge + pieces * piece + part_mb * part, 0.0)
    us: Floats = start + group * head + body + merged
    return us


def decode_features(heads: Heads, batch: int, keys: int) -> tuple[float, ...]:
    """What the law of decodes reads."""
    query_heads, kv_heads, head_dim = heads
    work = decode_work(heads, batch, keys)
    full, rest = divmod(work.items, work.at_once)
    return (
        *(work.pieces if work.pieces > 1 else 0, query_heads / kv_heads * head_dim / 512),
        *(work.size, full, rest, work.at_once, 4.0 * TILE_KEYS * head_dim / MEGABYTES),
    )


DECODE_START = (3.0, 1.0, 1.5, 0.12, 1.0, 0.35, 11.0, 3.0)
"""The same for decodes."""


def decode_us(logs: Floats, features: Floats) -> Floats:
    """The law of decodes."""
    start, head, merge, piece, wave, read, tile, sharp = np.exp(logs)
    pieces, group, size, full, rest, at_once, tile_mb = features.T

    def wave_us(items: Floats) -> Floats:
        us: Floats = wave + size * _joined(items * tile_mb * read, tile_mb * tile, sharp)
        return us

    merged = np.where(pieces > 0, merge + pieces * piece * np.sqrt(group), 0.0)
    waves = full * wave_us(at_once) + np.where(rest > 0, wave_us(rest), 0.0)
    us: Floats = start + group * head + merged + waves
    return us


SHARPEST = 30.0
"""Of p, from which on the longer of two times is all that counts."""


def _joined(a: Floats, b: Floats, sharp: float) -> Floats:
    """(a^p + b^p)^(1/p), p = 1 + sharp: from their sum to the longer of them."""
    p = 1.0 + min(sharp, SHARPEST)
    high, low = np.maximum(a, b), np.minimum(a, b)
    both: Floats = high * (1.0 + (low / np.maximum(high, 1e-12)) ** p) ** (1.0 / p)
    return both


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A law with its constants, and what it leaves of the measured rows."""

    law: Law
    features: Features
    logs: Floats
    at: dict[Heads, Floats]
    """Logarithms of the sizes of each set of heads' rows [R, 2]."""
    left: dict[Heads, tuple[Floats, Floats]]
    """log(measured / law) of those rows, and how far off their own spread puts each."""

    def law_us(self, heads: Heads, sizes: Sequence[tuple[int, int]]) -> Floats:
        """By the constants alone."""
        table = np.array([self.features(heads, *each) for each in sizes])
        us: Floats = self.law(self.logs, table)
        return us

    def us(self, heads: Heads, sizes: Sequence[tuple[int, int]], like: Heads) -> Floats:
        """Of calls of some heads, with the shares that measured heads `like` them have."""
        at, (left, noise) = _where(sizes), self.left[like]
        apart = ((at[:, None] - self.at[like]) / OCTAVES) ** 2
        near = 1.0 / (apart.sum(2) ** 2 + NEAR + noise)
        us: Floats = self.law_us(heads, sizes) * np.exp(near @ left / near.sum(1))
        return us


def _where(sizes: Sequence[tuple[int, int]]) -> Floats:
    """By tokens and the sum, since a prefix may be 0; the same for sequences and keys."""
    first, second = np.array(sizes, dtype=float).T
    return np.stack([np.log2(first), np.log2(first + second)], axis=1)


def fitted(rows: Sequence[Row], law: Law, features: Features, start: Sequence[float]) -> Fitted:
    """The constants with the least sum of squared errors in logarithms."""
    keys = [tuple(int(part) for part in row.key) for row in rows]
    us = np.array([row.us for row in rows])
    noise = (np.array([row.spread_us for row in rows]) / us / SPREAD) ** 2
    table = np.array([features((h, k, d), first, second) for h, k, d, first, second in keys])
    root = 1.0 / np.sqrt(1.0 + noise)

    def errors(logs: Floats) -> Floats:
        off: Floats = root * np.log(law(logs, table) / us)
        return off

    logs = _least(errors, np.log(np.array(start)))
    left = np.log(us / law(logs, table))
    groups: dict[Heads, list[int]] = {}
    for number, (heads, kv_heads, head_dim, _, _) in enumerate(keys):
        groups.setdefault((heads, kv_heads, head_dim), []).append(number)
    return Fitted(
        law=law,
        features=features,
        logs=logs,
        at={
            heads: _where([(keys[number][3], keys[number][4]) for number in numbers])
            for heads, numbers in groups.items()
        },
        left={heads: (left[numbers], noise[numbers]) for heads, numbers in groups.items()},
    )


LOWEST, HIGHEST = -12.0, 12.0
"""Logarithms of the constants: one that rows do not show ends at the lowest, which is nothing."""


def _least(errors: Callable[[Floats], Floats], start: Floats) -> Floats:
    """Levenberg and Marquardt's method, derivatives by differences."""
    at, damping, step = start.copy(), 1e-2, 1e-5
    now = errors(at)
    for _ in range(TURNS):
        slopes = np.stack(
            [(errors(at + step * unit) - now) / step for unit in np.eye(len(at))], axis=1
        )
        square, slope = slopes.T @ slopes, slopes.T @ now
        while damping < 1e8:
            move = np.linalg.solve(square + damping * np.eye(len(at)), -slope)
            there = np.clip(at + move, LOWEST, HIGHEST)
            then = errors(there)
            if float(then @ then) < float(now @ now):
                settled = float(now @ now) - float(then @ then) < 1e-9 * float(now @ now)
                at, now, damping = there, then, damping * 0.3
                break
            damping *= 4
        else:
            break
        if settled:
            break
    return at

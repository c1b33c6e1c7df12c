"""How much work a call of attention is for the busiest processor, by the kernel's own rule.

codegen/kernels/paged_attention/work.py cuts queries into tiles and keys into pieces; here are its
counts for one chunk, and for decodes of one length, without its lists and without torch. Tests hold
them to the lists. Shapes are those of the kernels for Hopper.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

Heads = tuple[int, int, int]
"""Query heads and KV heads of one rank, head size."""

PROCESSORS = 132
"""Of an H100 or H200 in SXM form."""
TILE_ROWS = 128
"""Rows of a chunk's tile, a token's query heads of one KV head side by side."""
TILE_KEYS = 128
"""Keys of a tile of either kind."""
DECODE_ROWS = 16
"""Rows of a decode's tile, or a token's query heads where those are more."""
DECODE_STAGES = 3
DECODE_RESIDENT = 3
SHARED_BYTES = 220_000
"""Tiles of keys in flight a block, blocks a processor at most, and what they share."""
WAVE_COST = 10
PIECE_COST = 0.22
PIECES_MAX = 128
"""What the kernel's rule takes a block and a piece to cost, in tiles of keys; most pieces."""
TILES_A_BLOCK = 4
"""Tiles a processor from which the rule cuts none."""


class ChunkWork(NamedTuple):
    """One chunk in one layer."""

    tiles: float
    """Tiles of keys of the busiest processor."""
    waves: int
    """Items that it runs."""
    pieces: int
    """Of the tile with most, 0 where none is cut."""
    slots: int
    """Partial results of TILE_ROWS rows, all KV heads together."""


def chunk_tiles(group: int, tokens: int, prefix: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Tiles of keys of each tile of queries of one KV head."""
    tile_tokens = power_of_two(TILE_ROWS // group)
    skew = prefix % tile_tokens if tokens > tile_tokens else 0
    ends = np.minimum(np.arange(-skew, tokens, tile_tokens) + tile_tokens, tokens)
    return (ends - 1 + prefix) // TILE_KEYS + 1


def pieces_of(
    count: np.ndarray[tuple[int], np.dtype[np.int64]], kv_heads: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Into how many pieces the keys of each tile are cut."""
    most = int(count.max())
    if len(count) * kv_heads >= TILES_A_BLOCK * PROCESSORS or most <= 1:
        return np.ones_like(count)
    split_c = np.arange(1, min(PIECES_MAX, most) + 1)
    size_c = -(-most // split_c)
    pieces_ci = np.maximum(-(-count // size_c[:, None]), 1)
    waves_c = -(-pieces_ci.sum(1) * kv_heads // PROCESSORS)
    time_c = waves_c * (size_c + WAVE_COST) + PIECE_COST * split_c * (split_c > 1)
    found: np.ndarray[tuple[int], np.dtype[np.int64]] = pieces_ci[time_c.argmin()]
    return found


@lru_cache(maxsize=8192)
def chunk_work(heads: Heads, tokens: int, prefix: int) -> ChunkWork:
    """The work of one chunk; its longest items start first, each on the processor free first."""
    query_heads, kv_heads, _ = heads
    count = chunk_tiles(query_heads // kv_heads, tokens, prefix)
    pieces = pieces_of(count, kv_heads)
    size = -(-count // pieces)
    lengths = np.repeat(size, pieces)
    lengths[np.cumsum(pieces) - 1] = np.maximum(count - size * (pieces - 1), 0)
    items = np.sort(np.repeat(lengths, kv_heads))[::-1] + float(WAVE_COST)
    busy = np.zeros(PROCESSORS)
    for start in range(0, len(items), PROCESSORS):
        wave = items[start : start + PROCESSORS]
        busy.sort()
        busy[: len(wave)] += wave
    waves = -(-len(items) // PROCESSORS)
    cut = pieces[pieces > 1]
    return ChunkWork(
        tiles=max(float(busy.max()) - WAVE_COST * waves, 1.0),
        waves=waves,
        pieces=int(cut.max()) if len(cut) else 0,
        slots=int(cut.sum()) * kv_heads,
    )


class DecodeWork(NamedTuple):
    """Decodes of equal length in one layer."""

    pieces: int
    """Of each sequence."""
    size: int
    """Tiles of keys of a piece."""
    items: int
    """Pieces of all sequences and KV heads."""
    at_once: int
    """How many run at once."""


def decode_work(heads: Heads, batch: int, keys: int) -> DecodeWork:
    """The work of decodes."""
    _, kv_heads, head_dim = heads
    buffers = DECODE_STAGES * TILE_KEYS * 2 * head_dim * 2
    at_once = PROCESSORS * max(1, min(DECODE_RESIDENT, SHARED_BYTES // buffers))
    count = -(-keys // TILE_KEYS)
    each = max(-(-batch * count // max(1, at_once // kv_heads)), 1)
    pieces = max(-(-count // each), 1)
    size = -(-count // pieces)
    return DecodeWork(pieces=pieces, size=size, items=batch * pieces * kv_heads, at_once=at_once)


def power_of_two(limit: int) -> int:
    """The largest up to the limit."""
    return 1 << limit.bit_length() - 1


# --- memory ---------------------------------------------------------------------------------------

SMALL_ROWS = 64
"""Rows of a tile of the portable kernel, of which two run on a processor."""
SMALL_KEYS = 64
DECODE_SLOTS = 17
"""Partial results of decodes beside chunks, a block: they are cut into parts of an eighth of the
step at least, 2 x 8 with a part begun, and a part is rounded down by a seventeenth at most."""


def most_pieces(tiles: int, most: int, blocks: int, total: float = math.inf) -> int:
    """No list of so many uncut items, the longest of `most` tiles of keys, is cut into more.

    total  most tiles of keys of all items

    For a cut into C pieces of s tiles at most, of N items with S tiles in sum, the kernel's rule
    takes the time T(C) = waves x (s + w) + p C, with at most N + S / s items. It chooses the least,
    which is no more than any T(C), and a choice of B items takes at least (S + w B) / blocks. So

        w B <= N (s + w) + w S / s + blocks (s + w + p C)    for every C

    and the bound is the least of them. In a mixed list the rule takes the longer of T(C) and of two
    times that no cut shortens, for which the same holds.
    """
    if most <= 1 or tiles == 0:
        return 0
    split_c = np.arange(1, min(PIECES_MAX, most) + 1)
    size_c = -(-most // split_c)
    items_c = tiles * (size_c + WAVE_COST) + WAVE_COST * min(total, tiles * most) / size_c
    bound_c = items_c + blocks * (size_c + WAVE_COST + PIECE_COST * split_c)
    return min(int(bound_c.min() / WAVE_COST), tiles * PIECES_MAX)


class LargestStep(NamedTuple):
    """What limits the partial results of one layer's call."""

    keys: int
    """Of the longest sequence."""
    tokens: int
    sequences: int
    least_tokens: int
    """Of a chunk that is taken whatever it takes."""
    products: float
    """Multiplications and additions, counted as two, that all other chunks may take."""
    read_bytes: float
    """Keys and values that they may read from memory."""
    hopper: bool
    """Chunks have the kernel for Hopper, but for those that fill no tile of the portable one."""


@lru_cache(maxsize=4096)
def partials_bytes(heads: Heads, step: LargestStep) -> int:
    """Most bytes of partial results of one call: fp32 outputs and their logarithms of sums."""
    query_heads, kv_heads, head_dim = heads
    group = query_heads // kv_heads
    rows = 0
    for hopper in {step.hopper, False}:
        tile_rows, tile_keys = (TILE_ROWS, TILE_KEYS) if hopper else (SMALL_ROWS, SMALL_KEYS)
        at_once = PROCESSORS if hopper else 2 * PROCESSORS
        longest = -(-step.keys // tile_keys)
        total = step.products / (4.0 * tile_rows * tile_keys * head_dim)
        if step.hopper and not hopper:  # a tile of queries a sequence, so none reads keys again
            total = min(total, step.read_bytes / (4.0 * tile_keys * head_dim))
        uncut = TILES_A_BLOCK * at_once
        slots = most_pieces(min(uncut, kv_heads * step.tokens), longest, at_once, total)
        least = kv_heads * (-(-step.least_tokens // power_of_two(max(tile_rows // group, 1))) + 1)
        slots = max(slots, most_pieces(min(uncut, least), longest, at_once))
        rows = max(rows, (slots + DECODE_SLOTS * at_once) * max(tile_rows, _at_least(group)))
    alone = PROCESSORS * DECODE_RESIDENT + step.sequences * kv_heads
    rows = max(rows, alone * max(DECODE_ROWS, _at_least(group)))
    return rows * (head_dim + 1) * 4


def _at_least(limit: int) -> int:
    """The least power of two from the limit on."""
    return 1 << (limit - 1).bit_length()

"""How much work a call of attention is for the busiest processor, by the kernel's own rule.

codegen/kernels/paged_attention/work.py cuts queries into tiles and keys into pieces; here are its
counts for one chunk, and for decodes of one length, without its lists and without torch. Tests hold
them to the lists. Shapes are those of the kernels for Hopper.
"""

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

"""The work lists of paged attention: which tiles of queries meet which tiles of keys, and when.

Built once a step, for all its layers, from numbers that the host already has; for steps that are
recorded by recorded.py, on the device. A launch then reads its list, and no kernel searches for its
sequence. A step with chunks and decodes is one list (`mixed_list`), in which decodes read memory
beside the chunks' products.

Lists of the host are built in numpy, and sent in one copy: a step's first attention waits for them,
and torch takes longer for an operation on a few numbers, much longer where it wakes its threads.

A tile is up to `tile_tokens` queries of one sequence with all query heads of one KV head; its keys
come in tiles of `tile_keys`. Where tiles are too few to fill the chip their keys are cut in pieces,
each of which leaves a partial result that a second kernel merges.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]

ITEM_FIELDS = 12
"""Columns of an item, int32:

0 sequence, the row of the page table
1 first token of the tile; may lie before the sequence's first, where tiles are aligned to keys
2 first token of the sequence in the step
3 token behind its last
4 shift: token t sees keys up to min(t + shift, keys - 1)
5 keys of the sequence
6 first tile of keys
7 tile of keys behind the last
8 slot of the partial result, or -1 where the result is whole
9 KV head, or -1 in lists of which every KV head runs all items
10 slot of the first piece of its tile
11 pieces of its tile, 1 where the result is whole
"""
HEAD = 9
MERGE_FIELDS = 5
"""Columns of a merge, int32: first slot, slots, then columns 1 to 3 of its items."""
WAVE_COST = 10
"""What starting and ending a block costs, in tiles of keys (fit of TileOps, on an H200)."""
PIECE_COST = 0.22
"""What one more piece costs the merge, in tiles of keys (as above)."""
PIECES_MAX = 128
LENGTHS_ALIKE = 8
"""Items count as equally long within this part of the longest: then pieces of the same keys run
side by side, so that L2 reads them once for all tiles of queries."""
DECODE_WAVE_COST = 4
"""What starting and ending a block of a decode costs beside chunks, in tiles of keys (H100)."""
READ_COST = 2.0
"""A tile of keys where memory is the limit: 64 KB at an SM's share of 3 TB/s, beside 1.4 us a full
tile (H100; on an H200 it is less, so that the estimate of a mixed step is too long there)."""
STEP_PARTS = 8
"""Pieces of decodes beside chunks take such a part of the step at most, to even out its end."""
LEAST_GAIN = 0.02
"""A mixed step is one list where the estimate says that it saves this share."""


SENT_MULTIPLE = 64
"""Where each tensor of a copy begins, in numbers of 4 bytes: kernels want pointers that 16 divides.
"""


class Queries(NamedTuple):
    """One sequence's share of a step."""

    sequence: int
    begin: int
    end: int
    keys: int
    causal: bool


@dataclass(frozen=True, kw_only=True)
class WorkList:
    """What one launch has to do."""

    items_IF: torch.Tensor
    """Each is run by one block per KV head, or by one block where it names its head."""
    merges_MF: torch.Tensor | None
    """The tiles in pieces; None if there are none."""
    slots: int
    """Partial results, times the KV heads."""
    one_masked_tile: bool
    """Only the last tile of keys of a tile of queries can hold a key that a query must not see."""
    most_tokens: int = 1
    """Queries of the largest tile among the merges."""
    longest: int = 0
    """Tiles of keys of the longest item, in lists of packed decodes."""
    heads_named: bool = False
    """Items name their KV head: those of a mixed step, in the order in which they should start."""
    counters: torch.Tensor | None = None
    """Zeros, one a slot and KV head, where the last piece of a tile merges it; zeros again when a
    launch has ended, so that layers and replays share them."""

    def counting(self, kv_heads: int) -> "WorkList":
        """The list with counters, on the device of its items."""
        device = self.items_IF.device
        counters = torch.zeros(self.slots * kv_heads, dtype=torch.int32, device=device)
        return replace(self, counters=counters)


def sequences_of(inputs: Any, tokens: int) -> list[Queries]:
    """The sequences that have tokens, and the rows behind the last one, which see no keys."""
    host = getattr(inputs, "host", None)
    if host is None:
        starts, kv_lens = inputs.query_starts_B1.tolist(), inputs.kv_lens_B.tolist()
        first_T = inputs.query_starts_B1[:-1].long().clamp_max(tokens - 1)
        causal = inputs.slots_T[first_T].ge(0).tolist()
    else:
        starts, kv_lens, causal = host.query_starts, host.kv_lens, host.causal
    found = [
        Queries(sequence=b, begin=begin, end=end, keys=kv_lens[b], causal=causal[b])
        for b, (begin, end) in enumerate(pairwise(starts))
        if end > begin
    ]
    if starts[-1] < tokens:
        found.append(Queries(sequence=0, begin=starts[-1], end=tokens, keys=0, causal=False))
    return found


def sent(lists: Sequence[WorkList], device: torch.device) -> list[WorkList]:
    """Lists of the host in the memory of the device, by one copy that does not wait for it."""
    if device.type == "cpu":
        return list(lists)
    tensors = [
        tensor
        for work in lists
        for tensor in (work.items_IF, work.merges_MF, work.counters)
        if tensor is not None
    ]
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.numel() // SENT_MULTIPLE) * SENT_MULTIPLE
    host = torch.empty(end, dtype=torch.int32, pin_memory=True)
    numbers = host.numpy()
    for start, tensor in zip(starts, tensors, strict=True):
        numbers[start : start + tensor.numel()] = tensor.numpy().reshape(-1)
    there = host.to(device, non_blocking=True)
    copies = iter(
        [
            there[start : start + tensor.numel()].view(tensor.shape)
            for start, tensor in zip(starts, tensors, strict=True)
        ]
    )
    return [
        replace(
            work,
            items_IF=next(copies),
            merges_MF=None if work.merges_MF is None else next(copies),
            counters=None if work.counters is None else next(copies),
        )
        for work in lists
    ]


def chunk_list(
    chunks: Sequence[Queries], *, tile_tokens: int, tile_keys: int, kv_heads: int, blocks: int
) -> WorkList:
    """The list of sequences with many queries, on the host.

    blocks  how many the chip runs at once; tiles of few long sequences are cut to fill it
    """
    tiles, masked = _tiles(chunks, tile_tokens=tile_tokens, tile_keys=tile_keys)
    pieces = _pieces(tiles[:, 7], kv_heads=kv_heads, blocks=blocks)
    items, piece = _cut(tiles, pieces)
    merges, slots = _number_slots(items, piece)
    return WorkList(
        items_IF=_tensor(items[_order(items, piece)]),
        merges_MF=merges,
        slots=slots,
        one_masked_tile=masked <= 1,
        most_tokens=tile_tokens,
    )


def mixed_list(
    chunks: Sequence[Queries],
    decodes: Sequence[Queries],
    *,
    tile_tokens: int,
    tile_keys: int,
    kv_heads: int,
    heads_together: int,
    blocks: int,
    decode_cost: float,
) -> WorkList:
    """One list of sequences with many queries and with few, each an item or several, on the host.

    Chunks keep the tensor cores busy and decodes the memory, so both should run all the time: the
    items are in the order of the starts that they would have, were the blocks shared out in the
    ratio of the work. Chunks are cut so that none outlasts the step.

    heads_together  KV heads that chunks take side by side, for L2
    decode_cost     of a tile of keys for a decode, in such tiles for a full tile of queries
    """
    wide, masked = _tiles(chunks, tile_tokens=tile_tokens, tile_keys=tile_keys)
    narrow, narrow_masked = _tiles(decodes, tile_tokens=tile_tokens, tile_keys=tile_keys)
    read = _reads(chunks, tile_keys) + _reads(decodes, tile_keys)
    filling = kv_heads * float((decode_cost * narrow[:, 7] + DECODE_WAVE_COST).sum())
    bound = READ_COST * read * kv_heads / blocks
    pieces = _pieces(wide[:, 7], kv_heads=kv_heads, blocks=blocks, filling=filling, bound=bound)
    whole = kv_heads * float((wide[:, 7] + WAVE_COST * pieces).sum())
    step = max((whole + filling) / blocks, bound)  # tiles of keys: how long the step should take
    part = max(int(step / STEP_PARTS / decode_cost), 16)
    narrow_pieces = (-(-narrow[:, 7] // part)).clip(1, PIECES_MAX)
    items, piece = _cut(np.concatenate((wide, narrow)), np.concatenate((pieces, narrow_pieces)))
    merges, slots = _number_slots(items, piece)
    count = int(pieces.sum())
    share = _share(count * kv_heads, whole / (whole + filling), blocks)
    groups = np.arange(kv_heads).reshape(-1, 1, heads_together)
    order = _order(items[:count], piece[:count])
    spread = np.tile(order.repeat(heads_together), len(groups))
    late = (count + _order(items[count:], piece[count:])).repeat(kv_heads)
    length = items[:, 7] - items[:, 6]
    starts = np.concatenate(
        (
            _starts(length[spread], 1.0, WAVE_COST, share),
            _starts(length[late], decode_cost, DECODE_WAVE_COST, max(blocks - share, 1)),
        )
    )
    heads = np.concatenate(
        (
            groups.repeat(count, 1).reshape(-1),
            np.tile(np.arange(kv_heads), len(late) // kv_heads),
        )
    )
    place = starts.argsort(kind="stable")
    both = items[np.concatenate((spread, late))[place]]
    both[:, HEAD] = heads[place]
    return WorkList(
        items_IF=_tensor(both),
        merges_MF=merges,
        slots=slots,
        one_masked_tile=max(masked, narrow_masked) <= 1,
        most_tokens=tile_tokens,
        heads_named=True,
    )


def saves(
    chunks: Sequence[Queries],
    decodes: Sequence[Queries],
    *,
    tile_tokens: int,
    tile_keys: int,
    kv_heads: int,
    blocks: int,
    decode_cost: float,
) -> bool:
    """Whether one list is estimated to be faster than a list of chunks and then one of decodes.

    It is not where chunks wait for memory as decodes do: nothing overlaps then, and decodes alone
    read at nearly its full rate. Compared with measured steps in
    bench/results/attention_peers_h100_202611.md.
    """
    tiles = sum(
        -(-(each.end - each.begin) // tile_tokens) * -(-each.keys // tile_keys) for each in chunks
    )
    read = READ_COST * _reads(chunks, tile_keys)
    decode_tiles = _reads(decodes, tile_keys)
    apart = max(tiles, read) + READ_COST * decode_tiles
    filling = decode_cost * decode_tiles + DECODE_WAVE_COST * len(decodes)
    together = max(tiles + filling, read + READ_COST * decode_tiles)
    return blocks > kv_heads and together < (1 - LEAST_GAIN) * apart


def _reads(sequences: Sequence[Queries], tile_keys: int) -> int:
    """Tiles of keys of all sequences."""
    return sum(-(-each.keys // tile_keys) for each in sequences)


def _share(items: int, work: float, blocks: int) -> int:
    """How many of the blocks run chunks: so many that their items end together, in whole waves.

    work  share of all work that is theirs
    """
    most = max(blocks - 1, 1)
    waves = max(round(items / max(work * blocks, 1)), -(-items // most), 1)
    return min(-(-items // waves), most)


def _tensor(rows: Ints) -> torch.Tensor:
    return torch.from_numpy(rows.astype(np.int32, order="C"))


def _starts(length: Ints, cost: float, overhead: float, blocks: int) -> Floats:
    """When each item would start if `blocks` ran them in their order, in tiles of keys."""
    times = length.astype(np.float32) * np.float32(cost) + np.float32(overhead)
    # in fp32, so that starts which differ by rounding alone are equal and keep their order
    before = times.cumsum(dtype=np.float64).astype(np.float32) - times
    starts = before / np.float32(blocks)
    starts[:blocks] = 0
    return starts


def _tiles(sequences: Sequence[Queries], *, tile_tokens: int, tile_keys: int) -> tuple[Ints, int]:
    """Items with all keys each, and the most tiles of keys in which any of them needs a mask."""
    sequence, begin, end, keys, causal = np.array(sequences, dtype=np.int64).T
    several = end - begin > tile_tokens
    # aligned to the tiles of keys, so that no tile's diagonal crosses two of them
    low = begin - (keys - end + begin) % tile_tokens * (several & (causal > 0))
    number = -(-(end - low) // tile_tokens)
    at = np.arange(len(sequence)).repeat(number)
    sequence, begin, end, keys, causal, low = (
        each[at] for each in (sequence, begin, end, keys, causal, low)
    )
    first = low + _within(number) * tile_tokens
    shift = keys - end * causal
    last = np.minimum(first + tile_tokens, end) - 1 + shift
    count = np.minimum(last, keys - 1) // tile_keys + 1
    seen = np.maximum(first, begin) + shift + 1  # keys that the first query sees
    masked = max(0, int((count - seen // tile_keys).max()))
    items = np.zeros((len(at), ITEM_FIELDS), dtype=np.int64)
    columns = (sequence, first, begin, end, shift, keys, 0, count, -1, -1, 0, 1)
    for field, column in enumerate(columns):
        items[:, field] = column
    return items, masked


def _within(number: Ints) -> Ints:
    """0 to n - 1 for each n, one behind the other."""
    ends = number.cumsum()
    within: Ints = np.arange(ends[-1]) - (ends - number).repeat(number)
    return within


def _cut(tiles: Ints, pieces: Ints) -> tuple[Ints, Ints]:
    """The pieces of tiles, a tile's in a row, and the number of each within its tile."""
    piece = _within(pieces)
    items = tiles.repeat(pieces, 0)
    per_piece = (-(-tiles[:, 7] // pieces)).repeat(pieces)
    items[:, 6] = np.minimum(piece * per_piece, items[:, 7])
    items[:, 7] = np.minimum(items[:, 6] + per_piece, items[:, 7])
    items[:, 11] = pieces.repeat(pieces)
    return items, piece


def _number_slots(items: Ints, piece: Ints) -> tuple[torch.Tensor | None, int]:
    """Gives each piece of a cut tile a slot, in place; the merges, and how many slots."""
    cut = (items[:, 11] > 1).nonzero()[0]
    slots = len(cut)
    if not slots:
        return None, 0
    items[cut, 8] = np.arange(slots)
    items[cut, 10] = items[cut, 8] - piece[cut]
    heads = items[cut[piece[cut] == 0]]
    return _tensor(heads[:, [8, 11, 1, 2, 3]]), slots


def _order(items: Ints, piece: Ints) -> Ints:
    """The longest first; among items of about a length, the tiles of queries that share keys."""
    length = items[:, 7] - items[:, 6]
    quantum = max(int(length.max()) // LENGTHS_ALIKE, 1)
    return np.lexsort((-length, piece, -((length + quantum // 2) // quantum)))


def _pieces(
    count: Ints, *, kv_heads: int, blocks: int, filling: float = 0.0, bound: float = 0.0
) -> Ints:
    """Into how many pieces the keys of each tile are cut: the split with the least estimated time.

    The estimate is waves x (tiles of keys of a piece + its overhead) + the merge, or what else runs
    beside them, where that takes longer.

    filling  work of items that fill blocks which the last wave leaves idle, in tiles of keys
    bound    time below which the step cannot end, in tiles of keys
    """
    most = int(count.max())
    if len(count) * kv_heads >= 4 * blocks or most <= 1:  # enough tiles to even out
        return np.ones_like(count)
    split_C = np.arange(1, min(PIECES_MAX, most) + 1)
    size_C = -(-most // split_C)
    pieces_CI: Ints = np.maximum(-(-count // size_C[:, None]), 1)
    blocks_C = pieces_CI.sum(1) * kv_heads
    time_C = (-(-blocks_C // blocks) * (size_C + WAVE_COST)).astype(np.float64)
    if filling or bound:
        even_C = (kv_heads * (count.sum() + WAVE_COST * pieces_CI.sum(1)) + filling) / blocks
        time_C = np.maximum(np.maximum(time_C, even_C), bound)
    merge_C = PIECE_COST * split_C * (split_C > 1)
    best: Ints = pieces_CI[(time_C + merge_C).argmin()]
    return best


def packed_decodes(
    decodes: Sequence[Queries], *, tile_keys: int, blocks_a_head: int, least: int = 1
) -> WorkList:
    """The list of known sequences with one tile of queries each: on the host, no idle items."""
    sequence, begin, end, keys, causal = np.array(decodes, dtype=np.int64).T
    count = -(-keys // tile_keys)
    per_piece = max(-(-int(count.sum()) // blocks_a_head), least)
    pieces = np.maximum(-(-count // per_piece), 1)
    slot = pieces.cumsum() - pieces
    tiles = np.zeros((len(sequence), ITEM_FIELDS), dtype=np.int64)
    columns = (sequence, begin, begin, end, keys - end * causal, keys, 0, count, -1, -1, slot, 1)
    for field, column in enumerate(columns):
        tiles[:, field] = column
    items, piece = _cut(tiles, pieces)
    length = items[:, 7] - items[:, 6]
    items[:, 8] = np.where(items[:, 11] > 1, items[:, 10] + piece, -1)
    merges = np.stack((slot, pieces, begin, begin, end), axis=1)[pieces > 1]
    return WorkList(
        items_IF=_tensor(items[(-length).argsort(kind="stable")]),
        merges_MF=_tensor(merges) if len(merges) else None,
        slots=len(items),
        one_masked_tile=False,
        most_tokens=int((end - begin).max()),
        longest=int(length.max()),
    )

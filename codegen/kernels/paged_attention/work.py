"""The work lists of paged attention: which tiles of queries meet which tiles of keys, and when.

Built once a step, for all its layers, from numbers that the host already has; or, while a CUDA
graph is recorded, by tensor operations on the device, so that replays follow the lengths in the
step's tensors. A launch then reads its list, and no kernel searches for its sequence. A step with
chunks and decodes is one list (`mixed_list`), in which decodes read memory beside the chunks'
products.

A tile is up to `tile_tokens` queries of one sequence with all query heads of one KV head; its keys
come in tiles of `tile_keys`. Where tiles are too few to fill the chip their keys are cut in pieces,
each of which leaves a partial result that a second kernel merges.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

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


@dataclass(frozen=True, kw_only=True)
class Queries:
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
    heads_named: bool = False
    """Items name their KV head: those of a mixed step, in the order in which they should start."""
    counters: torch.Tensor | None = None
    """Zeros, one a slot and KV head, where the last piece of a tile merges it; zeros again when a
    launch has ended, so that layers and replays share them."""

    def to(self, device: torch.device) -> "WorkList":
        """The list in the memory of the device; the copy does not wait for it."""
        merges = self.merges_MF
        return WorkList(
            items_IF=_sent(self.items_IF, device),
            merges_MF=None if merges is None else _sent(merges, device),
            slots=self.slots,
            one_masked_tile=self.one_masked_tile,
            most_tokens=self.most_tokens,
            heads_named=self.heads_named,
        )

    def counting(self, kv_heads: int) -> "WorkList":
        """The list with counters, on the device of its items."""
        device = self.items_IF.device
        counters = torch.zeros(self.slots * kv_heads, dtype=torch.int32, device=device)
        return replace(self, counters=counters)


def _sent(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    # the driver takes up to 64 KiB of pageable memory into its queue at once
    pinned = host.pin_memory() if device.type == "cuda" and host.nbytes > 65_536 else host
    return pinned.to(device, non_blocking=True)


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
        items_IF=items[_order(items, piece)].int().contiguous(),
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
    narrow_pieces = (-(-narrow[:, 7] // part)).clamp(1, PIECES_MAX)
    items, piece = _cut(torch.cat((wide, narrow)), torch.cat((pieces, narrow_pieces)))
    merges, slots = _number_slots(items, piece)
    few = torch.arange(len(items)) >= int(pieces.sum())
    share = _share(int(pieces.sum()) * kv_heads, whole / (whole + filling), blocks)
    groups = torch.arange(kv_heads).view(-1, heads_together)
    order = _order(items[~few], piece[~few])
    spread = items[~few][order].repeat(len(groups), 1).repeat_interleave(heads_together, 0)
    spread[:, HEAD] = groups[:, None].expand(-1, len(order), -1).reshape(-1)
    late = items[few][_order(items[few], piece[few])].repeat_interleave(kv_heads, 0)
    late[:, HEAD] = torch.arange(kv_heads).repeat(int(few.sum()))
    starts = torch.cat(
        (
            _starts(spread, 1.0, WAVE_COST, share),
            _starts(late, decode_cost, DECODE_WAVE_COST, max(blocks - share, 1)),
        )
    )
    both = torch.cat((spread, late))[starts.argsort(stable=True)]
    return WorkList(
        items_IF=both.int().contiguous(),
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


def _starts(items: torch.Tensor, cost: float, overhead: float, blocks: int) -> torch.Tensor:
    """When each item would start if `blocks` ran them in their order, in tiles of keys."""
    times = (items[:, 7] - items[:, 6]) * cost + overhead
    starts = (times.cumsum(0) - times) / blocks
    starts[:blocks] = 0
    return starts


def _tiles(
    sequences: Sequence[Queries], *, tile_tokens: int, tile_keys: int
) -> tuple[torch.Tensor, int]:
    """Items with all keys each, and the most tiles of keys in which any of them needs a mask."""
    tiles, masked = [], 0
    for each in sequences:
        past = each.keys - (each.end - each.begin)
        several = each.end - each.begin > tile_tokens
        # aligned to the tiles of keys, so that no tile's diagonal crosses two of them
        skew = past % tile_tokens if each.causal and several else 0
        first = torch.arange(each.begin - skew, each.end, tile_tokens)
        shift = each.keys - each.end if each.causal else each.keys
        last = (first + tile_tokens).clamp_max(each.end) - 1 + shift
        count = last.clamp_max(each.keys - 1) // tile_keys + 1
        seen = first.clamp_min(each.begin) + shift + 1  # keys that the first query sees
        masked = max(masked, int((count - seen // tile_keys).max()))
        row = [each.sequence, 0, each.begin, each.end, shift, each.keys, 0, 0, -1, -1, 0, 1]
        rows = torch.tensor(row).repeat(len(first), 1)
        rows[:, 1], rows[:, 7] = first, count
        tiles.append(rows)
    return torch.cat(tiles), masked


def _cut(tiles: torch.Tensor, pieces: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pieces of tiles, a tile's in a row, and the number of each within its tile."""
    per_piece = -(-tiles[:, 7] // pieces)
    number = pieces.repeat_interleave(pieces)
    piece = torch.arange(len(number)) - (pieces.cumsum(0) - pieces).repeat_interleave(pieces)
    items, per_piece = (each.repeat_interleave(pieces, 0) for each in (tiles, per_piece))
    items[:, 6] = torch.minimum(piece * per_piece, items[:, 7])
    items[:, 7] = torch.minimum(items[:, 6] + per_piece, items[:, 7])
    items[:, 11] = number
    return items, piece


def _number_slots(items: torch.Tensor, piece: torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """Gives each piece of a cut tile a slot, in place; the merges, and how many slots."""
    cut = items[:, 11] > 1
    slots = int(cut.sum())
    if not slots:
        return None, 0
    items[cut, 8] = torch.arange(slots)
    items[cut, 10] = items[cut, 8] - piece[cut]
    heads = items[cut & (piece == 0)]
    return torch.cat((heads[:, 8:9], heads[:, 11:12], heads[:, 1:4]), dim=1).int(), slots


def _order(items: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
    """The longest first; among items of about a length, the tiles of queries that share keys."""
    length = items[:, 7] - items[:, 6]
    quantum = max(int(length.max()) // LENGTHS_ALIKE, 1)
    order = length.argsort(descending=True, stable=True)
    order = order[piece[order].argsort(stable=True)]
    alike = (length[order] + quantum // 2) // quantum
    return order[alike.argsort(descending=True, stable=True)]


def _pieces(
    count: torch.Tensor, *, kv_heads: int, blocks: int, filling: float = 0.0, bound: float = 0.0
) -> torch.Tensor:
    """Into how many pieces the keys of each tile are cut: the split with the least estimated time.

    The estimate is waves x (tiles of keys of a piece + its overhead) + the merge, or what else runs
    beside them, where that takes longer.

    filling  work of items that fill blocks which the last wave leaves idle, in tiles of keys
    bound    time below which the step cannot end, in tiles of keys
    """
    most = int(count.max())
    if len(count) * kv_heads >= 4 * blocks or most <= 1:  # enough tiles to even out
        return torch.ones_like(count)
    split_C = torch.arange(1, min(PIECES_MAX, most) + 1)
    size_C = -(-most // split_C)
    pieces_CI = (-(-count // size_C[:, None])).clamp_min(1)
    blocks_C = pieces_CI.sum(1) * kv_heads
    time_C = (-(-blocks_C // blocks) * (size_C + WAVE_COST)).double()
    if filling or bound:
        even_C = (kv_heads * (count.sum() + WAVE_COST * pieces_CI.sum(1)) + filling) / blocks
        time_C = time_C.maximum(even_C).clamp_min(bound)
    merge_C = PIECE_COST * split_C * (split_C > 1)
    return pieces_CI[(time_C + merge_C).argmin()]


def decode_list(
    *,
    sequence_B: torch.Tensor,
    begin_B: torch.Tensor,
    end_B: torch.Tensor,
    shift_B: torch.Tensor,
    keys_B: torch.Tensor,
    tile_keys: int,
    blocks_a_head: int,
    least: int = 1,
) -> WorkList:
    """The list of sequences with one tile of queries each, on the device of its arguments.

    Never waits: its size depends on shapes alone, so items behind the last have no tokens, and a
    merge of one slot is none.

    blocks_a_head  pieces that run at once, as the chip's blocks are shared by the KV heads
    least          tiles of keys of a piece: shorter ones cost the merge more than they save
    """
    batch, device = len(sequence_B), sequence_B.device
    count_B = -(-keys_B // tile_keys)
    per_piece = (-(-count_B.sum() // blocks_a_head)).clamp_min(least)
    pieces_B = (-(-count_B // per_piece)).clamp_min(1)
    ends_B = pieces_B.cumsum(0)
    first_B = ends_B - pieces_B
    # sum of ceil(count / per_piece) <= blocks_a_head + batch
    item_I = torch.arange(blocks_a_head + batch, device=device)
    b_I = torch.searchsorted(ends_B, item_I, right=True).clamp_max(batch - 1)
    used_I = item_I < ends_B[-1]
    even_B = -(-count_B // pieces_B)
    low_I = torch.minimum((item_I - first_B[b_I]) * even_B[b_I], count_B[b_I])
    high_I = torch.minimum(low_I + even_B[b_I], count_B[b_I])
    end_I = torch.where(used_I, end_B[b_I], begin_B[b_I])
    slot_I = torch.where(used_I & (pieces_B[b_I] > 1), item_I, -1)
    columns = (sequence_B[b_I], begin_B[b_I], begin_B[b_I], end_I, shift_B[b_I], keys_B[b_I])
    high_I = torch.where(used_I, high_I, low_I)
    tile = (torch.full_like(slot_I, -1), first_B[b_I], pieces_B[b_I])
    return WorkList(
        items_IF=torch.stack((*columns, low_I, high_I, slot_I, *tile), dim=1).int(),
        merges_MF=torch.stack((first_B, pieces_B, begin_B, begin_B, end_B), dim=1).int(),
        slots=blocks_a_head + batch,
        one_masked_tile=False,
    )


def packed_decodes(
    decodes: Sequence[Queries], *, tile_keys: int, blocks_a_head: int, least: int = 1
) -> WorkList:
    """The list of known sequences with one tile of queries each: on the host, no idle items."""
    rows = torch.tensor(
        [(each.sequence, each.begin, each.end, each.keys, each.causal) for each in decodes]
    )
    sequence_B, begin_B, end_B, keys_B, causal_B = rows.T.contiguous()
    whole = decode_list(
        sequence_B=sequence_B,
        begin_B=begin_B,
        end_B=end_B,
        shift_B=torch.where(causal_B > 0, keys_B - end_B, keys_B),
        keys_B=keys_B,
        tile_keys=tile_keys,
        blocks_a_head=blocks_a_head,
        least=least,
    )
    items, merges = whole.items_IF, whole.merges_MF
    assert merges is not None, "a decode list names all its tiles"
    used = int(merges[:, 1].sum())
    items = items[:used]
    order = (items[:, 7] - items[:, 6]).argsort(descending=True, stable=True)
    merges = merges[merges[:, 1] > 1]
    return WorkList(
        items_IF=items[order].contiguous(),
        merges_MF=merges.contiguous() if len(merges) else None,
        slots=used,
        one_masked_tile=False,
        most_tokens=max(each.end - each.begin for each in decodes),
    )


def recorded_decodes(
    starts_B1: torch.Tensor,
    keys_B: torch.Tensor,
    *,
    tile_keys: int,
    blocks_a_head: int,
    least: int = 1,
) -> WorkList:
    """The list of B sequences of at most one token in B rows, from tensors on the device.

    A sequence without a token takes one of the rows behind the last token, where it writes the
    result of no keys.
    """
    starts_B1, keys_B = starts_B1.long(), keys_B.long()
    empty_B = starts_B1[1:] == starts_B1[:-1]
    begin_B = torch.where(empty_B, starts_B1[-1] + empty_B.cumsum(0) - 1, starts_B1[:-1])
    keys_B = torch.where(empty_B, 0, keys_B)
    return decode_list(
        sequence_B=torch.arange(len(keys_B), device=keys_B.device),
        begin_B=begin_B,
        end_B=begin_B + 1,
        shift_B=keys_B - begin_B - 1,
        keys_B=keys_B,
        tile_keys=tile_keys,
        blocks_a_head=blocks_a_head,
        least=least,
    )

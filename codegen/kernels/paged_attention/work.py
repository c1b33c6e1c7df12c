"""The work lists of paged attention: which tiles of queries meet which tiles of keys, and when.

Built once a step, for all its layers, from numbers that the host already has; or, while a CUDA
graph is recorded, by tensor operations on the device, so that replays follow the lengths in the
step's tensors. A launch then reads its list, and no kernel searches for its sequence.

A tile is up to `tile_tokens` queries of one sequence with all query heads of one KV head; its keys
come in tiles of `tile_keys`. Where tiles are too few to fill the chip their keys are cut in pieces,
each of which leaves a partial result that a second kernel merges.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

ITEM_FIELDS = 9
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
"""
MERGE_FIELDS = 5
"""Columns of a merge, int32: first slot, slots, then columns 1 to 3 of its items."""
WAVE_COST = 10
"""What starting and ending a block costs, in tiles of keys (fit of TileOps, on an H200)."""
PIECE_COST = 0.22
"""What one more piece costs the merge, in tiles of keys (as above)."""
PIECES_MAX = 128


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
    """Each is run by one block per KV head; the longest first."""
    merges_MF: torch.Tensor | None
    """The tiles in pieces; None if there are none."""
    slots: int
    """Partial results, times the KV heads."""
    one_masked_tile: bool
    """Only the last tile of keys of a tile of queries can hold a key that a query must not see."""

    def to(self, device: torch.device) -> "WorkList":
        """The list in the memory of the device; the copy does not wait for it."""
        merges = self.merges_MF
        return WorkList(
            items_IF=_sent(self.items_IF, device),
            merges_MF=None if merges is None else _sent(merges, device),
            slots=self.slots,
            one_masked_tile=self.one_masked_tile,
        )


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
    tiles, masked = [], 0
    for chunk in chunks:
        past = chunk.keys - (chunk.end - chunk.begin)
        several = chunk.end - chunk.begin > tile_tokens
        # aligned to the tiles of keys, so that no tile's diagonal crosses two of them
        skew = past % tile_tokens if chunk.causal and several else 0
        first = torch.arange(chunk.begin - skew, chunk.end, tile_tokens)
        shift = chunk.keys - chunk.end if chunk.causal else chunk.keys
        last = (first + tile_tokens).clamp_max(chunk.end) - 1 + shift
        count = last.clamp_max(chunk.keys - 1) // tile_keys + 1
        seen = first.clamp_min(chunk.begin) + shift + 1  # keys that the first query sees
        masked = max(masked, int((count - seen // tile_keys).max()))
        row = [chunk.sequence, 0, chunk.begin, chunk.end, shift, chunk.keys, 0, 0, -1]
        rows = torch.tensor(row).repeat(len(first), 1)
        rows[:, 1], rows[:, 7] = first, count
        tiles.append(rows)
    items = torch.cat(tiles)
    count = items[:, 7]
    pieces = _pieces(count, kv_heads=kv_heads, blocks=blocks)
    per_piece = -(-count // pieces)
    number = pieces.repeat_interleave(pieces)
    piece = torch.arange(len(number)) - (pieces.cumsum(0) - pieces).repeat_interleave(pieces)
    items, per_piece = (each.repeat_interleave(pieces, 0) for each in (items, per_piece))
    items[:, 6] = torch.minimum(piece * per_piece, items[:, 7])
    items[:, 7] = torch.minimum(items[:, 6] + per_piece, items[:, 7])
    cut = number > 1
    slots = int(cut.sum())
    items[cut, 8] = torch.arange(slots)
    opening = cut & (piece == 0)
    heads = items[opening]
    merges = torch.cat((heads[:, 8:], number[opening, None], heads[:, 1:4]), dim=1)
    order = (items[:, 7] - items[:, 6]).argsort(descending=True, stable=True)
    return WorkList(
        items_IF=items[order].int().contiguous(),
        merges_MF=merges.int().contiguous() if slots else None,
        slots=slots,
        one_masked_tile=masked <= 1,
    )


def _pieces(count: torch.Tensor, *, kv_heads: int, blocks: int) -> torch.Tensor:
    """Into how many pieces the keys of each tile are cut: the split with the least estimated time.

    The estimate is waves x (tiles of keys of a piece + its overhead) + the merge.
    """
    most = int(count.max())
    if len(count) * kv_heads >= 4 * blocks or most <= 1:  # enough tiles to even out
        return torch.ones_like(count)
    split_C = torch.arange(1, min(PIECES_MAX, most) + 1)
    size_C = -(-most // split_C)
    pieces_CI = (-(-count // size_C[:, None])).clamp_min(1)
    waves_C = -(-pieces_CI.sum(1) * kv_heads // blocks)
    merge_C = PIECE_COST * split_C * (split_C > 1)
    return pieces_CI[(waves_C * (size_C + WAVE_COST) + merge_C).argmin()]


def decode_list(
    *,
    sequence_B: torch.Tensor,
    begin_B: torch.Tensor,
    end_B: torch.Tensor,
    shift_B: torch.Tensor,
    keys_B: torch.Tensor,
    tile_keys: int,
    blocks_a_head: int,
) -> WorkList:
    """The list of sequences with one tile of queries each, on the device of its arguments.

    Never waits: its size depends on shapes alone, so items behind the last have no tokens, and a
    merge of one slot is none.

    blocks_a_head  pieces that run at once, as the chip's blocks are shared by the KV heads
    """
    batch, device = len(sequence_B), sequence_B.device
    count_B = -(-keys_B // tile_keys)
    per_piece = (-(-count_B.sum() // blocks_a_head)).clamp_min(1)
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
    return WorkList(
        items_IF=torch.stack((*columns, low_I, high_I, slot_I), dim=1).int(),
        merges_MF=torch.stack((first_B, pieces_B, begin_B, begin_B, end_B), dim=1).int(),
        slots=blocks_a_head + batch,
        one_masked_tile=False,
    )


def packed_decodes(decodes: Sequence[Queries], *, tile_keys: int, blocks_a_head: int) -> WorkList:
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
    )


def recorded_decodes(
    starts_B1: torch.Tensor, keys_B: torch.Tensor, *, tile_keys: int, blocks_a_head: int
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
    )

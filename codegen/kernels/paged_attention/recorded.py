"""Work lists of recorded steps: by tensor operations on the device, so that replays of a CUDA graph
follow the lengths in the step's tensors. What a list holds: work.py.
"""

import torch

from .work import WorkList


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

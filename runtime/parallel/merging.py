"""The exchange between kvp groups on a GPU: one kernel packs, one merges, instead of thirty ops.

A packed share of n tokens is [n, N, H] outputs and then [n, N] log sums in fp32, as bytes; those
for all peers lie in one buffer, peer behind peer, and what comes back lies as what was sent.

S shared tokens of the step, E of them counted once a peer, G kvp groups, N query heads,
H head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LSE_BYTES = 4
HEADS_A_PROGRAM = 8


@triton.jit
def _entry(
    places_ptr,
    entries,
    at,
    heads,
    HEAD: tl.constexpr,
    SIZE: tl.constexpr,
    LSE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Offsets of an entry: of its outputs in elements of theirs, of its log sums in fp32."""
    before = tl.load(places_ptr + at).to(tl.int64)
    count = tl.load(places_ptr + entries + at).to(tl.int64)
    inside = tl.load(places_ptr + 2 * entries + at).to(tl.int64)
    start = before * heads * (HEAD * SIZE + LSE)
    out_at = start // SIZE + inside * heads * HEAD
    lse_at = (start + count * heads * HEAD * SIZE) // LSE + inside * heads
    if ALIGNED:
        out_at = tl.multiple_of(out_at, 16 // SIZE)
    return out_at, lse_at


@triton.jit(do_not_specialize=("entries", "heads"))
def pack_kernel(
    out_ptr,
    lse_ptr,
    rows_ptr,
    places_ptr,
    sent_ptr,
    sent_lse_ptr,
    entries,
    heads,
    HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LSE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Grid (E, N / HEADS)."""
    row = tl.load(rows_ptr + tl.program_id(0))
    out_at, lse_at = _entry(places_ptr, entries, tl.program_id(0), heads, HEAD, SIZE, LSE, ALIGNED)
    head_N = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside_N = head_N < heads
    at_NH = head_N[:, None] * HEAD + tl.arange(0, HEAD)[None, :]
    out_NH = tl.load(out_ptr + row * heads * HEAD + at_NH, mask=inside_N[:, None])
    tl.store(sent_ptr + out_at + at_NH, out_NH, mask=inside_N[:, None])
    lse_N = tl.load(lse_ptr + row * heads + head_N, mask=inside_N)
    tl.store(sent_lse_ptr + lse_at + head_N, lse_N, mask=inside_N)


@triton.jit(do_not_specialize=("entries", "shared", "heads"))
def merge_kernel(
    out_ptr,
    lse_ptr,
    rows_ptr,
    places_ptr,
    shares_ptr,
    received_ptr,
    received_lse_ptr,
    entries,
    shared,
    heads,
    GROUPS: tl.constexpr,
    HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LSE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Grid (S, N / HEADS): all shares of a token's heads, in the order of the groups."""
    token = tl.program_id(0)
    row = tl.load(rows_ptr + token)
    head_N = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside_N = head_N < heads
    at_NH = head_N[:, None] * HEAD + tl.arange(0, HEAD)[None, :]
    top_N = tl.full([HEADS], -3.4e38, tl.float32)  # -inf - -inf would be NaN
    for g in tl.static_range(GROUPS):
        share = tl.load(shares_ptr + g * shared + token)
        _, lse_at = _entry(
            places_ptr, entries, tl.maximum(share, 0), heads, HEAD, SIZE, LSE, ALIGNED
        )
        own_N = tl.load(
            lse_ptr + row * heads + head_N, mask=inside_N & (share == -2), other=-float("inf")
        )
        other_N = tl.load(
            received_lse_ptr + lse_at + head_N, mask=inside_N & (share >= 0), other=-float("inf")
        )
        top_N = tl.maximum(top_N, tl.maximum(own_N, other_N))
    total_N = tl.zeros([HEADS], tl.float32)
    acc_NH = tl.zeros([HEADS, HEAD], tl.float32)
    for g in tl.static_range(GROUPS):
        share = tl.load(shares_ptr + g * shared + token)
        out_at, lse_at = _entry(
            places_ptr, entries, tl.maximum(share, 0), heads, HEAD, SIZE, LSE, ALIGNED
        )
        mine_N, theirs_N = inside_N & (share == -2), inside_N & (share >= 0)
        own_N = tl.load(lse_ptr + row * heads + head_N, mask=mine_N, other=-float("inf"))
        other_N = tl.load(received_lse_ptr + lse_at + head_N, mask=theirs_N, other=-float("inf"))
        own_NH = tl.load(out_ptr + row * heads * HEAD + at_NH, mask=mine_N[:, None], other=0.0)
        other_NH = tl.load(received_ptr + out_at + at_NH, mask=theirs_N[:, None], other=0.0)
        weight_N = tl.exp(tl.maximum(own_N, other_N) - top_N)
        total_N += weight_N
        acc_NH += (own_NH.to(tl.float32) + other_NH.to(tl.float32)) * weight_N[:, None]
    merged_NH = acc_NH / tl.maximum(total_N, 1.0)[:, None]  # at least 1, or 0 without any key
    tl.store(
        out_ptr + row * heads * HEAD + at_NH,
        merged_NH.to(out_ptr.dtype.element_ty),
        mask=inside_N[:, None],
    )


def _aligned(heads: int, head_dim: int) -> bool:
    """Whether the outputs of every peer begin at a multiple of 16 bytes."""
    return heads % 4 == 0 and head_dim % 8 == 0


def pack_shares(out_TNH: Tensor, lse_TN: Tensor, rows_E: Tensor, places_3E: Tensor) -> Tensor:
    """Bytes for all peers.

    rows_E     int64, the token of each entry
    places_3E  int32: entries of the peers before its own, of its own, and its place among them
    """
    entries = len(rows_E)
    _, heads, head_dim = out_TNH.shape
    size = out_TNH.element_size()
    sent = out_TNH.new_empty(entries * heads * (head_dim * size + LSE_BYTES), dtype=torch.uint8)
    pack_kernel[entries, triton.cdiv(heads, HEADS_A_PROGRAM)](
        out_TNH,
        lse_TN,
        rows_E,
        places_3E,
        sent.view(out_TNH.dtype),
        sent.view(torch.float32),
        entries,
        heads,
        HEAD=head_dim,
        HEADS=HEADS_A_PROGRAM,
        SIZE=size,
        LSE=LSE_BYTES,
        ALIGNED=_aligned(heads, head_dim),
    )
    return sent


def merge_shares(
    out_TNH: Tensor,
    lse_TN: Tensor,
    rows_S: Tensor,
    shares_GS: Tensor,
    places_3E: Tensor,
    received: Tensor,
) -> None:
    """Replaces the shared rows of out_TNH by the attention over all groups' shares.

    shares_GS  int32, the entry of `received` that holds a group's share of a token; OWN or ABSENT
               of kvp.py
    received   as pack_shares made it, of the other groups
    """
    groups, shared = shares_GS.shape
    _, heads, head_dim = out_TNH.shape
    merge_kernel[shared, triton.cdiv(heads, HEADS_A_PROGRAM)](
        out_TNH,
        lse_TN,
        rows_S,
        places_3E,
        shares_GS,
        received.view(out_TNH.dtype),
        received.view(torch.float32),
        places_3E.shape[1],
        shared,
        heads,
        GROUPS=groups,
        HEAD=head_dim,
        HEADS=HEADS_A_PROGRAM,
        SIZE=out_TNH.element_size(),
        LSE=LSE_BYTES,
        ALIGNED=_aligned(heads, head_dim),
    )

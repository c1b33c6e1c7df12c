"""Merges the partial attention of kvp groups in place, in one launch: HEADS of a token a program.

All shares of a token's heads are added in the order of the groups, so that all groups of a token go
on with the same bits. S shared tokens, G groups, N query heads, H head size; bytes and tables as in
reference.py.
"""

import torch
import triton
import triton.language as tl

from codegen.kernels.kvp_pack.places import aligned, entry_of

HEADS = 8
"""Heads that a program merges."""
OWN: tl.constexpr = tl.constexpr(-2)
"""As in reference.py."""


@triton.jit(do_not_specialize=("entries", "shared", "heads"))
def kvp_merge_kernel(
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
    ALIGNED: tl.constexpr,
):
    token = tl.program_id(0)
    row = tl.load(rows_ptr + token)
    head_N = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside_N = head_N < heads
    at_NH = head_N[:, None] * HEAD + tl.arange(0, HEAD)[None, :]
    top_N = tl.full([HEADS], -3.4e38, tl.float32)  # -inf - -inf would be NaN
    for g in tl.static_range(GROUPS):
        share = tl.load(shares_ptr + g * shared + token)
        _, lse_at = entry_of(places_ptr, entries, tl.maximum(share, 0), heads, HEAD, SIZE, ALIGNED)
        own_N = tl.load(
            lse_ptr + row * heads + head_N, mask=inside_N & (share == OWN), other=-float("inf")
        )
        other_N = tl.load(
            received_lse_ptr + lse_at + head_N, mask=inside_N & (share >= 0), other=-float("inf")
        )
        top_N = tl.maximum(top_N, tl.maximum(own_N, other_N))
    total_N = tl.zeros([HEADS], tl.float32)
    acc_NH = tl.zeros([HEADS, HEAD], tl.float32)
    for g in tl.static_range(GROUPS):
        share = tl.load(shares_ptr + g * shared + token)
        out_at, lse_at = entry_of(
            places_ptr, entries, tl.maximum(share, 0), heads, HEAD, SIZE, ALIGNED
        )
        mine_N, theirs_N = inside_N & (share == OWN), inside_N & (share >= 0)
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


def kvp_merge(
    out_TNH: torch.Tensor,
    lse_TN: torch.Tensor,
    rows_S: torch.Tensor,
    shares_GS: torch.Tensor,
    places_3E: torch.Tensor,
    received: torch.Tensor,
) -> torch.Tensor:
    """Replaces the shared rows of out_TNH by the attention over all groups' shares; returns it.

    out_TNH, lse_TN  contiguous
    shares_GS  int32, the entry of `received` that holds a group's share of a token, or OWN, or -1
    received   the peers' shares as kvp_pack makes them
    """
    groups, shared = shares_GS.shape
    _, heads, head_dim = out_TNH.shape
    kvp_merge_kernel[shared, triton.cdiv(heads, HEADS)](
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
        HEADS=HEADS,
        SIZE=out_TNH.element_size(),
        ALIGNED=aligned(heads, head_dim),
    )
    return out_TNH

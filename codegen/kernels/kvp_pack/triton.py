"""Packs what kvp groups send each other, for all peers in one launch: HEADS of an entry a program.

E entries, N query heads, H head size; bytes and tables as in reference.py.
"""

import torch
import triton
import triton.language as tl

from .places import aligned, entry_of

HEADS = 8
"""Heads that a program copies."""


@triton.jit(do_not_specialize=("entries", "heads"))
def kvp_pack_kernel(
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
    ALIGNED: tl.constexpr,
):
    row = tl.load(rows_ptr + tl.program_id(0))
    out_at, lse_at = entry_of(places_ptr, entries, tl.program_id(0), heads, HEAD, SIZE, ALIGNED)
    head_N = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside_N = head_N < heads
    at_NH = head_N[:, None] * HEAD + tl.arange(0, HEAD)[None, :]
    out_NH = tl.load(out_ptr + row * heads * HEAD + at_NH, mask=inside_N[:, None])
    tl.store(sent_ptr + out_at + at_NH, out_NH, mask=inside_N[:, None])
    lse_N = tl.load(lse_ptr + row * heads + head_N, mask=inside_N)
    tl.store(sent_lse_ptr + lse_at + head_N, lse_N, mask=inside_N)


def kvp_pack(
    out_TNH: torch.Tensor,
    lse_TN: torch.Tensor,
    rows_E: torch.Tensor,
    places_3E: torch.Tensor,
) -> torch.Tensor:
    """Bytes for all peers.

    out_TNH, lse_TN  contiguous
    rows_E     int64, the token of each entry; at least one
    places_3E  int32: entries of the peers before its own, of its own, and its place among them
    """
    entries = len(rows_E)
    _, heads, head_dim = out_TNH.shape
    size = out_TNH.element_size()
    sent = torch.empty(
        entries * heads * (head_dim * size + 4), dtype=torch.uint8, device=out_TNH.device
    )
    kvp_pack_kernel[entries, triton.cdiv(heads, HEADS)](
        out_TNH,
        lse_TN,
        rows_E,
        places_3E,
        sent.view(out_TNH.dtype),
        sent.view(torch.float32),
        entries,
        heads,
        HEAD=head_dim,
        HEADS=HEADS,
        SIZE=size,
        ALIGNED=aligned(heads, head_dim),
    )
    return sent

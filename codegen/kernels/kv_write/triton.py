"""Stores a step's keys and values in the pages: one token a program, both rows in one launch."""

import torch
import triton
import triton.language as tl

ELEMENTS_A_WARP = 256
"""Elements of a row per warp: 8 a thread are one access of 16 bytes."""


@triton.jit
def kv_write_kernel(
    k_ptr,
    v_ptr,
    k_pages_ptr,
    v_pages_ptr,
    slots_ptr,
    k_stride,
    v_stride,
    width,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    at = tl.arange(0, BLOCK)
    inside = (at < width) & (slot >= 0)
    k = tl.load(k_ptr + token * k_stride + at, mask=inside)
    v = tl.load(v_ptr + token * v_stride + at, mask=inside)
    into = slot * width + at
    tl.store(k_pages_ptr + into, k.to(k_pages_ptr.dtype.element_ty), mask=inside)
    tl.store(v_pages_ptr + into, v.to(v_pages_ptr.dtype.element_ty), mask=inside)


def kv_write(
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots_T: torch.Tensor,
) -> torch.Tensor:
    """Writes row t at slot page x page_tokens + offset; a row of slot -1 is stored nowhere."""
    tokens, heads, head_dim = k_TKH.shape
    if not tokens:
        return k_pages
    width = heads * head_dim
    k_TW, v_TW = k_TKH.reshape(tokens, width), v_TKH.reshape(tokens, width)
    block = triton.next_power_of_2(width)
    kv_write_kernel[(tokens,)](
        k_TW,
        v_TW,
        k_pages,
        v_pages,
        slots_T,
        k_TW.stride(0),
        v_TW.stride(0),
        width,
        BLOCK=block,
        num_warps=min(max(block // ELEMENTS_A_WARP, 1), 8),
    )
    return k_pages

"""Stores a step's keys and values in the pages: one token a program, both rows in one launch.

K KV heads, H head size.
"""

import torch
import triton
import triton.language as tl

ELEMENTS_A_WARP = 256
"""Elements of a row per warp: 8 a thread are one access of 16 bytes."""
LEAST_SCALE: tl.constexpr = tl.constexpr(0.015625)
"""2^-6, as in reference.py."""


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


@triton.jit
def _e4m3(x):
    """x in fp32, up to 448, rounded to a value of e4m3, half to even.

    The cast then has nothing to round: Triton's interpreter (3.7.1) loses the carry of a mantissa.
    """
    bits = x.to(tl.int32, bitcast=True)
    kept = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # 3 of 23 bits
    small = (x + 24576.0) - 24576.0  # 1.5 x 2^14, where fp32 has steps of 2^-9
    return tl.where(tl.abs(x) < 0.015625, small, kept.to(tl.float32, bitcast=True))


@triton.jit
def _store_scaled(
    x_ptr,
    stride,
    pages_ptr,
    scales_ptr,
    token,
    lead,
    here,
    slot,
    page,
    offset,
    kv_heads,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
):
    """One token's row as fp8, by the scale of its page."""
    head_K = tl.arange(0, HEADS)
    at_KH = head_K[:, None] * HEAD + tl.arange(0, HEAD)[None, :]
    inside_K = (head_K < kv_heads) & (slot >= 0)
    first_KH = tl.load(x_ptr + lead * stride + at_KH, mask=(inside_K & here)[:, None], other=0.0)
    most_K = tl.max(tl.abs(first_KH.to(tl.float32)), 1)
    power_K = (most_K.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power_K = tl.where(power_K > 0, tl.maximum(power_K, LEAST_SCALE), 1.0)
    scale_ptrs = scales_ptr + page * kv_heads + head_K
    stored_K = tl.load(scale_ptrs, mask=inside_K & (here == 0), other=1.0)
    scale_K = tl.where(here, power_K, stored_K)
    tl.store(scale_ptrs, scale_K, mask=inside_K & here & (offset == 0))
    x_KH = tl.load(x_ptr + token * stride + at_KH, mask=inside_K[:, None], other=0.0)
    # powers of two: the division is exact, but for what becomes too small to matter
    x_KH = _e4m3(tl.clamp(x_KH.to(tl.float32) / scale_K[:, None], -448.0, 448.0))
    into_KH = slot * (kv_heads * HEAD) + at_KH
    tl.store(pages_ptr + into_KH, x_KH.to(pages_ptr.dtype.element_ty), mask=inside_K[:, None])


@triton.jit(do_not_specialize=("kv_heads",))
def kv_write_scaled_kernel(
    k_ptr,
    v_ptr,
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
    slots_ptr,
    k_stride,
    v_stride,
    kv_heads,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    page = slot // PAGE
    offset = slot - page * PAGE
    # the page's first token, if this step brings it: the rows between belong to one sequence
    lead = token - offset
    lead_slot = tl.load(slots_ptr + lead, mask=(slot >= 0) & (lead >= 0), other=-1)
    here = (slot >= 0) & (lead >= 0) & (lead_slot == slot - offset)
    _store_scaled(
        k_ptr, k_stride, k_pages_ptr, k_scales_ptr, token, lead, here, slot, page, offset, kv_heads,
        HEADS, HEAD,
    )  # fmt: skip
    _store_scaled(
        v_ptr, v_stride, v_pages_ptr, v_scales_ptr, token, lead, here, slot, page, offset, kv_heads,
        HEADS, HEAD,
    )  # fmt: skip


def kv_write(
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots_T: torch.Tensor,
    k_scales_PK: torch.Tensor | None = None,
    v_scales_PK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes row t at slot page x page_tokens + offset; a row of slot -1 is stored nowhere.

    scales  fp32, of pages in fp8: a page holds x / scale; written where a page begins
    """
    tokens, heads, head_dim = k_TKH.shape
    if not tokens:
        return k_pages
    width = heads * head_dim
    k_TW, v_TW = k_TKH.reshape(tokens, width), v_TKH.reshape(tokens, width)
    block = triton.next_power_of_2(width)
    warps = min(max(block // ELEMENTS_A_WARP, 1), 8)
    if k_scales_PK is not None:
        kv_write_scaled_kernel[(tokens,)](
            k_TW,
            v_TW,
            k_pages,
            v_pages,
            k_scales_PK,
            v_scales_PK,
            slots_T,
            k_TW.stride(0),
            v_TW.stride(0),
            heads,
            PAGE=k_pages.shape[1],
            HEADS=triton.next_power_of_2(heads),
            HEAD=head_dim,
            num_warps=warps,
        )
        return k_pages
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
        num_warps=warps,
    )
    return k_pages

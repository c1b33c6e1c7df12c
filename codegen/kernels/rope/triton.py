"""Rotary position embedding: up to 16 heads of a token a program, which share its angles.

A step's queries or keys may be part of wider rows, as a fused projection leaves them.
"""

import torch
import triton
import triton.language as tl

ELEMENTS_A_WARP = 512
"""Pairs of a token per warp."""
HEADS = 16
"""Heads of a program at most."""


@triton.jit
def rope_kernel(
    x_ptr,
    positions_ptr,
    inv_freq_ptr,
    out_ptr,
    x_stride,
    heads,
    half,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_H2: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at_H2 = tl.arange(0, BLOCK_H2)
    inside = (head_N < heads)[:, None] & (at_H2 < half)[None, :]
    at_NH2 = head_N[:, None] * (2 * half) + at_H2[None, :]
    x_ptr += token * x_stride
    # before the angles, whose slow paths no load is moved across
    a = tl.load(x_ptr + at_NH2, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + half + at_NH2, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(positions_ptr + token).to(tl.float32)
    angle_H2 = position * tl.load(inv_freq_ptr + at_H2, mask=at_H2 < half, other=0.0)
    # fp32 sines of angles past 1e5 take a slow path, three times the time of all the rest; a few
    # steps in fp64 bring the very same angle into half a turn
    turns_H2 = angle_H2.to(tl.float64) * 0.15915494309189535
    angle_H2 = ((turns_H2 - tl.floor(turns_H2 + 0.5)) * 6.283185307179586).to(tl.float32)
    cos_H2 = (tl.cos(angle_H2) * scale)[None, :]
    sin_H2 = (tl.sin(angle_H2) * scale)[None, :]
    out_ptr += token * (2 * heads * half)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + at_NH2, (a * cos_H2 - b * sin_H2).to(dtype), mask=inside)
    tl.store(out_ptr + half + at_NH2, (b * cos_H2 + a * sin_H2).to(dtype), mask=inside)


def rope(
    x_TNH: torch.Tensor, positions_T: torch.Tensor, inv_freq_H2: torch.Tensor, scale: float
) -> torch.Tensor:
    """Each head turned by position x frequency, in fp32; scale is the attention factor of yarn."""
    tokens, heads, head_dim = x_TNH.shape
    x_TW = x_TNH.reshape(tokens, heads * head_dim)
    out_TNH = torch.empty((tokens, heads, head_dim), dtype=x_TNH.dtype, device=x_TNH.device)
    if tokens:
        block_n = min(triton.next_power_of_2(heads), HEADS)
        block_h2 = triton.next_power_of_2(head_dim // 2)
        rope_kernel[(tokens, triton.cdiv(heads, block_n))](
            x_TW,
            positions_T,
            inv_freq_H2,
            out_TNH,
            x_TW.stride(0),
            heads,
            head_dim // 2,
            scale,
            BLOCK_N=block_n,
            BLOCK_H2=block_h2,
            num_warps=min(max(block_n * block_h2 // ELEMENTS_A_WARP, 1), 8),
        )
    return out_TNH

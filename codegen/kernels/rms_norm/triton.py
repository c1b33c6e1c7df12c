"""RMSNorm in one pass over memory: one row a program, fp32 inside, rounded as the reference is.

Pointer loads, since a norm that reads through TMA is no faster and was slower in Triton 3.6.
"""

import torch
import triton
import triton.language as tl

MAX_BLOCK = 16384
"""Longest row held in registers; longer ones are read twice."""
ELEMENTS_A_WARP = 1024
"""Elements of a row per warp: 32 a thread leave the fp32 copy in registers."""


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    normed_ptr,
    heads,
    stride_t,
    stride_n,
    width,
    eps,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows x width passes 2^31 at 262144 tokens of 8192
    x_ptr += row // heads * stride_t + row % heads * stride_n
    normed_ptr += row * width
    at = tl.arange(0, BLOCK)
    if WHOLE:
        x = tl.load(x_ptr + at, mask=at < width, other=0.0)
        x32 = x.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(x32 * x32) / width + eps)
        weight = tl.load(weight_ptr + at, mask=at < width, other=0.0)
        normed = (x32 * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)
        tl.store(normed_ptr + at, normed.to(x.dtype), mask=at < width)
    else:
        squares = tl.zeros([BLOCK], tl.float32)
        for first in range(0, width, BLOCK):
            x32 = tl.load(x_ptr + first + at, mask=first + at < width, other=0.0).to(tl.float32)
            squares += x32 * x32
        scale = 1.0 / tl.sqrt(tl.sum(squares) / width + eps)
        for first in range(0, width, BLOCK):
            inside = first + at < width
            x = tl.load(x_ptr + first + at, mask=inside, other=0.0)
            weight = tl.load(weight_ptr + first + at, mask=inside, other=0.0)
            normed = (x.to(tl.float32) * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)
            tl.store(normed_ptr + first + at, normed.to(x.dtype), mask=inside)


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) in fp32, rounded to x's dtype, times weight.

    x is [T, D], or [T, N, D] with any strides but the last, as heads of a fused projection have.
    """
    width = x_TD.shape[-1]
    if x_TD.stride(-1) != 1:
        x_TD = x_TD.contiguous()
    heads = x_TD.shape[1] if x_TD.dim() == 3 else 1
    normed = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    block = min(triton.next_power_of_2(width), MAX_BLOCK)
    rms_norm_kernel[(x_TD.numel() // width,)](
        x_TD,
        weight_D,
        normed,
        heads,
        x_TD.stride(0),
        x_TD.stride(1) if x_TD.dim() == 3 else 0,
        width,
        eps,
        BLOCK=block,
        WHOLE=width <= block,
        num_warps=max(block // ELEMENTS_A_WARP, 1),
        num_stages=1,
    )
    return normed

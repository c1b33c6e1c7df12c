"""Residual add and RMSNorm in one pass over memory: one row a program, rounded as the reference is.

Reads x, the residual and the weight once and writes the norm and the sum once: 8 bytes an element
in 16 bits, against 14 of an add and a norm apart.
"""

import torch
import triton
import triton.language as tl

MAX_BLOCK = 16384
"""Longest row held in registers; longer ones are read twice."""
ELEMENTS_A_WARP = 1024
"""Elements of a row per warp: 32 a thread leave the fp32 copy in registers."""


@triton.jit
def add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    sum_ptr,
    width,
    eps,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * width  # passes 2^31 at 262144 tokens of 8192
    at = tl.arange(0, BLOCK)
    if WHOLE:
        inside = at < width
        x = tl.load(x_ptr + start + at, mask=inside, other=0.0)
        residual = tl.load(residual_ptr + start + at, mask=inside, other=0.0)
        # the norm reads the sum as it is stored, rounded
        total = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + start + at, total, mask=inside)
        total32 = total.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(total32 * total32) / width + eps)
        weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
        normed = (total32 * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)
        tl.store(normed_ptr + start + at, normed.to(x.dtype), mask=inside)
    else:
        squares = tl.zeros([BLOCK], tl.float32)
        for first in range(0, width, BLOCK):
            inside = first + at < width
            x = tl.load(x_ptr + start + first + at, mask=inside, other=0.0)
            residual = tl.load(residual_ptr + start + first + at, mask=inside, other=0.0)
            total = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
            tl.store(sum_ptr + start + first + at, total, mask=inside)
            squares += total.to(tl.float32) * total.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(squares) / width + eps)
        for first in range(0, width, BLOCK):
            # added again, not read back: a thread may not see what another one stored
            inside = first + at < width
            x = tl.load(x_ptr + start + first + at, mask=inside, other=0.0)
            residual = tl.load(residual_ptr + start + first + at, mask=inside, other=0.0)
            total = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
            weight = tl.load(weight_ptr + first + at, mask=inside, other=0.0)
            normed = (total.to(tl.float32) * scale).to(x.dtype).to(tl.float32)
            normed = normed * weight.to(tl.float32)
            tl.store(normed_ptr + start + first + at, normed.to(x.dtype), mask=inside)


def add_rms_norm(
    x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, sum): sum = x + residual in their dtype, normed = RMSNorm of sum."""
    width = x_TD.shape[-1]
    x_TD, residual_TD = x_TD.contiguous(), residual_TD.contiguous()
    normed_TD, sum_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
    block = min(triton.next_power_of_2(width), MAX_BLOCK)
    add_rms_norm_kernel[(x_TD.numel() // width,)](
        x_TD,
        residual_TD,
        weight_D,
        normed_TD,
        sum_TD,
        width,
        eps,
        BLOCK=block,
        WHOLE=width <= block,
        num_warps=max(block // ELEMENTS_A_WARP, 1),
        num_stages=1,
    )
    return normed_TD, sum_TD

"""Sines and cosines of a step's positions: one token a program."""

import torch
import triton
import triton.language as tl

WARPS = 1


@triton.jit
def rotary_kernel(positions_ptr, inv_freq_ptr, cos_sin_ptr, half, scale, BLOCK_H2: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.float32)
    at_H2 = tl.arange(0, BLOCK_H2)
    inside = at_H2 < half
    angle_H2 = position * tl.load(inv_freq_ptr + at_H2, mask=inside, other=0.0)
    # fp32 sines of angles past 1e5 take a slow path, three times the time of all the rest; a few
    # steps in fp64 bring the very same angle into half a turn
    turns_H2 = angle_H2.to(tl.float64) * 0.15915494309189535
    angle_H2 = ((turns_H2 - tl.floor(turns_H2 + 0.5)) * 6.283185307179586).to(tl.float32)
    cos_sin_ptr += token * (2 * half) + at_H2
    tl.store(cos_sin_ptr, tl.cos(angle_H2) * scale, mask=inside)
    tl.store(cos_sin_ptr + half, tl.sin(angle_H2) * scale, mask=inside)


def rotary(positions_T: torch.Tensor, inv_freq_H2: torch.Tensor, scale: float) -> torch.Tensor:
    """fp32 [T, 2, H / 2]: cosines, then sines, of position x frequency, times the yarn scale."""
    tokens, half = positions_T.shape[0], inv_freq_H2.shape[0]
    cos_sin_T2H2 = torch.empty((tokens, 2, half), dtype=torch.float32, device=positions_T.device)
    if tokens:
        rotary_kernel[(tokens,)](
            positions_T,
            inv_freq_H2,
            cos_sin_T2H2,
            half,
            scale,
            BLOCK_H2=triton.next_power_of_2(half),
            num_warps=WARPS,
        )
    return cos_sin_T2H2

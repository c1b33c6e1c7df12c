"""Residual add and the RMSNorm behind it, in one pass over memory."""

import torch


def add_rms_norm(
    x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, sum): sum = x + residual in their dtype, normed = RMSNorm of sum.

    The norm reads the rounded sum, as it does where both are separate, and is computed in fp32,
    rounded, and then multiplied by the weight.
    """
    sum_TD = x_TD + residual_TD
    x = sum_TD.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x.to(sum_TD.dtype) * weight_D, sum_TD

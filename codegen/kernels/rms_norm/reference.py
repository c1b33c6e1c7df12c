"""RMSNorm over the last dim (arXiv 1910.07467), rounded in the order of the Llama checkpoints."""

import torch


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) in fp32, rounded to x's dtype, times weight; any leading dims."""
    x = x_TD.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x.to(x_TD.dtype) * weight_D

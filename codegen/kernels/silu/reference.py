"""The gate's activation."""

import torch


def silu(x_TF: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x)."""
    return torch.nn.functional.silu(x_TF)

"""Product of two values."""

import torch


def mul(a_TF: torch.Tensor, b_TF: torch.Tensor) -> torch.Tensor:
    """a * b."""
    return a_TF * b_TF

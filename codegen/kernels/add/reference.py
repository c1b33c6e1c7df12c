"""Sum of two values."""

import torch


def add(a_TD: torch.Tensor, b_TD: torch.Tensor) -> torch.Tensor:
    """a + b."""
    return a_TD + b_TD

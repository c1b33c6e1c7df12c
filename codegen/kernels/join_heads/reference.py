"""Heads seen as one row again."""

import torch


def join_heads(x_TNH: torch.Tensor) -> torch.Tensor:
    """x_TO, a view of what attention wrote."""
    return x_TNH.flatten(-2)

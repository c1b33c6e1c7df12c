"""A projection seen as heads."""

import torch


def split_heads(x_TO: torch.Tensor, head_dim: int) -> torch.Tensor:
    """x_TNH, a view."""
    return x_TO.view(*x_TO.shape[:-1], -1, head_dim)

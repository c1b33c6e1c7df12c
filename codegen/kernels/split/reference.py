"""The parts of a fused projection."""

import torch


def split(x_TO: torch.Tensor, sizes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Views of the last dim, cut by sizes."""
    return torch.split_with_sizes(x_TO, sizes, dim=-1)

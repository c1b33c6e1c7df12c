"""The parts of a fused projection."""

import torch


def split(x_TO: torch.Tensor, sizes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Views of the last dim, cut by sizes."""
    return x_TO.split(sizes, dim=-1)

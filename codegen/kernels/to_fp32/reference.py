"""Logits leave the program in fp32."""

import torch


def to_fp32(x_RV: torch.Tensor) -> torch.Tensor:
    """x in fp32; x itself if it is already."""
    return x_RV.float()

"""Sines and cosines of a step's positions, once for all its layers."""

import torch


def rotary(positions_T: torch.Tensor, inv_freq_H2: torch.Tensor, scale: float) -> torch.Tensor:
    """fp32 [T, 2, H / 2]: cosines, then sines, of position x frequency, times the yarn scale."""
    angle_TH2 = positions_T[:, None].float() * inv_freq_H2
    return torch.stack((angle_TH2.cos() * scale, angle_TH2.sin() * scale), dim=1)

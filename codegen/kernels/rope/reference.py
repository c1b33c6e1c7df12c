"""Rotary position embedding, halves rotated (NeoX layout; arXiv 2104.09864)."""

import torch


def rope(
    x_TNH: torch.Tensor, positions_T: torch.Tensor, inv_freq_H2: torch.Tensor, scale: float
) -> torch.Tensor:
    """Each head turned by position x frequency, in fp32; scale is the attention factor of yarn."""
    angle_TH2 = positions_T[:, None].float() * inv_freq_H2
    cos_T1H2 = (angle_TH2.cos() * scale)[:, None]
    sin_T1H2 = (angle_TH2.sin() * scale)[:, None]
    a_TNH2, b_TNH2 = x_TNH.float().chunk(2, dim=-1)
    turned = (a_TNH2 * cos_T1H2 - b_TNH2 * sin_T1H2, b_TNH2 * cos_T1H2 + a_TNH2 * sin_T1H2)
    return torch.cat(turned, dim=-1).to(x_TNH.dtype)

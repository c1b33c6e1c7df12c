"""Projection to queries, keys and values; their norms and rotation; keys and values stored."""

import torch

from codegen.kernels.kv_write.reference import kv_write
from codegen.kernels.rms_norm.reference import rms_norm


def qkv_rope_write(
    x_TD: torch.Tensor,
    weight_OD: torch.Tensor,
    bias_O: torch.Tensor | None,
    q_norm_H: torch.Tensor | None,
    k_norm_H: torch.Tensor | None,
    eps: float,
    cos_sin_T2H2: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots_T: torch.Tensor,
    k_scales_PK: torch.Tensor | None = None,
    v_scales_PK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, written): q as attention reads it; written is k_pages.

    weight_OD  rows of queries, of keys, of values
    q_norm_H   and k_norm_H: both None for no norm, which eps is for
    scales     of pages in fp8, as kv_write leaves them
    """
    kv_heads, head_dim = k_pages.shape[2:]
    heads = weight_OD.shape[0] // head_dim - 2 * kv_heads
    y_TO = torch.nn.functional.linear(x_TD, weight_OD, bias_O)
    y_TNH = y_TO.view(-1, heads + 2 * kv_heads, head_dim)
    q_TNH, k_TKH, v_TKH = torch.split_with_sizes(y_TNH, (heads, kv_heads, kv_heads), dim=1)
    if q_norm_H is not None and k_norm_H is not None:
        q_TNH, k_TKH = rms_norm(q_TNH, q_norm_H, eps), rms_norm(k_TKH, k_norm_H, eps)
    k_TKH = _turned(k_TKH, cos_sin_T2H2)
    cache = (k_pages, v_pages, slots_T, k_scales_PK, v_scales_PK)
    return _turned(q_TNH, cos_sin_T2H2), kv_write(k_TKH, v_TKH, *cache)


def _turned(x_TNH: torch.Tensor, cos_sin_T2H2: torch.Tensor) -> torch.Tensor:
    """As `rope`, whose sines and cosines these are."""
    cos_T1H2, sin_T1H2 = cos_sin_T2H2[:, :1], cos_sin_T2H2[:, 1:]
    a_TNH2, b_TNH2 = x_TNH.float().chunk(2, dim=-1)
    turned = (a_TNH2 * cos_T1H2 - b_TNH2 * sin_T1H2, b_TNH2 * cos_T1H2 + a_TNH2 * sin_T1H2)
    return torch.cat(turned, dim=-1).to(x_TNH.dtype)

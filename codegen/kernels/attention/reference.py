"""Attention of one whole sequence without a cache: what the model file means."""

import torch


def attention(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal softmax(q k^T scale) v; N / K query heads share a KV head."""
    out_NTH = torch.nn.functional.scaled_dot_product_attention(
        q_TNH.transpose(0, 1)[None],
        k_TKH.transpose(0, 1)[None],
        v_TKH.transpose(0, 1)[None],
        is_causal=True,
        scale=scale,
        enable_gqa=True,
    )[0]
    return out_NTH.transpose(0, 1).contiguous()

"""Queries, keys and values from the residual stream to attention and the pages.

Few tokens: one kernel, which streams the weights (core.py of `linear`) and has norm, rotation and
the paged write as its epilogue; a tile's halves are those of heads. More tokens:
the library's GEMM, and one pass over its result (pointwise.py).

The scale of a page in fp8 is that of its first token, which is another row of the product: so keys
and values then go to rows of their own, and kv_write takes them from there.
"""

import torch

from codegen.kernels.kv_write.triton import kv_write
from codegen.kernels.linear.core import HEADS, Choice, Heads, stream, takes

from .pointwise import finish_heads

TOKENS_MAX = 64
"""Steps of more tokens take the library."""
SHORT_K = 256
"""Inputs of a buffer in steps of at most 32 tokens."""
LONG_K = 128
LEAST_BLOCKS = 64
"""With fewer tiles than these, blocks share them."""
WIDE_TILES = 264
"""From so many tiles of 64 rows on, a tile gets 128."""
OVERLAP = 1
"""1: weights are fetched while the kernel before still runs."""
NORM_TOKENS_MAX = 32
"""The same where heads are normed: a tile then holds a whole head, so there are fewer."""
HEADS_A_BLOCK = 16
"""Heads of a token that one block of pointwise.py takes."""


def choice() -> Choice:
    """The tunables as they are now: a tuner changes them."""
    return Choice(
        short_k=SHORT_K,
        long_k=LONG_K,
        least_blocks=LEAST_BLOCKS,
        wide_tiles=WIDE_TILES,
        overlap=OVERLAP == 1,
    )


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
    """(q, written): q as attention reads it; written is k_pages."""
    tokens = x_TD.shape[0]
    kv_heads, head_dim = k_pages.shape[2:]
    into = (k_pages, v_pages, slots_T)
    if k_scales_PK is not None:
        rows = (tokens, kv_heads, head_dim)
        staged = [torch.empty(rows, dtype=x_TD.dtype, device=x_TD.device) for _ in "kv"]
        into = (staged[0], staged[1], torch.arange(tokens, device=x_TD.device))
    heads = Heads(
        heads=weight_OD.shape[0] // head_dim - 2 * kv_heads,
        kv_heads=kv_heads,
        q_norm_H=q_norm_H,
        k_norm_H=k_norm_H,
        eps=eps,
        cos_sin_T2H2=cos_sin_T2H2,
        k_pages=into[0],
        v_pages=into[1],
        slots_T=into[2],
    )
    q_TO = torch.empty((tokens, heads.heads * head_dim), dtype=x_TD.dtype, device=x_TD.device)
    most = TOKENS_MAX if q_norm_H is None else min(NORM_TOKENS_MAX, TOKENS_MAX)
    if takes(x_TD, weight_OD) and 0 < tokens <= most and head_dim in {64, 128}:
        # a norm reads the whole head, which has to lie in one tile
        normed = head_dim if q_norm_H is not None else 0
        form = choice().form(weight_OD.shape[0], tokens, head_dim=normed)
        stream(x_TD, weight_OD, bias_O, q_TO, form=form, mode=HEADS, head_dim=head_dim, heads=heads)
    elif tokens:
        y_TO = torch.nn.functional.linear(x_TD, weight_OD, bias_O)
        finish_heads(y_TO, q_TO, heads, heads_a_block=HEADS_A_BLOCK)
    if k_scales_PK is not None:
        kv_write(*into[:2], k_pages, v_pages, slots_T, k_scales_PK, v_scales_PK)
    return q_TO.view(tokens, heads.heads, head_dim), k_pages

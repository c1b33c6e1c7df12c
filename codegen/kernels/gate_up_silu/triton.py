"""Projection to gate and up with their gated activation as its epilogue.

Few tokens stream the weights (core.py of `linear`), a tile's halves being gate and up of the same
outputs, so that the product is all that is written. Above, the library's GEMM and one pass.
"""

import torch

from codegen.kernels.linear.core import GATED, Choice, stream, takes
from codegen.kernels.silu_mul.triton import silu_mul

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


def choice() -> Choice:
    """The tunables as they are now: a tuner changes them."""
    return Choice(
        short_k=SHORT_K,
        long_k=LONG_K,
        least_blocks=LEAST_BLOCKS,
        wide_tiles=WIDE_TILES,
        overlap=OVERLAP == 1,
    )


def gate_up_silu(x_TD: torch.Tensor, weight_F2D: torch.Tensor) -> torch.Tensor:
    """silu(x @ gate.T) * (x @ up.T); the weight's first half of rows is gate, its second is up."""
    tokens = x_TD.shape[0]
    if not takes(x_TD, weight_F2D) or not 0 < tokens <= TOKENS_MAX:
        return silu_mul(torch.nn.functional.linear(x_TD, weight_F2D))
    out_TF = torch.empty((tokens, weight_F2D.shape[0] // 2), dtype=x_TD.dtype, device=x_TD.device)
    stream(
        x_TD, weight_F2D, None, out_TF, form=choice().form(weight_F2D.shape[0], tokens), mode=GATED
    )
    return out_TF

"""Matrix product with a checkpoint's weight: ours for few tokens, the library's GEMM above.

Decodes are bound by the weights' bytes; core.py streams them, and reads each once.
"""

import torch

from .core import PLAIN, Choice, stream, takes

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


def linear(
    x_TD: torch.Tensor, weight_OD: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """x @ weight.T + bias; bias may be None."""
    tokens = x_TD.shape[0]
    if not takes(x_TD, weight_OD) or not 0 < tokens <= TOKENS_MAX:
        return torch.nn.functional.linear(x_TD, weight_OD, bias_O)
    out_TO = torch.empty((tokens, weight_OD.shape[0]), dtype=x_TD.dtype, device=x_TD.device)
    stream(
        x_TD, weight_OD, bias_O, out_TO, form=choice().form(weight_OD.shape[0], tokens), mode=PLAIN
    )
    return out_TO

"""Matrix product with a checkpoint's weight: the library's GEMM."""

import torch


def linear(
    x_TD: torch.Tensor, weight_OD: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """x @ weight.T + bias; bias may be None."""
    return torch.nn.functional.linear(x_TD, weight_OD, bias_O)

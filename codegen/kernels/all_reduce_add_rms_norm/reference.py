"""A collective and the row-wise ops behind it, one after the other."""

from typing import Any

import torch

from codegen.kernels.add_rms_norm.reference import add_rms_norm


def all_reduce_add_rms_norm(
    x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, comm: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, total), latest first; x is this rank's share of a sum and is used up."""
    return add_rms_norm(comm.all_reduce(x_TD), residual_TD, weight_D, eps)

"""Projection to gate and up, and their gated activation."""

import torch


def gate_up_silu(x_TD: torch.Tensor, weight_F2D: torch.Tensor) -> torch.Tensor:
    """silu(x @ gate.T) * (x @ up.T); the weight's first half of rows is gate, its second is up."""
    gate_TF, up_TF = torch.nn.functional.linear(x_TD, weight_F2D).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_TF) * up_TF

"""Gated activation of gate and up projections that lie side by side."""

import torch


def silu_mul(gate_up_TF2: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half; the last dim halves."""
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_TF) * up_TF

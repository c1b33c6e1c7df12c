"""Rows of the step whose logits are wanted."""

import torch


def select_rows(x_TD: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
    """x_TD[rows_R]."""
    return x_TD.index_select(0, rows_R)

"""Token vectors."""

import torch


def embedding(token_ids_T: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Rows of the matrix."""
    return torch.nn.functional.embedding(token_ids_T, weight_VD)

"""Token vectors from one rank's share of the vocabulary; the ranks' results add up."""

import torch


def embedding_share(
    token_ids_T: torch.Tensor, weight_VD: torch.Tensor, first_row: int
) -> torch.Tensor:
    """Rows of the share that starts at first_row of the vocabulary; 0 for ids of other ranks."""
    row_T = token_ids_T - first_row
    other_T = (row_T < 0) | (row_T >= weight_VD.shape[0])
    x_TD = torch.nn.functional.embedding(row_T.masked_fill(other_T, 0), weight_VD)
    return x_TD.masked_fill(other_T[:, None], 0.0)

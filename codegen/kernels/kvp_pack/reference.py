"""Packs what kvp groups send each other: partial attention of the tokens that they share.

For a peer that gets n tokens: [n, N, H] outputs and then [n, N] log sums in fp32, as bytes. Peers
lie behind each other, and what comes back lies as what was sent.

T tokens of the step, E shared ones of them, each counted once a peer, N query heads, H head size.
"""

import torch


def kvp_pack(
    out_TNH: torch.Tensor,
    lse_TN: torch.Tensor,
    rows_E: torch.Tensor,
    places_3E: torch.Tensor,
) -> torch.Tensor:
    """Bytes for all peers, uint8 [E x N x (H x itemsize + 4)].

    lse_TN     fp32
    rows_E     int64, the token of each entry; at least one
    places_3E  int32: entries of the peers before its own, of its own, and its place among them
    """
    parts = []
    first = 0
    while first < len(rows_E):
        count = int(places_3E[1, first])
        rows = rows_E[first : first + count]
        parts += [each[rows].flatten().view(torch.uint8) for each in (out_TNH, lse_TN)]
        first += count
    return torch.cat(parts)

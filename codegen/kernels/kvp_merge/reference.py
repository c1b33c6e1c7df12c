"""Merges the partial attention that kvp groups have sent each other, in place.

m = max lse; out = sum of out_g x exp(lse_g - m), over sum of exp(lse_g - m), in fp32 (arXiv
2409.17264v5, section 3.3): the same formula as merge_shards of runtime/parallel/kvp.py.

T tokens of the step, S shared ones of them, E of those counted once a peer, G kvp groups, N query
heads, H head size.
"""

import torch

OWN = -2
"""In shares_GS, this group's own share; below 0 and not OWN, a group that holds none."""


def kvp_merge(
    out_TNH: torch.Tensor,
    lse_TN: torch.Tensor,
    rows_S: torch.Tensor,
    shares_GS: torch.Tensor,
    places_3E: torch.Tensor,
    received: torch.Tensor,
) -> torch.Tensor:
    """Replaces the shared rows of out_TNH by the attention over all groups' shares; returns it.

    out_TNH    normalised over the keys of this group alone, 0 without any; lse_TN -inf then, fp32
    rows_S     int64, the shared tokens
    shares_GS  int32, the entry of `received` that holds a group's share of a token, or OWN, or -1
    places_3E  int32, as kvp_pack takes it
    received   uint8, the peers' shares as kvp_pack makes them
    """
    _, heads, head_dim = out_TNH.shape
    outs, lses = [], []  # by entry
    at = first = 0
    while first < places_3E.shape[1]:
        count = int(places_3E[1, first])
        middle = at + count * heads * head_dim * out_TNH.element_size()
        end = middle + count * heads * 4
        outs.append(received[at:middle].view(out_TNH.dtype).view(count, heads, head_dim))
        lses.append(received[middle:end].view(torch.float32).view(count, heads))
        at, first = end, first + count
    entry_GS = shares_GS.clamp_min(0).long()
    came_GS11, own_GS11 = (each[..., None, None] for each in (shares_GS >= 0, shares_GS == OWN))
    out_GSNH = torch.where(own_GS11, out_TNH[rows_S].float(), 0.0)
    out_GSNH = torch.where(came_GS11, torch.cat(outs)[entry_GS].float(), out_GSNH)
    lse_GSN = torch.where(own_GS11[..., 0], lse_TN[rows_S], -torch.inf)
    lse_GSN = torch.where(came_GS11[..., 0], torch.cat(lses)[entry_GS], lse_GSN)
    # the floor: -inf - -inf would be NaN
    top_SN = lse_GSN.amax(dim=0).clamp_min(torch.finfo(torch.float32).min)
    weight_GSN = torch.exp(lse_GSN - top_SN)
    total_SN = weight_GSN.sum(dim=0).clamp_min(1.0)  # at least 1, or 0 where no group has a key
    merged_SNH = (out_GSNH * weight_GSN[..., None]).sum(dim=0) / total_SN[..., None]
    out_TNH[rows_S] = merged_SNH.to(out_TNH.dtype)
    return out_TNH

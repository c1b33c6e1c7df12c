"""Stores a step's keys and values in the pages."""

import torch

FP8_MAX = 448.0
"""Largest value of e4m3."""
LEAST_SCALE = 2**-6
"""What a prompt begins with may be a small part of all that follows, and values below 2^-15 matter
to nothing: so pages take values up to 7 in any case."""


def kv_write(
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots_T: torch.Tensor,
    k_scales_PK: torch.Tensor | None = None,
    v_scales_PK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes row t at slot page x page_tokens + offset; a row of slot -1 is stored nowhere.

    No result depends on the host reading a tensor: a row to skip writes what the first kept row
    writes, to the same place, and if none is kept all write back what slot 0 holds.

    k_pages, v_pages  [pages, page_tokens, K, H], written in place, cast to their dtype
    scales            fp32, of pages in fp8: the page holds x / scale; written where a page begins
    returns           k_pages, which attention takes as the sign that it may read
    """
    if slots_T.numel() == 0:
        return k_pages
    keep_T = slots_T >= 0
    any_kept, first = keep_T.any(), keep_T.int().argmax()
    row_T = torch.where(keep_T, torch.arange(len(slots_T), device=slots_T.device), first)
    slot_T = slots_T[row_T].clamp_min(0)
    sides = ((k_TKH, k_pages, k_scales_PK), (v_TKH, v_pages, v_scales_PK))
    for x_TKH, pages, scales_PK in sides:
        flat = pages.view(-1, *pages.shape[2:])
        # fp8 has no scatter; its bytes have
        raw = flat.view(torch.uint8) if flat.element_size() == 1 else flat
        kept_TKH = x_TKH[row_T]
        if scales_PK is not None:
            scale_TK = _scales(x_TKH, slots_T, row_T, slot_T, scales_PK, pages.shape[1])
            page_T = slot_T // pages.shape[1]
            scales_PK[page_T] = torch.where(any_kept, scale_TK, scales_PK[page_T])
            kept_TKH = (kept_TKH.float() / scale_TK[..., None]).clamp(-FP8_MAX, FP8_MAX)
        rows = kept_TKH.to(flat.dtype).view(raw.dtype)
        raw[slot_T] = torch.where(any_kept, rows, raw[slot_T])
    return k_pages


def _scales(
    x_TKH: torch.Tensor,
    slots_T: torch.Tensor,
    row_T: torch.Tensor,
    slot_T: torch.Tensor,
    scales_PK: torch.Tensor,
    page_tokens: int,
) -> torch.Tensor:
    """Scale of each row's page: that of its first token, in this step or stored by an earlier one.

    The largest power of two that is no larger than the largest |x| of that token's head, which
    becomes 1 to 2: later tokens may be 224 times larger before they saturate, and 16 times smaller
    before e4m3's least step, 2^-9, costs as much as its three bits. At least LEAST_SCALE; a head of
    zeros gets 1.
    """
    offset_T = slot_T % page_tokens
    lead_T = row_T - offset_T
    here_T = (lead_T >= 0) & (slots_T[lead_T.clamp_min(0)] == slot_T - offset_T)
    most_TK = x_TKH[lead_T.clamp_min(0)].float().abs().amax(-1)
    power_TK = (most_TK.view(torch.int32) & 0x7F800000).view(torch.float32)
    power_TK = torch.where(power_TK > 0, power_TK.clamp_min(LEAST_SCALE), 1.0)
    return torch.where(here_T[:, None], power_TK, scales_PK[slot_T // page_tokens])

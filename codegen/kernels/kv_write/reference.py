"""Stores a step's keys and values in the pages."""

import torch


def kv_write(
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots_T: torch.Tensor,
) -> torch.Tensor:
    """Writes row t at slot page x page_tokens + offset; a row of slot -1 is stored nowhere.

    No result depends on the host reading a tensor: a row to skip writes what the first kept row
    writes, to the same place, and if none is kept all write back what slot 0 holds.

    k_pages, v_pages  [pages, page_tokens, K, H], written in place, cast to their dtype
    returns           k_pages, which attention takes as the sign that it may read
    """
    if slots_T.numel() == 0:
        return k_pages
    keep_T = slots_T >= 0
    first = keep_T.int().argmax()
    row_T = torch.where(keep_T, torch.arange(len(slots_T), device=slots_T.device), first)
    slot_T = slots_T[row_T].clamp_min(0)
    for x_TKH, pages in ((k_TKH, k_pages), (v_TKH, v_pages)):
        flat = pages.view(-1, *pages.shape[2:])
        # fp8 has no scatter; its bytes have
        raw = flat.view(torch.uint8) if flat.element_size() == 1 else flat
        rows = x_TKH[row_T].to(flat.dtype).view(raw.dtype)
        raw[slot_T] = torch.where(keep_T[first], rows, raw[slot_T])
    return k_pages

"""Attention of packed sequences behind their prefixes, keys and values from pages.

T tokens of the step, B sequences, N query heads, K KV heads, G = N / K, H head size, S keys.
"""

from itertools import pairwise
from typing import Protocol

import torch

LOGITS = 1 << 24
"""Logits, or numbers of decodes' keys, held at once (64 MiB in fp32): chunks are taken in blocks of
queries, decodes in batches."""


class Packed(Protocol):
    """The part of the step's inputs that says whose tokens and pages are whose."""

    slots_T: torch.Tensor
    query_starts_B1: torch.Tensor
    kv_lens_B: torch.Tensor
    page_table_BP: torch.Tensor


def paged_attention(
    q_TNH: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    written: torch.Tensor,
    inputs: Packed,
    scale: float,
    k_scales_PK: torch.Tensor | None = None,
    v_scales_PK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_TNH in q's dtype, lse_TN natural logarithm in fp32); softmax in fp32.

    Pages in fp8 hold x / scale, with a scale a page and KV head.

    A sequence whose tokens were written here is causal: its last query sees all kv_lens_B keys.
    One whose first slot is -1 brought no keys, so that every query sees all of them. Rows without
    a key, and rows beyond the last sequence, get (0, -inf).
    """
    out_TNH = torch.zeros_like(q_TNH)
    lse_TN = torch.full(q_TNH.shape[:2], -torch.inf, dtype=torch.float32, device=q_TNH.device)
    starts, kv_lens = inputs.query_starts_B1.tolist(), inputs.kv_lens_B.tolist()
    sizes = [end - start for start, end in pairwise(starts)]
    wide = max(q_TNH.shape[1], k_pages.shape[2] * k_pages.shape[3])  # of a key: logits, or itself
    single = [b for b, size in enumerate(sizes) if size == 1 and kv_lens[b]]
    while single:
        # decodes of similar length share a batch, so that padding costs little
        single.sort(key=kv_lens.__getitem__)
        room = max(LOGITS // (wide * kv_lens[single[-1]]), 1)
        batch = [b for b in single[-room:] if 2 * kv_lens[b] >= kv_lens[single[-1]]]
        del single[-len(batch) :]
        rows = [starts[b] for b in batch]
        out_TNH[rows], lse_TN[rows] = _decode(
            q_TNH[rows],
            (k_pages, k_scales_PK),
            (v_pages, v_scales_PK),
            inputs.kv_lens_B[batch],
            inputs.page_table_BP[batch],
            max(kv_lens[b] for b in batch),
            scale,
        )
    many = [b for b, size in enumerate(sizes) if size > 1 and kv_lens[b]]
    own = inputs.slots_T[[starts[b] for b in many]].ge(0).tolist() if many else []
    for b, causal in zip(many, own, strict=True):
        span = slice(starts[b], starts[b + 1])
        out_TNH[span], lse_TN[span] = _chunk(
            q_TNH[span],
            _keys(k_pages, k_scales_PK, inputs.page_table_BP[b], kv_lens[b]),
            _keys(v_pages, v_scales_PK, inputs.page_table_BP[b], kv_lens[b]),
            scale,
            causal=causal,
        )
    return out_TNH, lse_TN


def _keys(
    pages: torch.Tensor, scales_PK: torch.Tensor | None, table_P: torch.Tensor, tokens: int
) -> torch.Tensor:
    """First tokens of the pages in the table's order, as fp32 [K, tokens, H]."""
    used = -(-tokens // pages.shape[1])
    page_P = table_P[:used].long()
    raw = pages.view(torch.uint8) if pages.element_size() == 1 else pages
    rows = raw[page_P].flatten(0, 1)[:tokens].view(pages.dtype)
    found = rows.transpose(0, 1).float()
    if scales_PK is not None:
        scale_KS = scales_PK[page_P].repeat_interleave(pages.shape[1], 0)[:tokens].T
        found *= scale_KS[..., None]
    return found.contiguous()


def _softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """exp(logits - their largest) in place of the logits, its sum over the last dim, the log sum.

    The caller divides what it weighs by the sum, which is smaller than the logits are.
    """
    top = logits.amax(-1, keepdim=True)
    share = logits.sub_(top).exp_()
    total = share.sum(-1, keepdim=True)
    return share, total, (top + total.log()).squeeze(-1)


def _chunk(
    q_TNH: torch.Tensor, k_KSH: torch.Tensor, v_KSH: torch.Tensor, scale: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence's queries over all its keys, in blocks of queries."""
    tokens, heads, head_dim = q_TNH.shape
    kv_heads, keys, _ = k_KSH.shape
    block = max(LOGITS // (heads * keys), 1)
    outs, lses = [], []
    for first in range(0, tokens, block):
        rows = min(block, tokens - first)
        seen = keys - tokens + first + rows if causal else keys  # of the block's last query
        q_NRH = q_TNH[first : first + rows].transpose(0, 1).float() * scale
        q_KRH = q_NRH.reshape(kv_heads, -1, head_dim)  # the rows of all heads of a group
        logits_NRS = (q_KRH @ k_KSH[:, :seen].mT).view(heads, rows, seen)
        if causal:  # the block's own keys stand last
            row_R = torch.arange(rows, device=q_TNH.device)
            logits_NRS[..., seen - rows :].masked_fill_(row_R > row_R[:, None], -torch.inf)
        share_NRS, total_NR1, lse_NR = _softmax(logits_NRS)
        out_KRH = share_NRS.view(kv_heads, -1, seen) @ v_KSH[:, :seen]
        outs.append((out_KRH.view(heads, rows, head_dim) / total_NR1).transpose(0, 1))
        lses.append(lse_NR.T)
    return torch.cat(outs).to(q_TNH.dtype), torch.cat(lses)


def _decode(
    q_BNH: torch.Tensor,
    k_pages: tuple[torch.Tensor, torch.Tensor | None],
    v_pages: tuple[torch.Tensor, torch.Tensor | None],
    kv_lens_B: torch.Tensor,
    page_table_BP: torch.Tensor,
    longest: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query a sequence, keys padded to the longest; pages beside their scales."""
    batch, heads, head_dim = q_BNH.shape
    _, page_tokens, kv_heads, _ = k_pages[0].shape
    used = -(-longest // page_tokens)
    page_BP = page_table_BP[:, :used].reshape(-1)
    padded = used * page_tokens
    k_BKSH, v_BKSH = (
        _keys(*each, page_BP, batch * padded).view(kv_heads, batch, padded, -1).transpose(0, 1)
        for each in (k_pages, v_pages)
    )
    q_BKGH = (q_BNH.float() * scale).view(batch, kv_heads, -1, head_dim)
    logits_BKGS = q_BKGH @ k_BKSH.mT
    past_BS = torch.arange(padded, device=q_BNH.device) >= kv_lens_B[:, None]
    share_BKGS, total_BKG1, lse_BKG = _softmax(
        logits_BKGS.masked_fill_(past_BS[:, None, None], -torch.inf)
    )
    # a page's unwritten tail may hold anything, and 0 x NaN is NaN
    out_BKGH = share_BKGS @ v_BKSH.masked_fill(past_BS[:, None, :, None], 0.0) / total_BKG1
    return out_BKGH.reshape(batch, heads, head_dim).to(q_BNH.dtype), lse_BKG.reshape(batch, heads)

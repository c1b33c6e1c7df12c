"""Attention over pages by FlashAttention, where one of its packages is installed.

    flash_attn_interface  FlashAttention-3 for Hopper: reads pages
    fa3_fwd_interface     its forward half alone (package fa3_fwd), built without pages: bf16 only
    flash_attn            FlashAttention-2: reads pages of a multiple of 256 tokens

Where pages are not read, keys and values are gathered into dense rows first, in every layer.

T tokens of the step, B sequences, S keys of all of them, N query heads, K KV heads, H head size.
"""

import importlib
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch

PACKAGES = ("flash_attn_interface", "fa3_fwd_interface", "flash_attn")
"""The fastest first."""


def _installed() -> ModuleType:
    """The first package that is here; raises ImportError, which names them, where none is."""
    reasons = []
    for name in PACKAGES:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(f"{name}: {error}")
    raise ImportError(
        f"paged_attention on flash_attn needs one of its packages ({'; '.join(reasons)}); "
        "install flash-attn or flash-attn-3, or plan without --attention flash_attn"
    )


LIBRARY = _installed()


@dataclass(frozen=True, kw_only=True)
class Call:
    """The sequences of a step that one call takes; causal ones and others are apart."""

    causal: bool
    rows_T: torch.Tensor | None
    """Rows of the step, None where the call takes the first ones, in their order."""
    tokens: int
    starts_B1: torch.Tensor
    key_starts_B1: torch.Tensor
    lens_B: torch.Tensor
    longest: int
    most_keys: int
    table_BP: torch.Tensor
    slots_S: torch.Tensor | None
    """Where each key lies in the pages; None where the library reads them."""


def paged_attention(
    q_TNH: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    written: torch.Tensor,
    inputs: Any,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_TNH in q's dtype, lse_TN natural logarithm in fp32); rows without a key (0, -inf)."""
    memo: dict[Any, Any] = getattr(inputs, "memo", {})
    key = ("flash_attn", k_pages.shape[1])
    if key not in memo:
        memo[key] = _calls(inputs, k_pages.shape[1])
    out_TNH = torch.zeros_like(q_TNH)
    lse_TN = q_TNH.new_full(q_TNH.shape[:2], -torch.inf, dtype=torch.float32)
    for call in memo[key]:
        rows = slice(call.tokens) if call.rows_T is None else call.rows_T
        out_TNH[rows], lse_TN[rows] = _run(call, q_TNH[rows].contiguous(), k_pages, v_pages, scale)
    return out_TNH, lse_TN


def _calls(inputs: Any, page_tokens: int) -> list[Call]:
    """The calls of a step: at most one of causal sequences and one of others, none without keys."""
    host = getattr(inputs, "host", None)
    if host is None:
        starts, lens = inputs.query_starts_B1.tolist(), inputs.kv_lens_B.tolist()
        first_T = inputs.query_starts_B1[:-1].long().clamp_max(len(inputs.slots_T) - 1)
        causal = inputs.slots_T[first_T].ge(0).tolist()
    else:
        starts, lens, causal = host.query_starts, host.kv_lens, host.causal
    spans = list(pairwise(starts))
    found = []
    for kind in (True, False):
        chosen = [
            b
            for b, (begin, end) in enumerate(spans)
            if end > begin and lens[b] and causal[b] == kind
        ]
        if chosen:
            found.append(_call(inputs, page_tokens, chosen, spans, lens, causal=kind))
    return found


def _call(
    inputs: Any,
    page_tokens: int,
    chosen: list[int],
    spans: list[tuple[int, int]],
    lens: list[int],
    *,
    causal: bool,
) -> Call:
    device = inputs.page_table_BP.device
    sizes = [spans[b][1] - spans[b][0] for b in chosen]
    keys = [lens[b] for b in chosen]
    rows = [row for b in chosen for row in range(*spans[b])]
    table_BP = inputs.page_table_BP[torch.tensor(chosen, device=device)].contiguous()
    slots_S = None
    if not _reads_pages(page_tokens):
        inside_P = torch.arange(page_tokens, device=device)
        slots = [
            (row_P[: -(-count // page_tokens), None] * page_tokens + inside_P).flatten()[:count]
            for row_P, count in zip(table_BP.long(), keys, strict=True)
        ]
        slots_S = torch.cat(slots)
    return Call(
        causal=causal,
        rows_T=None if rows == list(range(len(rows))) else torch.tensor(rows, device=device),
        tokens=len(rows),
        starts_B1=_starts(sizes, device),
        key_starts_B1=_starts(keys, device),
        lens_B=torch.tensor(keys, dtype=torch.int32, device=device),
        longest=max(sizes),
        most_keys=max(keys),
        table_BP=table_BP,
        slots_S=slots_S,
    )


def _starts(sizes: list[int], device: torch.device) -> torch.Tensor:
    starts = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return starts.to(device)


def _reads_pages(page_tokens: int) -> bool:
    if LIBRARY.__name__ == "flash_attn":
        return page_tokens % 256 == 0
    return LIBRARY.__name__ == "flash_attn_interface"


def _run(
    call: Call, q_TNH: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_TNH, lse_TN) of the call's rows."""
    third = LIBRARY.__name__ != "flash_attn"
    if third and call.slots_S is None:
        out_TNH, lse_NT, *_ = LIBRARY.flash_attn_with_kvcache(
            q_TNH,
            k_pages,
            v_pages,
            cache_seqlens=call.lens_B,
            page_table=call.table_BP,
            cu_seqlens_q=call.starts_B1,
            max_seqlen_q=call.longest,
            softmax_scale=scale,
            causal=call.causal,
            return_softmax_lse=True,
        )
        return out_TNH, lse_NT.T
    options: dict[str, Any] = {"num_splits": 0} if third else {}
    k, v = k_pages, v_pages
    if call.slots_S is None:
        options["block_table"] = call.table_BP
    else:
        k, v = (each.flatten(0, 1)[call.slots_S] for each in (k_pages, v_pages))
    out_TNH, lse_NT, *_ = LIBRARY.flash_attn_varlen_func(
        q_TNH,
        k,
        v,
        cu_seqlens_q=call.starts_B1,
        cu_seqlens_k=call.key_starts_B1,
        max_seqlen_q=call.longest,
        max_seqlen_k=call.most_keys,
        softmax_scale=scale,
        causal=call.causal,
        return_attn_probs=True,
        **options,
    )
    return out_TNH, lse_NT.T

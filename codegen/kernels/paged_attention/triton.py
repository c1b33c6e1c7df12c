"""Attention of packed sequences over paged keys: one kernel for chunks and decodes, and the merge.

All query heads of a KV head share its tiles, so rows are packed, row = token x G + head in group;
a decode's few rows take mma.sync (16 rows), a chunk's take wgmma. Logarithms are base 2 inside and
natural in the result. K and V arrive by TMA, a page number ahead of its tile: a number that is
loaded in its own turn costs the pipeline one of its stages.

What an unwritten slot of a used page holds must be finite, since 0 x NaN is NaN: pools are zeroed.
On Hopper, tiles of 128 rows take the Gluon kernel of gluon.py.

T tokens of the step, B sequences, N query heads, K KV heads, G = N / K, H head size, I items,
M merges, F fields.
"""

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .work import Queries, WorkList, chunk_list, packed_decodes, recorded_decodes

CHUNK_ROWS = 64
"""Rows of a chunk's tile: two blocks of 64 x 64 an SM run under each other's softmax, and were 3 to
8 % faster on an H100 than one of 128 x 128, at 8 thousand to 128 thousand keys."""
CHUNK_KEYS = 64
"""Keys of its tile, or a page where that is smaller."""
CHUNK_STAGES = 3
CHUNK_WARPS = 4
HOPPER_KEYS = 128
"""Keys of a tile of the Gluon kernel, whose tiles have 128 rows."""
DECODE_KEYS = 128
DECODE_STAGES = 3
DECODE_WARPS = 4
GLUON = 1
"""1: Hopper's kernel for chunks where it compiles; 0: never."""
L2_BYTES = 41943040
"""Heads run together while their K and V fit into so much of L2 (50 MB on Hopper)."""
MERGE_SLOTS = 16
"""Partial results that the merge holds at once."""
FLOOR: tl.constexpr = tl.constexpr(-1.0e20)
"""Least maximum of a row, below any logit and far above a masked one, -1e30 x scale: a row that
sees nothing of a tile then gets shares of 0. With its own maximum its shares would be exp2 of what
rounding leaves of -1e30 - -1e30, which may be 1e22."""
UNSPECIALISED: tuple[str, ...] = (
    "items",
    "table_stride",
    "kv_heads",
    "group",
    "tile_tokens",
    "heads_together",
)
"""Arguments that differ from step to step or model to model: no compilation depends on them."""


@triton.jit
def _tiles(
    q_MH,
    k_desc,
    v_desc,
    table_ptr,
    column,
    first,
    end,
    limit_M,
    scale2,
    top_M,
    sum_M,
    acc_MH,
    BLOCK_S: tl.constexpr,
    PAGE: tl.constexpr,
    MASK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Takes tiles of keys [first, end) into the running softmax."""
    PER_PAGE: tl.constexpr = PAGE // BLOCK_S
    page = tl.load(table_ptr + first // PER_PAGE, mask=first < end, other=0)
    for i in tl.range(first, end, num_stages=STAGES):
        row = page * PAGE + (i % PER_PAGE) * BLOCK_S
        page = tl.load(table_ptr + tl.minimum(i + 1, end - 1) // PER_PAGE)
        k_SH = k_desc.load([row, column]).to(q_MH.dtype)
        logits_MS = tl.dot(q_MH, k_SH.T, input_precision="ieee")
        if MASK:
            key_S = i * BLOCK_S + tl.arange(0, BLOCK_S)
            logits_MS = tl.where(key_S[None, :] <= limit_M[:, None], logits_MS, -1.0e30)
        new_M = tl.maximum(top_M, tl.max(logits_MS, 1) * scale2)
        share_MS = tl.exp2(logits_MS * scale2 - new_M[:, None])
        fade_M = tl.exp2(top_M - new_M)
        sum_M = sum_M * fade_M + tl.sum(share_MS, 1)
        acc_MH = acc_MH * fade_M[:, None]
        v_SH = v_desc.load([row, column]).to(q_MH.dtype)
        acc_MH = tl.dot(share_MS.to(q_MH.dtype), v_SH, acc_MH, input_precision="ieee")
        top_M = new_M
    return top_M, sum_M, acc_MH


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention_kernel(
    q_ptr,
    out_ptr,
    lse_ptr,
    partial_ptr,
    partial_lse_ptr,
    items_ptr,
    table_ptr,
    k_desc,
    v_desc,
    scale2,
    items,
    table_stride,
    kv_heads,
    group,
    tile_tokens,
    heads_together,
    HEAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MASK_ALL: tl.constexpr,
    STAGES: tl.constexpr,
    FIELDS: tl.constexpr,
):
    pid = tl.program_id(0)
    batch = pid // (items * heads_together)
    pid -= batch * (items * heads_together)
    head = batch * heads_together + pid % heads_together
    item_ptr = items_ptr + pid // heads_together * FIELDS
    sequence = tl.load(item_ptr).to(tl.int64)
    first_token = tl.load(item_ptr + 1)
    begin = tl.load(item_ptr + 2)
    stop = tl.load(item_ptr + 3)
    shift = tl.load(item_ptr + 4)
    keys = tl.load(item_ptr + 5)
    low = tl.load(item_ptr + 6)
    high = tl.load(item_ptr + 7)
    slot = tl.load(item_ptr + 8)

    row_M = tl.arange(0, BLOCK_M)
    at_H = tl.arange(0, HEAD)
    token_M = first_token + row_M // group
    inside_M = (token_M >= begin) & (token_M < stop) & (row_M < tile_tokens * group)
    place_M = token_M.to(tl.int64) * (kv_heads * group) + head * group + row_M % group
    q_MH = tl.load(
        q_ptr + place_M[:, None] * HEAD + at_H[None, :], mask=inside_M[:, None], other=0.0
    )
    limit_M = tl.minimum(token_M + shift, keys - 1)
    top_M = tl.full([BLOCK_M], FLOOR, tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MH = tl.zeros([BLOCK_M, HEAD], tl.float32)
    table_ptr += sequence * table_stride
    column = head * HEAD
    if MASK_ALL:
        top_M, sum_M, acc_MH = _tiles(
            q_MH, k_desc, v_desc, table_ptr, column, low, high, limit_M, scale2, top_M, sum_M,
            acc_MH, BLOCK_S, PAGE, MASK=True, STAGES=STAGES,
        )  # fmt: skip
    else:
        # tiles that every query sees whole, then those that a query's last key may lie in
        seen = tl.minimum(tl.maximum(first_token, begin) + shift + 1, keys)
        whole = tl.maximum(tl.minimum(seen // BLOCK_S, high), low)
        top_M, sum_M, acc_MH = _tiles(
            q_MH, k_desc, v_desc, table_ptr, column, low, whole, limit_M, scale2, top_M, sum_M,
            acc_MH, BLOCK_S, PAGE, MASK=False, STAGES=STAGES,
        )  # fmt: skip
        top_M, sum_M, acc_MH = _tiles(
            q_MH, k_desc, v_desc, table_ptr, column, whole, high, limit_M, scale2, top_M, sum_M,
            acc_MH, BLOCK_S, PAGE, MASK=True, STAGES=1,
        )  # fmt: skip
    safe_M = tl.where(sum_M > 0, sum_M, 1.0)
    out_MH = acc_MH / safe_M[:, None]
    lse_M = tl.where(sum_M > 0, top_M + tl.log2(safe_M), float("-inf"))
    if slot >= 0:
        slot_M = (slot.to(tl.int64) * kv_heads + head) * BLOCK_M + row_M
        slot_MH = slot_M[:, None] * HEAD + at_H[None, :]
        tl.store(partial_ptr + slot_MH, out_MH, mask=inside_M[:, None])
        tl.store(partial_lse_ptr + slot_M, lse_M, mask=inside_M)
    else:
        at_MH = place_M[:, None] * HEAD + at_H[None, :]
        tl.store(out_ptr + at_MH, out_MH.to(q_MH.dtype), mask=inside_M[:, None])
        tl.store(lse_ptr + place_M, lse_M * 0.6931471805599453, mask=inside_M)  # natural


@triton.jit
def merge_kernel(
    partial_ptr,
    partial_lse_ptr,
    merges_ptr,
    out_ptr,
    lse_ptr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """One row of one tile: grid (merges x TILE_ROWS, KV heads)."""
    row = tl.program_id(0) % TILE_ROWS
    head = tl.program_id(1)
    merge_ptr = merges_ptr + tl.program_id(0) // TILE_ROWS * FIELDS
    first = tl.load(merge_ptr).to(tl.int64)
    slots = tl.load(merge_ptr + 1)
    token = tl.load(merge_ptr + 2) + row // GROUP
    begin = tl.load(merge_ptr + 3)
    stop = tl.load(merge_ptr + 4)
    if (slots > 1) & (token >= begin) & (token < stop):
        at_H = tl.arange(0, HEAD)
        top = -1.0e30
        total = 0.0
        acc_H = tl.zeros([HEAD], tl.float32)
        for start in range(0, slots, SLOTS):
            slot_R = start + tl.arange(0, SLOTS)
            row_R = ((first + slot_R) * KV_HEADS + head) * BLOCK_M + row
            lse_R = tl.load(partial_lse_ptr + row_R, mask=slot_R < slots, other=float("-inf"))
            part_RH = tl.load(
                partial_ptr + row_R[:, None] * HEAD + at_H[None, :],
                mask=(slot_R < slots)[:, None],
                other=0.0,
            )
            new = tl.maximum(top, tl.max(lse_R, 0))
            fade = tl.exp2(top - new)
            weight_R = tl.exp2(lse_R - new)
            total = total * fade + tl.sum(weight_R, 0)
            acc_H = acc_H * fade + tl.sum(part_RH * weight_R[:, None], 0)
            top = new
        place = token.to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + row % GROUP
        safe = tl.where(total > 0, total, 1.0)
        out_H = acc_H / safe
        tl.store(out_ptr + place * HEAD + at_H, out_H.to(out_ptr.dtype.element_ty))
        lse = tl.where(total > 0, top + tl.log2(safe), float("-inf"))
        tl.store(lse_ptr + place, lse * 0.6931471805599453)


# --- launches -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Form:
    """One shape of tile: how the kernel is compiled for it."""

    rows: int
    keys: int
    tile_tokens: int
    """A power of two, so that tiles can be aligned to the tiles of keys."""
    stages: int
    warps: int
    resident: int
    """Blocks that an SM holds at once."""
    hopper: Callable[..., None] | None = None
    """Runs the Gluon kernel, where that one is used."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What the kernels know of the model and its pages when they are compiled."""

    kv_heads: int
    group: int
    head_dim: int
    page_tokens: int
    dtype: torch.dtype
    page_dtype: torch.dtype


def paged_attention(
    q_TNH: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    written: torch.Tensor,
    inputs: Any,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_TNH in q's dtype, lse_TN natural logarithm in fp32); softmax in fp32.

    inputs  StepInputs of plans/ops.py; without its `host` the host waits for the lengths, unless a
            CUDA graph is recorded, where every sequence has at most one token and T == B
    """
    q_TNH = q_TNH.contiguous()
    out_TNH = torch.empty_like(q_TNH)
    lse_TN = torch.empty(q_TNH.shape[:2], dtype=torch.float32, device=q_TNH.device)
    heads = Heads(
        kv_heads=k_pages.shape[2],
        group=q_TNH.shape[1] // k_pages.shape[2],
        head_dim=q_TNH.shape[2],
        page_tokens=k_pages.shape[1],
        dtype=q_TNH.dtype,
        page_dtype=k_pages.dtype,
    )
    for form, work in _step(heads, q_TNH, inputs) if q_TNH.shape[0] else ():
        _attend(form, work, heads, (q_TNH, out_TNH, lse_TN), k_pages, v_pages, inputs, scale)
    return out_TNH, lse_TN


def _step(heads: Heads, q_TNH: torch.Tensor, inputs: Any) -> list[tuple[Form, WorkList]]:
    """The launches of a step; the first layer that asks builds them for all."""
    memo: dict[Any, Any] = getattr(inputs, "memo", {})
    key = ("paged_attention", heads)
    if key not in memo:
        memo[key] = _launches(heads, q_TNH, inputs)
    found: list[tuple[Form, WorkList]] = memo[key]
    return found


def _launches(heads: Heads, q_TNH: torch.Tensor, inputs: Any) -> list[tuple[Form, WorkList]]:
    tokens, device = q_TNH.shape[0], q_TNH.device
    decode = decode_form(heads)
    blocks_a_head = max(1, processors(device) * decode.resident // heads.kv_heads)
    host = getattr(inputs, "host", None)
    if host is None and q_TNH.is_cuda and torch.cuda.is_current_stream_capturing():
        assert tokens == len(inputs.kv_lens_B), "recorded steps have one token a sequence"
        recorded = recorded_decodes(
            inputs.query_starts_B1,
            inputs.kv_lens_B,
            tile_keys=decode.keys,
            blocks_a_head=blocks_a_head,
        )
        return [(decode, recorded)]
    sequences = _queries(inputs, host, tokens)
    decodes = [each for each in sequences if each.end - each.begin <= decode.tile_tokens]
    chunks = [each for each in sequences if each.end - each.begin > decode.tile_tokens]
    found = []
    if chunks:
        longest = max(each.end - each.begin for each in chunks)
        form = chunk_form(heads, device, longest)
        work = chunk_list(
            chunks,
            tile_tokens=form.tile_tokens,
            tile_keys=form.keys,
            kv_heads=heads.kv_heads,
            blocks=processors(device) * form.resident,
        )
        found.append((form, work.to(device)))
    if decodes:
        work = packed_decodes(decodes, tile_keys=decode.keys, blocks_a_head=blocks_a_head)
        found.append((decode, work.to(device)))
    return found


def decode_form(heads: Heads) -> Form:
    """Tiles of 16 rows, or of one token's query heads where those are more."""
    rows = max(16, triton.next_power_of_2(heads.group))
    keys = min(DECODE_KEYS, heads.page_tokens)
    buffers = DECODE_STAGES * keys * 2 * heads.head_dim * heads.page_dtype.itemsize
    return Form(
        rows=rows,
        keys=keys,
        tile_tokens=_power_of_two(rows // heads.group),
        stages=DECODE_STAGES,
        warps=DECODE_WARPS,
        resident=max(1, min(3, 220_000 // buffers)),
    )


def chunk_form(heads: Heads, device: torch.device, longest: int) -> Form:
    """Tiles of 128 rows for Gluon; of 64 for Triton, and where no chunk of the step has more."""
    hopper = _hopper(device, heads) if longest * heads.group > CHUNK_ROWS else None
    rows = 128 if hopper else triton.next_power_of_2(max(CHUNK_ROWS, heads.group))
    return Form(
        rows=rows,
        keys=HOPPER_KEYS if hopper else min(CHUNK_KEYS, heads.page_tokens),
        tile_tokens=_power_of_two(rows // heads.group),
        stages=CHUNK_STAGES,
        warps=CHUNK_WARPS,
        resident=1 if hopper else 2,
        hopper=hopper,
    )


def _power_of_two(limit: int) -> int:
    return 1 << limit.bit_length() - 1


def _queries(inputs: Any, host: Any, tokens: int) -> list[Queries]:
    """The sequences that have tokens, and the rows behind the last one, which see no keys."""
    if host is None:
        starts, kv_lens = inputs.query_starts_B1.tolist(), inputs.kv_lens_B.tolist()
        first_T = inputs.query_starts_B1[:-1].long().clamp_max(tokens - 1)
        causal = inputs.slots_T[first_T].ge(0).tolist()
    else:
        starts, kv_lens, causal = host.query_starts, host.kv_lens, host.causal
    found = [
        Queries(sequence=b, begin=begin, end=end, keys=kv_lens[b], causal=causal[b])
        for b, (begin, end) in enumerate(pairwise(starts))
        if end > begin
    ]
    if starts[-1] < tokens:
        found.append(Queries(sequence=0, begin=starts[-1], end=tokens, keys=0, causal=False))
    return found


def _attend(
    form: Form,
    work: WorkList,
    heads: Heads,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    inputs: Any,
    scale: float,
) -> None:
    """Runs one list: attention, and the merge where tiles are in pieces. tensors: q, out, lse."""
    q_TNH, out_TNH, lse_TN = tensors
    rows = work.slots * heads.kv_heads * form.rows
    partial = torch.empty((rows, heads.head_dim), dtype=torch.float32, device=q_TNH.device)
    partial_lse = torch.empty(rows, dtype=torch.float32, device=q_TNH.device)
    flat = [pages.view(-1, heads.kv_heads * heads.head_dim) for pages in (k_pages, v_pages)]
    arguments = {
        "q_ptr": q_TNH,
        "out_ptr": out_TNH,
        "lse_ptr": lse_TN,
        "partial_ptr": partial,
        "partial_lse_ptr": partial_lse,
        "items_ptr": work.items_IF,
        "table_ptr": inputs.page_table_BP,
        "scale2": scale * math.log2(math.e),
        "items": len(work.items_IF),
        "table_stride": inputs.page_table_BP.stride(0),
        "kv_heads": heads.kv_heads,
        "group": heads.group,
        "tile_tokens": form.tile_tokens,
        "heads_together": _heads_together(heads, inputs.page_table_BP.shape[1]),
        "HEAD": heads.head_dim,
        "PAGE": heads.page_tokens,
        "BLOCK_S": form.keys,
        "FIELDS": work.items_IF.shape[1],
    }
    grid = (len(work.items_IF) * heads.kv_heads,)
    if form.hopper:
        form.hopper(grid, arguments, *flat, one_masked_tile=work.one_masked_tile)
    else:
        box = [form.keys, heads.head_dim]
        attention_kernel[grid](
            **arguments,
            k_desc=TensorDescriptor.from_tensor(flat[0], box),
            v_desc=TensorDescriptor.from_tensor(flat[1], box),
            BLOCK_M=form.rows,
            MASK_ALL=form.rows < 64,
            STAGES=form.stages,
            num_warps=form.warps,
            num_stages=form.stages,
        )
    if work.merges_MF is not None:
        tile_rows = form.tile_tokens * heads.group
        merge_kernel[(len(work.merges_MF) * tile_rows, heads.kv_heads)](
            partial,
            partial_lse,
            work.merges_MF,
            out_TNH,
            lse_TN,
            KV_HEADS=heads.kv_heads,
            GROUP=heads.group,
            HEAD=heads.head_dim,
            BLOCK_M=form.rows,
            TILE_ROWS=tile_rows,
            SLOTS=MERGE_SLOTS,
            FIELDS=work.merges_MF.shape[1],
        )


def _heads_together(heads: Heads, pages: int) -> int:
    """How many KV heads run side by side, so that what they read stays in L2."""
    head_bytes = 2 * pages * heads.page_tokens * heads.head_dim * heads.page_dtype.itemsize
    fitting = [each for each in range(1, heads.kv_heads + 1) if heads.kv_heads % each == 0]
    return max(each for each in fitting if each == 1 or each * head_bytes <= L2_BYTES)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; a CPU, where the interpreter runs, counts as few."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _hopper(device: torch.device, heads: Heads) -> Callable[..., None] | None:
    """What runs the Gluon kernel, tried once; None where it is of no use, said where it fails.

    The try compiles it, so that no step does.
    """
    if not GLUON or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        from .gluon import attend, takes, try_out  # noqa: PLC0415 - Hopper's only

        if takes(heads):
            try_out(device, heads)
            return attend
    except Exception as error:  # noqa: BLE001 - whatever a compiler of another version raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(
            f"paged_attention: the Gluon kernel fails on Triton {triton.__version__} ({reason}); "
            "chunks take the portable Triton kernel, at about 0.7 of the rate",
            RuntimeWarning,
            stacklevel=2,
        )
    return None

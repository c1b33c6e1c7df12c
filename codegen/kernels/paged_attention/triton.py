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
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .work import Queries, WorkList, chunk_list, packed_decodes, recorded_decodes

CHUNK_ROWS = 128
"""Rows of a chunk's tile; 64 where no chunk of the step has more."""
CHUNK_KEYS = 128
"""Keys of its tile, or a page where that is smaller."""
CHUNK_STAGES = 2
CHUNK_WARPS = 8
DECODE_KEYS = 128
DECODE_STAGES = 3
DECODE_WARPS = 4
GLUON = 1
"""1: Hopper's kernel for chunks where it compiles; 0: never."""
L2_BYTES = 41943040
"""Heads are run together while their K and V fit into so much of the L2 cache (50 MB on an H100)."""
MERGE_SLOTS = 16
"""Partial results that the merge holds at once."""


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


@triton.jit(do_not_specialize=["items", "table_stride"])
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
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    HEADS_TOGETHER: tl.constexpr,
    MASK_ALL: tl.constexpr,
    STAGES: tl.constexpr,
    FIELDS: tl.constexpr,
):
    pid = tl.program_id(0)
    batch = pid // (items * HEADS_TOGETHER)
    pid -= batch * (items * HEADS_TOGETHER)
    head = batch * HEADS_TOGETHER + pid % HEADS_TOGETHER
    item_ptr = items_ptr + pid // HEADS_TOGETHER * FIELDS
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
    token_M = first_token + row_M // GROUP
    inside_M = (token_M >= begin) & (token_M < stop) & (row_M < TILE_TOKENS * GROUP)
    place_M = token_M.to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + row_M % GROUP
    q_MH = tl.load(
        q_ptr + place_M[:, None] * HEAD + at_H[None, :], mask=inside_M[:, None], other=0.0
    )
    limit_M = tl.minimum(token_M + shift, keys - 1)
    top_M = tl.full([BLOCK_M], -1.0e30, tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MH = tl.zeros([BLOCK_M, HEAD], tl.float32)
    table_ptr += sequence * table_stride
    column = head * HEAD
    if MASK_ALL:
        top_M, sum_M, acc_MH = _tiles(
            q_MH, k_desc, v_desc, table_ptr, column, low, high, limit_M, scale2, top_M, sum_M,
            acc_MH, BLOCK_S, PAGE, True, STAGES,
        )  # fmt: skip
    else:
        # tiles that every query sees whole, then those that a query's last key may lie in
        seen = tl.minimum(tl.maximum(first_token, begin) + shift + 1, keys)
        whole = tl.maximum(tl.minimum(seen // BLOCK_S, high), low)
        top_M, sum_M, acc_MH = _tiles(
            q_MH, k_desc, v_desc, table_ptr, column, low, whole, limit_M, scale2, top_M, sum_M,
            acc_MH, BLOCK_S, PAGE, False, STAGES,
        )  # fmt: skip
        top_M, sum_M, acc_MH = _tiles(
            q_MH, k_desc, v_desc, table_ptr, column, whole, high, limit_M, scale2, top_M, sum_M,
            acc_MH, BLOCK_S, PAGE, True, 1,
        )  # fmt: skip
    out_MH = acc_MH / tl.where(sum_M > 0, sum_M, 1.0)[:, None]
    lse_M = tl.where(sum_M > 0, top_M + tl.log2(sum_M), float("-inf"))
    if slot >= 0:
        row_M = (slot.to(tl.int64) * KV_HEADS + head) * BLOCK_M + row_M
        at_MH = row_M[:, None] * HEAD + at_H[None, :]
        tl.store(partial_ptr + at_MH, out_MH, mask=inside_M[:, None])
        tl.store(partial_lse_ptr + row_M, lse_M, mask=inside_M)
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
        out_H = acc_H / tl.where(total > 0, total, 1.0)
        tl.store(out_ptr + place * HEAD + at_H, out_H.to(out_ptr.dtype.element_ty))
        lse = tl.where(total > 0, top + tl.log2(total), float("-inf"))
        tl.store(lse_ptr + place, lse * 0.6931471805599453)


# --- launches -------------------------------------------------------------------------------------


class Form:
    """One shape of tile: how the kernel is compiled for it."""

    def __init__(
        self, *, rows: int, keys: int, group: int, stages: int, warps: int, resident: int
    ) -> None:
        self.rows, self.keys, self.stages, self.warps = rows, keys, stages, warps
        self.tile_tokens = 1 << (rows // group).bit_length() - 1
        """A power of two, so that tiles can be aligned to the tiles of keys."""
        self.resident = resident
        """Blocks that an SM holds at once."""


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
    if q_TNH.shape[0]:
        for form, work in _step(q_TNH, k_pages, inputs):
            _attend(form, work, q_TNH, k_pages, v_pages, inputs, scale, out_TNH, lse_TN)
    return out_TNH, lse_TN


def _step(q_TNH: torch.Tensor, k_pages: torch.Tensor, inputs: Any) -> list[tuple[Form, WorkList]]:
    """The launches of a step; the first layer that asks builds them for all."""
    memo: dict[Any, Any] = getattr(inputs, "memo", {})
    key = ("paged_attention", q_TNH.shape[1:], k_pages.shape[1:], k_pages.dtype)
    if key not in memo:
        memo[key] = _launches(q_TNH, k_pages, inputs)
    found: list[tuple[Form, WorkList]] = memo[key]
    return found


def _launches(
    q_TNH: torch.Tensor, k_pages: torch.Tensor, inputs: Any
) -> list[tuple[Form, WorkList]]:
    tokens, heads, head_dim = q_TNH.shape
    _, page_tokens, kv_heads, _ = k_pages.shape
    group = heads // kv_heads
    cores = processors(q_TNH.device)
    key_bytes = 2 * head_dim * k_pages.element_size()
    keys = min(DECODE_KEYS, page_tokens)
    decode = Form(
        rows=max(16, triton.next_power_of_2(group)),
        keys=keys,
        group=group,
        stages=DECODE_STAGES,
        warps=DECODE_WARPS,
        resident=max(1, min(3, 220_000 // (DECODE_STAGES * keys * key_bytes))),
    )
    blocks_a_head = max(1, cores * decode.resident // kv_heads)
    host = getattr(inputs, "host", None)
    if host is None and q_TNH.is_cuda and torch.cuda.is_current_stream_capturing():
        assert tokens == len(inputs.kv_lens_B), "recorded steps have one token a sequence"
        return [
            (
                decode,
                recorded_decodes(
                    inputs.query_starts_B1,
                    inputs.kv_lens_B,
                    tile_keys=decode.keys,
                    blocks_a_head=blocks_a_head,
                ),
            )
        ]
    sequences = _queries(inputs, host, tokens)
    decodes = [each for each in sequences if each.end - each.begin <= decode.tile_tokens]
    chunks = [each for each in sequences if each.end - each.begin > decode.tile_tokens]
    found = []
    if chunks:
        longest = max(each.end - each.begin for each in chunks)
        rows = max(64, group) if longest * group <= 64 else max(CHUNK_ROWS, group)
        small = rows < 128
        form = Form(
            rows=triton.next_power_of_2(rows),
            keys=min(64 if small else CHUNK_KEYS, page_tokens),
            group=group,
            stages=CHUNK_STAGES,
            warps=4 if small else CHUNK_WARPS,
            resident=2 if small else 1,
        )
        work = chunk_list(
            chunks,
            tile_tokens=form.tile_tokens,
            tile_keys=form.keys,
            kv_heads=kv_heads,
            blocks=cores * form.resident,
        )
        found.append((form, work.to(q_TNH.device)))
    if decodes:
        work = packed_decodes(decodes, tile_keys=decode.keys, blocks_a_head=blocks_a_head)
        found.append((decode, work.to(q_TNH.device)))
    return found


def _queries(inputs: Any, host: Any, tokens: int) -> list[Queries]:
    """The sequences that have tokens, and the rows behind the last one, which see no keys."""
    if host is None:
        starts, kv_lens = inputs.query_starts_B1.tolist(), inputs.kv_lens_B.tolist()
        first_T = inputs.query_starts_B1[:-1].long().clamp_max(max(tokens - 1, 0))
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
    q_TNH: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    inputs: Any,
    scale: float,
    out_TNH: torch.Tensor,
    lse_TN: torch.Tensor,
) -> None:
    """Runs one list: attention, and the merge where tiles are in pieces."""
    _, heads, head_dim = q_TNH.shape
    _, page_tokens, kv_heads, _ = k_pages.shape
    group = heads // kv_heads
    rows = work.slots * kv_heads * form.rows
    partial = torch.empty((rows, head_dim), dtype=torch.float32, device=q_TNH.device)
    partial_lse = torch.empty(rows, dtype=torch.float32, device=q_TNH.device)
    tensors = (q_TNH, out_TNH, lse_TN, partial, partial_lse, work.items_IF, inputs.page_table_BP)
    sizes = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HEAD": head_dim,
        "PAGE": page_tokens,
        "BLOCK_S": form.keys,
        "TILE_TOKENS": form.tile_tokens,
        "HEADS_TOGETHER": _heads_together(inputs, kv_heads, head_dim, k_pages),
        "FIELDS": work.items_IF.shape[1],
    }
    ran = form.rows == 128 and _attend_gluon(form, work, tensors, k_pages, v_pages, scale, sizes)
    if not ran:
        flat = [pages.view(-1, kv_heads * head_dim) for pages in (k_pages, v_pages)]
        attention_kernel[(len(work.items_IF) * kv_heads,)](
            *tensors,
            *(TensorDescriptor.from_tensor(each, [form.keys, head_dim]) for each in flat),
            scale * math.log2(math.e),
            len(work.items_IF),
            inputs.page_table_BP.stride(0),
            **sizes,
            BLOCK_M=form.rows,
            MASK_ALL=form.rows < 64,
            STAGES=form.stages,
            num_warps=form.warps,
            num_stages=form.stages,
        )
    if work.merges_MF is not None:
        tile_rows = form.tile_tokens * group
        merge_kernel[(len(work.merges_MF) * tile_rows, kv_heads)](
            partial,
            partial_lse,
            work.merges_MF,
            out_TNH,
            lse_TN,
            KV_HEADS=kv_heads,
            GROUP=group,
            HEAD=head_dim,
            BLOCK_M=form.rows,
            TILE_ROWS=tile_rows,
            SLOTS=MERGE_SLOTS,
            FIELDS=work.merges_MF.shape[1],
        )


def _heads_together(
    inputs: Any, kv_heads: int, head_dim: int, k_pages: torch.Tensor
) -> int:
    """How many KV heads run side by side, so that what they read stays in L2."""
    longest = inputs.page_table_BP.shape[1] * k_pages.shape[1]
    head_bytes = 2 * longest * head_dim * k_pages.element_size()
    fitting = [each for each in range(1, kv_heads + 1) if kv_heads % each == 0]
    return max(each for each in fitting if each == 1 or each * head_bytes <= L2_BYTES)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; a CPU, where the interpreter runs, counts as few."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


# --- Gluon ----------------------------------------------------------------------------------------


@functools.cache
def _gluon(device: torch.device) -> Any:
    """The module of Hopper's kernel, or None where it is of no use."""
    if not GLUON or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        from . import gluon  # noqa: PLC0415 - only Hopper has what it imports
    except ImportError as error:
        _fall_back(error)
        return None
    return gluon


def _fall_back(error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    warnings.warn(
        f"paged_attention: the Gluon kernel does not run on Triton {triton.__version__} ({reason}); "
        "chunks take the portable Triton kernel, at about 0.7 of the rate",
        RuntimeWarning,
        stacklevel=2,
    )


_BROKEN: set[tuple[Any, ...]] = set()
"""Configurations of the Gluon kernel that failed to compile in this process."""


def _attend_gluon(
    form: Form,
    work: WorkList,
    tensors: tuple[torch.Tensor, ...],
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    scale: float,
    sizes: dict[str, int],
) -> bool:
    """Runs the Gluon kernel if it can; says so if it should have been able to."""
    q_TNH = tensors[0]
    module = _gluon(q_TNH.device)
    if module is None or not module.takes(q_TNH, k_pages, form.keys):
        return False
    key = (q_TNH.dtype, work.one_masked_tile, *sizes.values())
    if key in _BROKEN:
        return False
    try:
        module.attend(
            tensors,
            k_pages,
            v_pages,
            scale,
            sizes,
            one_masked_tile=work.one_masked_tile,
        )
    except Exception as error:  # noqa: BLE001 - whatever a compiler of another version raises
        _BROKEN.add(key)
        _fall_back(error)
        return False
    return True

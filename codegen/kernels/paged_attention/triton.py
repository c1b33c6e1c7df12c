"""Attention of packed sequences over paged keys: which kernel takes which part of a step.

Steps of decodes take the portable kernel of tiles.py with few rows; chunks take it with 64, or on
Hopper the one of gluon.py with 128. A step with both is one launch from one list where that is
faster (`saves`). Pieces of a decode are merged by the last of them to end, those of a chunk by a
second launch.

What an unwritten slot of a used page holds must be finite, since 0 x NaN is NaN: pools are zeroed.

T tokens of the step, B sequences, P pages of the pool, N query heads, K KV heads, G = N / K,
H head size.
"""

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiles import attention_kernel, merge_kernel
from .work import (
    Queries,
    WorkList,
    chunk_list,
    mixed_list,
    packed_decodes,
    recorded_decodes,
    saves,
)

CHUNK_ROWS = 64
"""Rows of a chunk's tile: two blocks of 64 x 64 an SM run under each other's softmax, and were 3 to
8 % faster on an H100 than one of 128 x 128, at 8 thousand to 128 thousand keys."""
CHUNK_KEYS = 64
"""Keys of its tile, or a page where that is smaller."""
CHUNK_STAGES = 3
CHUNK_WARPS = 4
FP8_KEYS = 128
FP8_STAGES = 2
"""The same for pages in fp8."""
HOPPER_KEYS = 128
"""Keys of a tile of the Gluon kernel, whose tiles have 128 rows."""
DECODE_KEYS = 128
DECODE_STAGES = 3
DECODE_WARPS = 4
DECODE_RESIDENT = 3
"""Blocks of a decode that an SM holds at once, if they fit."""
GLUON = 1
"""1: Hopper's kernel for chunks where it compiles; 0: never."""
L2_BYTES = 41943040
"""Heads run together while their K and V fit into so much of L2 (50 MB on Hopper)."""
MERGE_SLOTS = 32
"""Partial results that a block holds at once when it merges its tile."""
DECODE_WAVES = 1
"""Pieces of decodes, as a multiple of the blocks that run at once."""
DECODE_LEAST = 1
"""Tiles of keys of a decode's shortest piece."""
FUSE_MERGE = 1
"""1: the last piece of a decode merges all; 0: a second launch does."""
APART_TILES = 4
"""A second launch merges pieces up to so many tiles of keys: many small blocks are faster then."""
MIXED = 1
"""1: chunks and decodes of a step share a launch where that saves time; 2: always; 0: never."""
FUSED_ROWS = 128
"""Rows of partial results that fit into a block's registers."""
DECODE_COST_HOPPER = 70
DECODE_COST = 100
"""What a tile of keys costs a decode beside chunks, in hundredths of a full tile of queries: with
Gluon one warpgroup of two works, in the portable kernel all do."""
MERGE_WARPS = 1
MERGE_ROWS = 32
"""Rows of partial results that a program of the merge, which takes a token and KV head, holds."""


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
    fused: bool = False
    """The last piece of a tile merges them all."""
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
    k_scales_PK: torch.Tensor | None = None,
    v_scales_PK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_TNH in q's dtype, lse_TN natural logarithm in fp32); softmax in fp32.

    inputs  StepInputs of plans/ops.py; without its `host` the host waits for the lengths, unless
            the step is recorded
    scales  of pages in fp8, as kv_write leaves them
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
        _attend(
            form,
            work,
            heads,
            (q_TNH, out_TNH, lse_TN),
            (k_pages, v_pages),
            (k_scales_PK, v_scales_PK),
            inputs,
            scale,
        )
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
    at_once = processors(device) * decode.resident
    blocks_a_head = max(1, DECODE_WAVES * at_once // heads.kv_heads)
    host = getattr(inputs, "host", None)
    if getattr(inputs, "recorded", False):
        assert tokens == len(inputs.kv_lens_B), "recorded steps have one token a sequence"
        recorded = recorded_decodes(
            inputs.query_starts_B1,
            inputs.kv_lens_B,
            tile_keys=decode.keys,
            blocks_a_head=blocks_a_head,
            least=DECODE_LEAST,
        )
        return [(decode, recorded.counting(heads.kv_heads))]
    sequences = _queries(inputs, host, tokens)
    decodes = [each for each in sequences if each.end - each.begin <= decode.tile_tokens]
    chunks = [each for each in sequences if each.end - each.begin > decode.tile_tokens]
    found = []
    if chunks:
        longest = max(each.end - each.begin for each in chunks)
        form = chunk_form(heads, device, longest)
        blocks = processors(device) * form.resident
        sizes: dict[str, Any] = {"tile_tokens": form.tile_tokens, "tile_keys": form.keys}
        sizes["blocks"] = blocks
        sizes["kv_heads"] = heads.kv_heads
        cost = DECODE_COST_HOPPER if form.hopper else DECODE_COST
        mixed = {**sizes, "decode_cost": cost / 100}
        if decodes and MIXED and (MIXED > 1 or saves(chunks, decodes, **mixed)):
            together = _heads_together(heads, inputs.page_table_BP.shape[1])
            work = mixed_list(chunks, decodes, heads_together=together, **mixed)
            return [(form, work.to(device))]
        work = chunk_list(chunks, **sizes)
        found.append((form, work.to(device)))
    if decodes:
        work = packed_decodes(
            decodes, tile_keys=decode.keys, blocks_a_head=blocks_a_head, least=DECODE_LEAST
        )
        longest = int((work.items_IF[:, 7] - work.items_IF[:, 6]).max())
        if longest <= APART_TILES:
            decode = replace(decode, fused=False)
        found.append((decode, work.to(device).counting(heads.kv_heads)))
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
        resident=max(1, min(DECODE_RESIDENT, 220_000 // buffers)),
        fused=bool(FUSE_MERGE) and rows < 64,
    )


def chunk_form(heads: Heads, device: torch.device, longest: int) -> Form:
    """Tiles of 128 rows for Gluon; of 64 for Triton, and where no chunk of the step has more."""
    hopper = _hopper(device, heads) if longest * heads.group > CHUNK_ROWS else None
    rows = 128 if hopper else triton.next_power_of_2(max(CHUNK_ROWS, heads.group))
    # the cast of fp8 goes through shared memory
    narrow = heads.page_dtype == torch.float8_e4m3fn
    keys, stages = (FP8_KEYS, FP8_STAGES) if narrow else (CHUNK_KEYS, CHUNK_STAGES)
    return Form(
        rows=rows,
        keys=HOPPER_KEYS if hopper else min(keys, heads.page_tokens),
        tile_tokens=_power_of_two(rows // heads.group),
        stages=stages,
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
    pages: tuple[torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    inputs: Any,
    scale: float,
) -> None:
    """Runs one list: attention, and the merge where tiles are in pieces. tensors: q, out, lse."""
    q_TNH, out_TNH, lse_TN = tensors
    rows = work.slots * heads.kv_heads * form.rows
    partial = torch.empty((rows, heads.head_dim), dtype=torch.float32, device=q_TNH.device)
    partial_lse = torch.empty(rows, dtype=torch.float32, device=q_TNH.device)
    flat = [each.view(-1, heads.kv_heads * heads.head_dim) for each in pages]
    together = _heads_together(heads, inputs.page_table_BP.shape[1])
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
        "heads_together": 0 if work.heads_named else together,
        "HEAD": heads.head_dim,
        "PAGE": heads.page_tokens,
        "BLOCK_S": form.keys,
        "FIELDS": work.items_IF.shape[1],
    }
    merge_rows = triton.next_power_of_2(heads.group)
    grid = (len(work.items_IF) * (1 if work.heads_named else heads.kv_heads),)
    if form.hopper:
        mixed = work.heads_named
        form.hopper(grid, arguments, *flat, one_masked_tile=work.one_masked_tile, mixed=mixed)
    else:
        box = [form.keys, heads.head_dim]
        scaled = heads.page_dtype == torch.float8_e4m3fn
        k_scales, v_scales = scales if scaled else (partial_lse, partial_lse)
        attention_kernel[grid](
            **arguments,
            counters_ptr=work.items_IF if work.counters is None else work.counters,
            k_scales_ptr=k_scales,
            v_scales_ptr=v_scales,
            k_desc=TensorDescriptor.from_tensor(flat[0], box),
            v_desc=TensorDescriptor.from_tensor(flat[1], box),
            BLOCK_M=form.rows,
            MASK_ALL=form.rows < 64,
            SCALED=scaled,
            CAST_ASM=scaled and q_TNH.is_cuda,
            MERGED=form.fused,
            MERGE_ROWS=merge_rows,
            MERGE_SLOTS=max(1, min(MERGE_SLOTS, FUSED_ROWS // merge_rows)),
            STAGES=form.stages,
            num_warps=form.warps,
            num_stages=form.stages,
        )
    if work.merges_MF is not None and not form.fused:
        tokens = min(form.tile_tokens, work.most_tokens)
        merge_kernel[(len(work.merges_MF) * tokens, heads.kv_heads)](
            partial,
            partial_lse,
            work.merges_MF,
            out_TNH,
            lse_TN,
            tokens,
            KV_HEADS=heads.kv_heads,
            GROUP=heads.group,
            HEAD=heads.head_dim,
            BLOCK_M=form.rows,
            ROWS=merge_rows,
            SLOTS=max(1, MERGE_ROWS // merge_rows),
            FIELDS=work.merges_MF.shape[1],
            num_warps=MERGE_WARPS,
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

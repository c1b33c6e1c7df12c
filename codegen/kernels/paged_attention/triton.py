"""Attention of packed sequences over paged keys: which kernel takes which part of a step.

Steps of decodes take the portable kernel of tiles.py with few rows; chunks take it with 64, or on
Hopper the one of gluon.py with 128. A step with both is one launch from one list where that is
faster (`saves`). Pieces are merged by a second launch; where that cannot start early, those of a
decode by the last of them to end.

What an unwritten slot of a used page holds must be finite, since 0 x NaN is NaN: pools are zeroed.

T tokens of the step, B sequences, P pages of the pool, N query heads, K KV heads, G = N / K,
H head size.
"""

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Describe, Launch, described, may_overlap, processors
from .recorded import recorded_decodes
from .tiles import attention_kernel, merge_kernel
from .work import (
    WorkList,
    chunk_list,
    mixed_list,
    packed_decodes,
    saves,
    sent,
    sequences_of,
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
"""The last piece of a decode merges all: 2 always, 1 where launches cannot overlap, 0 never."""
OVERLAP = 1
"""1: launches of decodes start before the one before has ended, from Hopper on."""
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
FEW_TOKENS = 16
"""Below so many tokens a program of a decode's merge takes one row: the chip has room for all."""
FEW_SLOTS = 8
"""It holds so many partial results, where tokens have no more on average, else `MERGE_SLOTS`."""


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
    decode: bool = False
    overlap: bool = False
    """Its launches may start before the one before has ended."""
    hopper: Callable[..., tuple[Launch, Describe]] | None = None
    """Prepares a launch of the Gluon kernel, where that one is used."""


class Heads(NamedTuple):
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
    heads = Heads(
        kv_heads=k_pages.shape[2],
        group=q_TNH.shape[1] // k_pages.shape[2],
        head_dim=q_TNH.shape[2],
        page_tokens=k_pages.shape[1],
        dtype=q_TNH.dtype,
        page_dtype=k_pages.dtype,
    )
    results = getattr(inputs, "results", None)
    if results is None:
        lse_TN = torch.empty(q_TNH.shape[:2], dtype=torch.float32, device=q_TNH.device)
        results = (torch.empty_like(q_TNH), lse_TN)
    out_TNH, lse_TN = results
    tensors = (q_TNH, out_TNH, lse_TN, k_pages, v_pages, k_scales_PK, v_scales_PK)
    for call in _step(heads, q_TNH, inputs, scale) if q_TNH.shape[0] else ():
        call(*tensors)
    return out_TNH, lse_TN


class Call(NamedTuple):
    """The launches of a list, for all layers of a step."""

    attention: Launch
    merge: Launch | None
    box: tuple[int, int]
    describe: Describe
    scaled: bool

    def __call__(
        self,
        q_TNH: torch.Tensor,
        out_TNH: torch.Tensor,
        lse_TN: torch.Tensor,
        *pages: torch.Tensor | None,
    ) -> None:
        """Runs a layer; pages and, where they are in fp8, their scales: of keys and of values."""
        k_pages, v_pages, *scales = pages
        results = {"out_ptr": out_TNH, "lse_ptr": lse_TN}
        tensors = {
            "q_ptr": q_TNH,
            **results,
            "k_desc": described(k_pages, self.box, self.describe),
            "v_desc": described(v_pages, self.box, self.describe),
        }
        if self.scaled:
            tensors["k_scales_ptr"], tensors["v_scales_ptr"] = scales
        self.attention(tensors)
        if self.merge is not None:
            self.merge(results)


def _step(heads: Heads, q_TNH: torch.Tensor, inputs: Any, scale: float) -> list[Call]:
    """The launches of a step; the first layer that asks prepares them for all.

    Layers run one after the other, on one stream: they share the buffers of partial results.
    """
    memo: dict[Any, Any] = getattr(inputs, "memo", {})
    key = ("paged_attention", heads, scale)
    if key not in memo:
        lists = ("paged_attention", heads)
        if lists not in memo:
            memo[lists] = _launches(heads, q_TNH, inputs)
        table_BP = inputs.page_table_BP
        memo[key] = [_prepared(*each, heads, table_BP, scale) for each in memo[lists]]
    found: list[Call] = memo[key]
    return found


def _launches(heads: Heads, q_TNH: torch.Tensor, inputs: Any) -> list[tuple[Form, WorkList]]:
    """What a step launches: a list for chunks, a list for decodes, or one for both."""
    tokens, device = q_TNH.shape[0], q_TNH.device
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        _compile_all(device, heads)
    decode = decode_form(heads, device)
    at_once = processors(device) * decode.resident
    blocks_a_head = max(1, DECODE_WAVES * at_once // heads.kv_heads)
    if getattr(inputs, "recorded", False):
        assert tokens == len(inputs.kv_lens_B), "recorded steps have one token a sequence"
        recorded = recorded_decodes(
            inputs.query_starts_B1,
            inputs.kv_lens_B,
            tile_keys=decode.keys,
            blocks_a_head=blocks_a_head,
            least=DECODE_LEAST,
        )
        return [(decode, recorded.counting(heads.kv_heads) if decode.fused else recorded)]
    sequences = sequences_of(inputs, tokens)
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
            found.append((form, mixed_list(chunks, decodes, heads_together=together, **mixed)))
            decodes = []
        else:
            found.append((form, chunk_list(chunks, **sizes)))
    if decodes:
        work = packed_decodes(
            decodes, tile_keys=decode.keys, blocks_a_head=blocks_a_head, least=DECODE_LEAST
        )
        if work.longest <= APART_TILES:
            decode = replace(decode, fused=False)
        found.append((decode, work.counting(heads.kv_heads) if decode.fused else work))
    lists = sent([work for _, work in found], device)
    return [(form, work) for (form, _), work in zip(found, lists, strict=True)]


def decode_form(heads: Heads, device: torch.device) -> Form:
    """Tiles of 16 rows, or of one token's query heads where those are more."""
    rows = max(16, triton.next_power_of_2(heads.group))
    keys = min(DECODE_KEYS, heads.page_tokens)
    overlap = OVERLAP == 1 and may_overlap(device)
    buffers = DECODE_STAGES * keys * 2 * heads.head_dim * heads.page_dtype.itemsize
    return Form(
        rows=rows,
        keys=keys,
        tile_tokens=_power_of_two(rows // heads.group),
        stages=DECODE_STAGES,
        warps=DECODE_WARPS,
        resident=max(1, min(DECODE_RESIDENT, 220_000 // buffers)),
        fused=(FUSE_MERGE > 1 or (FUSE_MERGE == 1 and not overlap)) and rows < 64,
        decode=True,
        overlap=overlap,
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


def _prepared(
    form: Form, work: WorkList, heads: Heads, table_BP: torch.Tensor, scale: float
) -> Call:
    """The launches of one list: attention, and the merge where tiles are in pieces."""
    device = work.items_IF.device
    rows = work.slots * heads.kv_heads * form.rows
    partial = torch.empty((rows, heads.head_dim), dtype=torch.float32, device=device)
    partial_lse = torch.empty(rows, dtype=torch.float32, device=device)
    partials = {"partial_ptr": partial, "partial_lse_ptr": partial_lse}
    arguments = {
        **partials,
        "items_ptr": work.items_IF,
        "table_ptr": table_BP,
        "scale2": scale * math.log2(math.e),
        "items": len(work.items_IF),
        "table_stride": table_BP.stride(0),
        "kv_heads": heads.kv_heads,
        "group": heads.group,
        "tile_tokens": form.tile_tokens,
        "heads_together": 0 if work.heads_named else _heads_together(heads, table_BP.shape[1]),
    }
    constants = {
        "HEAD": heads.head_dim,
        "PAGE": heads.page_tokens,
        "BLOCK_S": form.keys,
        "FIELDS": work.items_IF.shape[1],
    }
    merge_rows = triton.next_power_of_2(heads.group)
    grid = (len(work.items_IF) * (1 if work.heads_named else heads.kv_heads),)
    scaled = heads.page_dtype == torch.float8_e4m3fn
    early = {"OVERLAP": int(form.overlap), "launch_pdl": form.overlap}
    if form.hopper:
        box, scaled = (heads.page_tokens, heads.head_dim), False
        attention, describe = form.hopper(
            grid,
            arguments,
            constants,
            one_masked_tile=work.one_masked_tile,
            mixed=work.heads_named,
        )
    else:
        box, describe = (form.keys, heads.head_dim), TensorDescriptor
        arguments["counters_ptr"] = work.items_IF if work.counters is None else work.counters
        if not scaled:
            arguments |= {"k_scales_ptr": partial_lse, "v_scales_ptr": partial_lse}
        constants |= {
            "BLOCK_M": form.rows,
            "MASK_ALL": form.rows < 64,
            "SCALED": scaled,
            "CAST_ASM": scaled and device.type == "cuda",
            "MERGED": form.fused,
            "MERGE_ROWS": merge_rows,
            "MERGE_SLOTS": max(1, min(MERGE_SLOTS, FUSED_ROWS // merge_rows)),
            "STAGES": form.stages,
            "num_warps": form.warps,
            "num_stages": form.stages,
            **early,
        }
        attention = Launch(attention_kernel, grid, arguments, constants)
    merge = None
    if work.merges_MF is not None and not form.fused:
        tokens = min(form.tile_tokens, work.most_tokens)
        merges = len(work.merges_MF)
        slots = max(1, MERGE_ROWS // merge_rows)
        if form.decode and merges * tokens < FEW_TOKENS:
            merge_rows = 1
            slots = FEW_SLOTS if work.slots <= FEW_SLOTS * merges else MERGE_SLOTS
        merge = Launch(
            merge_kernel,
            (merges * tokens, heads.kv_heads * triton.cdiv(heads.group, merge_rows)),
            {**partials, "merges_ptr": work.merges_MF, "tile_tokens": tokens},
            {
                "KV_HEADS": heads.kv_heads,
                "GROUP": heads.group,
                "HEAD": heads.head_dim,
                "BLOCK_M": form.rows,
                "ROWS": merge_rows,
                "SLOTS": slots,
                "FIELDS": work.merges_MF.shape[1],
                "num_warps": MERGE_WARPS,
                **early,
            },
        )
    return Call(attention=attention, merge=merge, box=box, describe=describe, scaled=scaled)


@functools.cache
def _compile_all(device: torch.device, heads: Heads) -> None:
    """Compiles every form, so that none is in the midst of serving: one may take half a second."""
    tokens = (1, heads.kv_heads * heads.group)
    q_TNH = torch.zeros((*tokens, heads.head_dim), dtype=heads.dtype, device=device)
    shape = (1, heads.page_tokens, heads.kv_heads, heads.head_dim)
    pages = torch.zeros(shape, dtype=heads.page_dtype, device=device)
    scales_PK = torch.zeros((1, heads.kv_heads), device=device)
    lse_TN = torch.empty(tokens, device=device)
    tensors = (q_TNH, torch.empty_like(q_TNH), lse_TN, pages, pages, scales_PK, scales_PK)
    for call in every_call(device, heads):
        call(*tensors)
    torch.cuda.synchronize(device)


def every_call(device: torch.device, heads: Heads) -> list[Call]:
    """A call of each form that a step can take, on a token without keys."""
    decode = decode_form(heads, device)
    apart = replace(decode, fused=False)
    forms = [decode, apart, *{chunk_form(heads, device, longest) for longest in (1, 1 << 20)}]
    item = [[0, 0, 0, 1, 0, 0, 0, 0, -1, 0, 0, 1]]

    def work(merges: int, slots: int) -> WorkList:
        return WorkList(
            items_IF=torch.tensor(item, dtype=torch.int32, device=device),
            merges_MF=torch.tensor([[0, 1, 0, 0, 1]] * merges, dtype=torch.int32, device=device),
            slots=slots,
            one_masked_tile=False,
        )

    table_BP = torch.zeros((1, 1), dtype=torch.int32, device=device)
    lists = [
        (form, replace(work(FEW_TOKENS, 1), one_masked_tile=one, heads_named=named))
        for form in forms
        for one, named in itertools.product((False, True), repeat=2)
    ]
    lists += [(apart, work(1, slots)) for slots in (FEW_SLOTS, FEW_SLOTS + 1)]
    return [_prepared(*each, heads, table_BP, 1.0) for each in lists]


def _heads_together(heads: Heads, pages: int) -> int:
    """How many KV heads run side by side, so that what they read stays in L2."""
    head_bytes = 2 * pages * heads.page_tokens * heads.head_dim * heads.page_dtype.itemsize
    fitting = [each for each in range(1, heads.kv_heads + 1) if heads.kv_heads % each == 0]
    return max(each for each in fitting if each == 1 or each * head_bytes <= L2_BYTES)


@functools.cache
def _hopper(device: torch.device, heads: Heads) -> Callable[..., tuple[Launch, Describe]] | None:
    """What prepares the Gluon kernel, tried once; None where it is of no use, said where it fails.

    The try compiles it, so that no step does.
    """
    if not GLUON or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        from .gluon import prepared, takes, try_out  # noqa: PLC0415 - Hopper's only

        if takes(heads):
            try_out(device, heads)
            return prepared
    except Exception as error:  # noqa: BLE001 - whatever a compiler of another version raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(
            f"paged_attention: the Gluon kernel fails on Triton {triton.__version__} ({reason}); "
            "chunks take the portable Triton kernel, at about 0.7 of the rate",
            RuntimeWarning,
            stacklevel=2,
        )
    return None

"""Chunk attention for Hopper: one warp fetches keys and values, two warpgroups attend.

The Triton kernel's twin, in Gluon, for tiles of 128 rows: each warpgroup holds 64 of them. What it
does that Triton's compiler does not:

- the product with V of a tile runs under the softmax of the next. ptxas would wait for both
  products before the softmax; a store that is never taken, and that depends on the row maxima,
  keeps the wait where it stands (`_pin`; behind the row sums it costs 2 to 4 %)
- tiles of keys are taken from the last to the first, so that the diagonal one, the only one with a
  mask, stands before the loop
- a tile of 128 keys is fetched as several boxes, so a page may be smaller

Barriers: a full and an empty one for each stage of K and of V. Turns of the warpgroups at the
tensor cores, by named barriers, were within 1 % of none, either way.

KV heads, group and tokens of a tile are arguments of a launch, no constants: with a constant group
of 8 ptxas put the whole softmax before the second wait, at a cost of 8 %, and a group of 4 it did
not. One binary serves all models of a head size.

M rows of a warpgroup, S keys of a tile, H head size.
"""

import itertools
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .launch import Describe, Launch, described

block_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of 3.7, of 3.6
STAGES = 2
"""Tiles of K and of V in flight: 128 KB of shared memory at 128 x 128, beside 32 KB of Q. A third
brings chunks nothing."""
MIXED_STAGES = 3
"""The same where decodes are among the items: they wait for memory, and the more is on its way."""
PAGES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24

UNSPECIALISED: tuple[str, ...] = (
    "items",
    "table_stride",
    "kv_heads",
    "group",
    "tile_tokens",
    "heads_together",
)

FLOOR: gl.constexpr = gl.constexpr(-1.0e20)
"""Least maximum of a row, as in triton.py."""
PIN: gl.constexpr = gl.constexpr(
    "{ .reg .pred %never; .reg .b32 %at; mov.b32 %at, 0; setp.lt.f32 %never, $1, 0fFF7FFFFF;"
    " @%never st.volatile.shared.b32 [%at], %at; mov.b32 $0, 0; }"
)


@gluon.jit
def _pin(x):
    gl.inline_asm_elementwise(PIN, "=r,f", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _place(items_ptr, items, heads_together, MIXED: gl.constexpr, FIELDS: gl.constexpr):
    """KV head and item of this block."""
    pid = gl.program_id(0)
    if MIXED:
        item_ptr = items_ptr + pid * FIELDS
        return gl.load(item_ptr + 9), item_ptr
    batch = pid // (items * heads_together)
    pid -= batch * (items * heads_together)
    head = batch * heads_together + pid % heads_together
    return head, items_ptr + pid // heads_together * FIELDS


@gluon.jit
def _fetch(
    desc,
    table_ptr,
    last_page,
    tile,
    buffers,
    full,
    empty,
    count,
    column,
    PAGE: gl.constexpr,
    BLOCK_S: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Starts the copy of a tile, one box a page, as soon as its buffer is free."""
    slot = count % STAGES
    for part in gl.static_range(BLOCK_S // PAGE):
        # read before the wait, which hides the latency; a tile may end behind the last page
        page = gl.load(table_ptr + gl.minimum(tile * (BLOCK_S // PAGE) + part, last_page))
        if part == 0:
            mbarrier.wait(empty.index(slot), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), desc.block_type.nbytes * (BLOCK_S // PAGE))
        tma.async_copy_global_to_shared(
            desc,
            [page * PAGE, column],
            full.index(slot),
            buffers.index(slot).slice(part * PAGE, PAGE, dim=0),
        )


@gluon.jit
def _produce(
    k_desc,
    v_desc,
    items_ptr,
    table_ptr,
    items,
    table_stride,
    heads_together,
    k_smem,
    v_smem,
    k_full,
    k_empty,
    v_full,
    v_empty,
    HEAD: gl.constexpr,
    PAGE: gl.constexpr,
    BLOCK_S: gl.constexpr,
    STAGES: gl.constexpr,
    MIXED: gl.constexpr,
    FIELDS: gl.constexpr,
):
    """Fetches K one tile ahead of V: K0 K1 V0 K2 V1, the order in which they are used."""
    head, item_ptr = _place(items_ptr, items, heads_together, MIXED, FIELDS)
    table_ptr += gl.load(item_ptr).to(gl.int64) * table_stride
    last_page = (gl.load(item_ptr + 5) - 1) // PAGE
    low = gl.load(item_ptr + 6)
    high = gl.load(item_ptr + 7)
    column = head * HEAD
    count = high - low
    if count > 0:
        _fetch(k_desc, table_ptr, last_page, high - 1, k_smem, k_full, k_empty, 0, column, PAGE,
               BLOCK_S, STAGES)  # fmt: skip
        for j in range(1, count):
            _fetch(k_desc, table_ptr, last_page, high - 1 - j, k_smem, k_full, k_empty, j, column,
                   PAGE, BLOCK_S, STAGES)  # fmt: skip
            _fetch(v_desc, table_ptr, last_page, high - j, v_smem, v_full, v_empty, j - 1, column,
                   PAGE, BLOCK_S, STAGES)  # fmt: skip
        _fetch(v_desc, table_ptr, last_page, low, v_smem, v_full, v_empty, count - 1, column, PAGE,
               BLOCK_S, STAGES)  # fmt: skip


@gluon.jit
def _consume(  # noqa: PLR0915 - one loop and what feeds it
    HALF: gl.constexpr,
    q_ptr,
    out_ptr,
    lse_ptr,
    partial_ptr,
    partial_lse_ptr,
    items_ptr,
    items,
    scale2,
    q_smem,
    k_smem,
    v_smem,
    k_full,
    k_empty,
    v_full,
    v_empty,
    kv_heads,
    group,
    tile_tokens,
    heads_together,
    HEAD: gl.constexpr,
    BLOCK_S: gl.constexpr,
    STAGES: gl.constexpr,
    ONE_MASKED_TILE: gl.constexpr,
    MIXED: gl.constexpr,
    FIELDS: gl.constexpr,
):
    """Attends 64 rows: the first or second half of the tile's tokens."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_S, 16]
    )
    OUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD, 16]
    )
    SHARES: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD, HEAD // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    head, item_ptr = _place(items_ptr, items, heads_together, MIXED, FIELDS)
    first_token = gl.load(item_ptr + 1)
    begin = gl.load(item_ptr + 2)
    stop = gl.load(item_ptr + 3)
    shift = gl.load(item_ptr + 4)
    keys = gl.load(item_ptr + 5)
    low = gl.load(item_ptr + 6)
    high = gl.load(item_ptr + 7)
    slot = gl.load(item_ptr + 8)
    half_token = first_token + HALF * (tile_tokens // 2)

    # rows as 16-byte loads and stores spread them
    row_M = gl.arange(0, 64, layout=gl.SliceLayout(1, WIDE))
    at_H = gl.arange(0, HEAD, layout=gl.SliceLayout(0, WIDE))
    token_M = half_token + row_M // group
    inside_M = (token_M >= begin) & (token_M < stop) & (row_M < tile_tokens // 2 * group)
    place_M = token_M.to(gl.int64) * (kv_heads * group) + head * group + row_M % group
    q_MH = gl.load(
        q_ptr + place_M[:, None] * HEAD + at_H[None, :], mask=inside_M[:, None], other=0.0
    )
    q_smem.store(q_MH)
    fence_async_shared()
    block_barrier()

    # rows as the products spread them
    srow_M = gl.arange(0, 64, layout=gl.SliceLayout(1, LOGITS))
    stoken_M = half_token + srow_M // group
    limit_M = gl.minimum(stoken_M + shift, keys - 1)
    at_S = gl.arange(0, BLOCK_S, layout=gl.SliceLayout(0, LOGITS))
    zero_MS = gl.zeros([64, BLOCK_S], gl.float32, LOGITS)
    top_M = gl.full([64], FLOOR, gl.float32, gl.SliceLayout(1, LOGITS))
    sum_M = gl.zeros([64], gl.float32, gl.SliceLayout(1, LOGITS))
    acc_MH = gl.zeros([64, HEAD], gl.float32, OUT)
    whole = gl.minimum(gl.maximum(first_token, begin) + shift + 1, keys) // BLOCK_S
    count = high - low
    if MIXED:
        # a decode has tokens in one half only; the other lets its buffers pass
        empty = (half_token >= stop) | (half_token + tile_tokens // 2 <= begin)
        passing = gl.where(empty, count, 0)
        for j in range(passing):
            mbarrier.wait(k_full.index(j % STAGES), (j // STAGES) & 1)
            mbarrier.arrive(k_empty.index(j % STAGES), count=1)
            mbarrier.wait(v_full.index(j % STAGES), (j // STAGES) & 1)
            mbarrier.arrive(v_empty.index(j % STAGES), count=1)
        count -= passing
    if count > 0:
        mbarrier.wait(k_full.index(0), 0)
        product = warpgroup_mma(
            q_smem, k_smem.index(0).permute((1, 0)), zero_MS, use_acc=False, is_async=True
        )
        logits_MS = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(k_empty.index(0), count=1)
        seen_MS = ((high - 1) * BLOCK_S + at_S)[None, :] <= limit_M[:, None]
        logits_MS = gl.where(seen_MS, logits_MS, -1.0e30)
        top_M = gl.maximum(top_M, gl.max(logits_MS, 1) * scale2)
        share32_MS = gl.exp2(logits_MS * scale2 - top_M[:, None])
        sum_M = gl.sum(share32_MS, 1)
        share_MS = gl.convert_layout(share32_MS.to(dtype), SHARES)
        for j in range(1, count):
            now = j % STAGES
            before = (j - 1) % STAGES
            mbarrier.wait(k_full.index(now), (j // STAGES) & 1)
            product = warpgroup_mma(
                q_smem, k_smem.index(now).permute((1, 0)), zero_MS, use_acc=False, is_async=True
            )
            mbarrier.wait(v_full.index(before), ((j - 1) // STAGES) & 1)
            weighted = warpgroup_mma(share_MS, v_smem.index(before), acc_MH, is_async=True)
            logits_MS = warpgroup_mma_wait(1, deps=(product,))
            mbarrier.arrive(k_empty.index(now), count=1)
            if not ONE_MASKED_TILE:
                tile = high - 1 - j
                if tile >= whole:
                    seen_MS = (tile * BLOCK_S + at_S)[None, :] <= limit_M[:, None]
                    logits_MS = gl.where(seen_MS, logits_MS, -1.0e30)
            new_M = gl.maximum(top_M, gl.max(logits_MS, 1) * scale2)
            share32_MS = gl.exp2(logits_MS * scale2 - new_M[:, None])
            fade_M = gl.exp2(top_M - new_M)
            sum_M = sum_M * fade_M + gl.sum(share32_MS, 1)
            _pin(new_M)
            acc_MH = warpgroup_mma_wait(0, deps=(weighted,))
            mbarrier.arrive(v_empty.index(before), count=1)
            acc_MH = acc_MH * gl.convert_layout(fade_M, gl.SliceLayout(1, OUT))[:, None]
            share_MS = gl.convert_layout(share32_MS.to(dtype), SHARES)
            top_M = new_M
        last = (count - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((count - 1) // STAGES) & 1)
        weighted = warpgroup_mma(share_MS, v_smem.index(last), acc_MH, is_async=True)
        acc_MH = warpgroup_mma_wait(0, deps=(weighted,))

    inverse_M = gl.where(sum_M > 0.0, 1.0 / sum_M, 0.0)
    out_MH = acc_MH * gl.convert_layout(inverse_M, gl.SliceLayout(1, OUT))[:, None]
    lse_M = gl.where(sum_M > 0.0, top_M + gl.log2(sum_M), -float("inf"))
    sinside_M = (stoken_M >= begin) & (stoken_M < stop) & (srow_M < tile_tokens // 2 * group)
    if slot >= 0:
        base = (slot.to(gl.int64) * kv_heads + head) * 128 + HALF * (tile_tokens // 2 * group)
        orow_M = gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
        oat_H = gl.arange(0, HEAD, layout=gl.SliceLayout(0, OUT))
        at_MH = (base + orow_M)[:, None] * HEAD + oat_H[None, :]
        # rows outside the tile's tokens would be those of the other half
        gl.store(partial_ptr + at_MH, out_MH, mask=(orow_M < tile_tokens // 2 * group)[:, None])
        gl.store(partial_lse_ptr + base + srow_M, lse_M, mask=sinside_M)
    else:
        q_smem.store(out_MH.to(dtype))  # Q is no longer needed; its buffer makes 16-byte rows
        gl.store(
            out_ptr + place_M[:, None] * HEAD + at_H[None, :],
            q_smem.load(WIDE),
            mask=inside_M[:, None],
        )
        splace_M = stoken_M.to(gl.int64) * (kv_heads * group) + head * group + srow_M % group
        gl.store(lse_ptr + splace_M, lse_M * 0.6931471805599453, mask=sinside_M)  # natural


@gluon.jit(do_not_specialize=UNSPECIALISED)
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
    HEAD: gl.constexpr,
    PAGE: gl.constexpr,
    BLOCK_S: gl.constexpr,
    ONE_MASKED_TILE: gl.constexpr,
    MIXED: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER: gl.constexpr,
    PRODUCER: gl.constexpr,
    FIELDS: gl.constexpr,
):
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=16, rank=2
    )
    q0_smem = gl.allocate_shared_memory(dtype, [64, HEAD], SWIZZLED)
    q1_smem = gl.allocate_shared_memory(dtype, [64, HEAD], SWIZZLED)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_S, HEAD], SWIZZLED)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_S, HEAD], SWIZZLED)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)  # both warpgroups
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    block_barrier()
    gl.warp_specialize(
        [
            (
                _consume,
                (0, q_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, items_ptr, items,
                 scale2, q0_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, kv_heads,
                 group, tile_tokens, heads_together, HEAD, BLOCK_S, STAGES, ONE_MASKED_TILE,
                 MIXED, FIELDS),
            ),
            (
                _consume,
                (1, q_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, items_ptr, items,
                 scale2, q1_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, kv_heads,
                 group, tile_tokens, heads_together, HEAD, BLOCK_S, STAGES, ONE_MASKED_TILE,
                 MIXED, FIELDS),
            ),
            (
                _produce,
                (k_desc, v_desc, items_ptr, table_ptr, items, table_stride, heads_together,
                 k_smem, v_smem, k_full, k_empty, v_full, v_empty, HEAD, PAGE, BLOCK_S, STAGES,
                 MIXED, FIELDS),
            ),
        ],
        [4, 1],
        [CONSUMER, PRODUCER],
    )  # fmt: skip


def takes(heads: Any) -> bool:
    """Whether the kernel is made for such heads and pages."""
    types = heads.dtype == heads.page_dtype and heads.dtype in {torch.bfloat16, torch.float16}
    sizes = heads.head_dim in {64, 128} and heads.page_tokens in {16, 32, 64, 128}
    return types and sizes and heads.group <= 64


def describe(base: Any, shape: list[int], strides: list[int], box: list[int]) -> Any:
    """Descriptor of pages as the kernel's shared memory takes them."""
    return TensorDescriptor(base, shape, strides, box, PAGES)


def prepared(
    grid: tuple[int],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    *,
    one_masked_tile: bool,
    mixed: bool,
) -> tuple[Launch, Describe]:
    """A launch of a list; arguments and constants are those that the Triton kernel has too."""
    own = {
        "ONE_MASKED_TILE": one_masked_tile,
        "MIXED": mixed,
        "STAGES": MIXED_STAGES if mixed else STAGES,
        "CONSUMER": CONSUMER_REGISTERS,
        "PRODUCER": PRODUCER_REGISTERS,
        "num_warps": 4,
    }
    return Launch(attention_kernel, grid, arguments, constants | own), describe


def try_out(device: torch.device, heads: Any) -> None:
    """Compiles and runs all forms on one token without keys; raises where they do not work."""
    width = heads.kv_heads * heads.head_dim
    q_TNH = torch.zeros(width * heads.group, dtype=heads.dtype, device=device)
    shape = (1, heads.page_tokens, heads.kv_heads, heads.head_dim)
    pages = torch.zeros(shape, dtype=heads.page_dtype, device=device)
    floats = torch.zeros(128 * width, dtype=torch.float32, device=device)
    item = torch.tensor([[0, 0, 0, 1, 0, 0, 0, 0, -1, 0, 0, 1]], dtype=torch.int32, device=device)
    arguments = {
        "partial_ptr": floats,
        "partial_lse_ptr": floats,
        "items_ptr": item,
        "table_ptr": item,
        "scale2": 1.0,
        "items": 1,
        "table_stride": 1,
        "heads_together": 1,
        "kv_heads": heads.kv_heads,
        "group": heads.group,
        "tile_tokens": 1 << (128 // heads.group).bit_length() - 1,
    }
    constants = {
        "HEAD": heads.head_dim,
        "PAGE": heads.page_tokens,
        "BLOCK_S": 128,
        "FIELDS": item.shape[1],
    }
    box = (heads.page_tokens, heads.head_dim)
    given = {
        "q_ptr": q_TNH,
        "out_ptr": torch.empty_like(q_TNH),
        "lse_ptr": floats,
        "k_desc": described(pages, box, describe),
        "v_desc": described(pages, box, describe),
    }
    for masked, mixed in itertools.product((True, False), repeat=2):
        launch, _ = prepared((1,), arguments, constants, one_masked_tile=masked, mixed=mixed)
        launch(given)
    torch.cuda.synchronize(device)

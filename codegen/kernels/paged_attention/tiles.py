"""The portable kernels of paged attention, in Triton: items of a work list, merge of pieces.

All query heads of a KV head share its tiles, so rows are packed, row = token x G + head in group;
a decode's few rows take mma.sync (16 rows), a chunk's take wgmma. Logarithms are base 2 inside and
natural in the result. K and V arrive by TMA, a page number ahead of its tile: a number that is
loaded in its own turn costs the pipeline one of its stages.

Pages of fp8 hold x / scale, a power of two for each page and KV head (kv_write). They are read as
fp16, into which e4m3 goes exactly and in one instruction a pair; bf16 would take three. K's scale
multiplies the logits, V's the shares, as a ratio to the first tile's, so that fp16 holds them.

On Hopper launches of decodes overlap (programmatic dependent launch), which is safe since:
- Every kernel that starts early waits, in every block, for the whole launch before it and for what
  that wrote (`griddepcontrol.wait`); others start after it anyway. So a launch ends after the one
  before it has ended, and by induction after all before: what follows a wait is behind all of them,
  not only the last. Layer n + 1 writes partial results and counters behind its wait, when the merge
  of layer n, which reads them, has ended, however early the kernels between have started.
- Attention does nothing before its wait. The merge reads its list before it: no kernel of the
  step's layers writes lists, and whatever did so had ended before attention let the merge start,
  behind its own wait; the list is read past L1, from where the writes had arrived.
- The kernel behind the merge reads weights alone before its wait.

T tokens of the step, N query heads, K KV heads, G = N / K, M rows and S keys of a tile, H head
size, R pieces of a tile.
"""

import triton
import triton.language as tl

FLOOR: tl.constexpr = tl.constexpr(-1.0e20)
"""Least maximum of a row, below any logit and far above a masked one, -1e30 x scale: a row that
sees nothing of a tile then gets shares of 0. With its own maximum its shares would be exp2 of what
rounding leaves of -1e30 - -1e30, which may be 1e22."""
FROM_E4M3: tl.constexpr = tl.constexpr(
    "{ .reg .b16 %lo, %hi; mov.b32 {%lo, %hi}, $2;"
    " cvt.rn.f16x2.e4m3x2 $0, %lo; cvt.rn.f16x2.e4m3x2 $1, %hi; }"
)
"""The cast of four values. Triton must not move it, hence not `pure`: it would read V in the layout
of the product and cast then, a byte at a time, since no instruction turns a tile of bytes."""
NATURAL: tl.constexpr = tl.constexpr(0.6931471805599453)
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
    k_scales_ptr,
    v_scales_ptr,
    table_ptr,
    head,
    kv_heads,
    first,
    end,
    limit_M,
    scale2,
    first_scale,
    top_M,
    sum_M,
    acc_MH,
    HEAD: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PAGE: tl.constexpr,
    MASK: tl.constexpr,
    SCALED: tl.constexpr,
    CAST_ASM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Takes tiles of keys [first, end) into the running softmax."""
    PER_PAGE: tl.constexpr = PAGE // BLOCK_S
    column = head * HEAD
    page = tl.load(table_ptr + first // PER_PAGE, mask=first < end, other=0)
    if SCALED:
        at = page * kv_heads + head
        logit_scale = tl.load(k_scales_ptr + at)
        share_scale = tl.load(v_scales_ptr + at) / first_scale
    for i in tl.range(first, end, num_stages=STAGES):
        row = page * PAGE + (i % PER_PAGE) * BLOCK_S
        page = tl.load(table_ptr + tl.minimum(i + 1, end - 1) // PER_PAGE)
        k_SH = k_desc.load([row, column]).to(q_MH.dtype)
        logits_MS = tl.dot(q_MH, k_SH.T, input_precision="ieee")
        if SCALED:
            logits_MS *= logit_scale
        if MASK:
            key_S = i * BLOCK_S + tl.arange(0, BLOCK_S)
            logits_MS = tl.where(key_S[None, :] <= limit_M[:, None], logits_MS, -1.0e30)
        new_M = tl.maximum(top_M, tl.max(logits_MS, 1) * scale2)
        share_MS = tl.exp2(logits_MS * scale2 - new_M[:, None])
        fade_M = tl.exp2(top_M - new_M)
        sum_M = sum_M * fade_M + tl.sum(share_MS, 1)
        acc_MH = acc_MH * fade_M[:, None]
        if SCALED:
            share_MS *= share_scale
        v_SH = v_desc.load([row, column])
        if CAST_ASM:
            v_SH = tl.inline_asm_elementwise(
                FROM_E4M3, "=r,=r,r", [v_SH], dtype=tl.float16, is_pure=False, pack=4
            )
        v_SH = v_SH.to(q_MH.dtype)
        acc_MH = tl.dot(share_MS.to(q_MH.dtype), v_SH, acc_MH, input_precision="ieee")
        top_M = new_M
        if SCALED:  # the next tile's, behind the products: its page number has arrived by then
            at = page * kv_heads + head
            logit_scale = tl.load(k_scales_ptr + at)
            share_scale = tl.load(v_scales_ptr + at) / first_scale
    return top_M, sum_M, acc_MH


@triton.jit
def _merged(
    partial_ptr,
    partial_lse_ptr,
    first,
    pieces,
    head,
    kv_heads,
    row,
    group,
    out_ptr,
    lse_ptr,
    place,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Merges the pieces of `group` rows from `row` on, SLOTS at a time, into the result.

    Read past L1, which may hold what these places held before other blocks wrote them.
    """
    at_H = tl.arange(0, HEAD)
    row_M = tl.arange(0, ROWS)
    top_M = tl.full([ROWS], FLOOR, tl.float32)
    sum_M = tl.zeros([ROWS], tl.float32)
    acc_MH = tl.zeros([ROWS, HEAD], tl.float32)
    for start in range(0, pieces, SLOTS):
        slot_R = start + tl.arange(0, SLOTS)
        base_R = ((first + slot_R).to(tl.int64) * kv_heads + head) * BLOCK_M + row
        at_RM = base_R[:, None] + row_M[None, :]
        used_RM = (slot_R < pieces)[:, None] & (row_M < group)[None, :]
        lse_RM = tl.load(
            partial_lse_ptr + at_RM, mask=used_RM, other=float("-inf"), cache_modifier=".cg"
        )
        part_RMH = tl.load(
            partial_ptr + at_RM[:, :, None] * HEAD + at_H[None, None, :],
            mask=used_RM[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        new_M = tl.maximum(top_M, tl.max(lse_RM, 0))
        fade_M = tl.exp2(top_M - new_M)
        weight_RM = tl.exp2(lse_RM - new_M[None, :])
        sum_M = sum_M * fade_M + tl.sum(weight_RM, 0)
        acc_MH = acc_MH * fade_M[:, None] + tl.sum(part_RMH * weight_RM[:, :, None], 0)
        top_M = new_M
    safe_M = tl.where(sum_M > 0, sum_M, 1.0)
    out_MH = acc_MH / safe_M[:, None]
    lse_M = tl.where(sum_M > 0, top_M + tl.log2(safe_M), float("-inf"))
    at_MH = (place + row_M)[:, None] * HEAD + at_H[None, :]
    tl.store(out_ptr + at_MH, out_MH.to(out_ptr.dtype.element_ty), mask=(row_M < group)[:, None])
    tl.store(lse_ptr + place + row_M, lse_M * NATURAL, mask=row_M < group)


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention_kernel(  # noqa: PLR0915 - an item from its row of the list to its result
    q_ptr,
    out_ptr,
    lse_ptr,
    partial_ptr,
    partial_lse_ptr,
    counters_ptr,
    items_ptr,
    table_ptr,
    k_scales_ptr,
    v_scales_ptr,
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
    SCALED: tl.constexpr,
    CAST_ASM: tl.constexpr,
    MERGED: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    MERGE_SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
    FIELDS: tl.constexpr,
    OVERLAP: tl.constexpr = 0,
):
    if OVERLAP:  # in this order, so that whatever starts then finds the lists of the step written
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    if heads_together > 0:
        batch = pid // (items * heads_together)
        pid -= batch * (items * heads_together)
        head = batch * heads_together + pid % heads_together
        item_ptr = items_ptr + pid // heads_together * FIELDS
    else:
        item_ptr = items_ptr + pid * FIELDS
        head = tl.load(item_ptr + 9)
    sequence = tl.load(item_ptr).to(tl.int64)
    first_token = tl.load(item_ptr + 1)
    begin = tl.load(item_ptr + 2)
    stop = tl.load(item_ptr + 3)
    shift = tl.load(item_ptr + 4)
    keys = tl.load(item_ptr + 5)
    low = tl.load(item_ptr + 6)
    high = tl.load(item_ptr + 7)
    slot = tl.load(item_ptr + 8)
    first_slot = tl.load(item_ptr + 10)
    pieces = tl.load(item_ptr + 11)

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
    first_scale = 1.0
    if SCALED:
        q_MH = q_MH.to(tl.float16)
        page = tl.load(table_ptr + low // (PAGE // BLOCK_S), mask=low < high, other=0)
        first_scale = tl.load(v_scales_ptr + page * kv_heads + head)
    if MASK_ALL:
        top_M, sum_M, acc_MH = _tiles(
            q_MH, k_desc, v_desc, k_scales_ptr, v_scales_ptr, table_ptr, head, kv_heads, low, high,
            limit_M, scale2, first_scale, top_M, sum_M, acc_MH, HEAD, BLOCK_S, PAGE, MASK=True,
            SCALED=SCALED, CAST_ASM=CAST_ASM, STAGES=STAGES,
        )  # fmt: skip
    else:
        # tiles that every query sees whole, then those that a query's last key may lie in
        seen = tl.minimum(tl.maximum(first_token, begin) + shift + 1, keys)
        whole = tl.maximum(tl.minimum(seen // BLOCK_S, high), low)
        top_M, sum_M, acc_MH = _tiles(
            q_MH, k_desc, v_desc, k_scales_ptr, v_scales_ptr, table_ptr, head, kv_heads, low, whole,
            limit_M, scale2, first_scale, top_M, sum_M, acc_MH, HEAD, BLOCK_S, PAGE, MASK=False,
            SCALED=SCALED, CAST_ASM=CAST_ASM, STAGES=STAGES,
        )  # fmt: skip
        top_M, sum_M, acc_MH = _tiles(
            q_MH, k_desc, v_desc, k_scales_ptr, v_scales_ptr, table_ptr, head, kv_heads, whole,
            high, limit_M, scale2, first_scale, top_M, sum_M, acc_MH, HEAD, BLOCK_S, PAGE,
            MASK=True, SCALED=SCALED, CAST_ASM=CAST_ASM, STAGES=1,
        )  # fmt: skip
    safe_M = tl.where(sum_M > 0, sum_M, 1.0)
    out_MH = acc_MH / safe_M[:, None] * first_scale
    lse_M = tl.where(sum_M > 0, top_M + tl.log2(safe_M), float("-inf"))
    if slot >= 0:
        slot_M = (slot.to(tl.int64) * kv_heads + head) * BLOCK_M + row_M
        slot_MH = slot_M[:, None] * HEAD + at_H[None, :]
        tl.store(partial_ptr + slot_MH, out_MH, mask=inside_M[:, None])
        tl.store(partial_lse_ptr + slot_M, lse_M, mask=inside_M)
        if MERGED:
            counter_ptr = counters_ptr + first_slot * kv_heads + head
            tl.debug_barrier()  # all rows are stored before this block counts as arrived
            if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == pieces - 1:
                tl.store(counter_ptr, 0)  # for the next launch: nobody else arrives any more
                low_token = tl.maximum(first_token, begin)
                for token in range(low_token, tl.minimum(first_token + tile_tokens, stop)):
                    at = token - first_token
                    place = (first_token.to(tl.int64) + at) * (kv_heads * group) + head * group
                    _merged(
                        partial_ptr, partial_lse_ptr, first_slot, pieces, head, kv_heads,
                        at * group, group, out_ptr, lse_ptr, place, HEAD, BLOCK_M, MERGE_ROWS,
                        MERGE_SLOTS,
                    )  # fmt: skip
    else:
        at_MH = place_M[:, None] * HEAD + at_H[None, :]
        tl.store(out_ptr + at_MH, out_MH.to(out_ptr.dtype.element_ty), mask=inside_M[:, None])
        tl.store(lse_ptr + place_M, lse_M * NATURAL, mask=inside_M)


@triton.jit(do_not_specialize=("tile_tokens",))
def merge_kernel(
    partial_ptr,
    partial_lse_ptr,
    merges_ptr,
    out_ptr,
    lse_ptr,
    tile_tokens,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    FIELDS: tl.constexpr,
    OVERLAP: tl.constexpr = 0,
):
    """ROWS of a KV head's query heads at one token: grid (merges x tile_tokens, KV heads x their
    parts of ROWS)."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    PARTS: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    at = tl.program_id(0) % tile_tokens
    head = tl.program_id(1) // PARTS
    row = tl.program_id(1) % PARTS * ROWS
    merge_ptr = merges_ptr + tl.program_id(0) // tile_tokens * FIELDS
    first = tl.load(merge_ptr, cache_modifier=".cg")  # before the wait: see the module's docstring
    pieces = tl.load(merge_ptr + 1, cache_modifier=".cg")
    token = tl.load(merge_ptr + 2, cache_modifier=".cg") + at
    begin = tl.load(merge_ptr + 3, cache_modifier=".cg")
    stop = tl.load(merge_ptr + 4, cache_modifier=".cg")
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    if (pieces > 1) & (token >= begin) & (token < stop):
        place = token.to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + row
        _merged(
            partial_ptr, partial_lse_ptr, first, pieces, head, KV_HEADS, at * GROUP + row,
            GROUP - row, out_ptr, lse_ptr, place, HEAD, BLOCK_M, ROWS, SLOTS,
        )  # fmt: skip

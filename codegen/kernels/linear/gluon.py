"""Matrix products of few tokens on Hopper: one warp streams the weights, the others multiply.

The twin of core.py's Triton kernel, in Gluon. What it does that Triton's compiler does not:

- the loads never stop: the fetching warp runs on into the next tile while one is finished, so that
  some 200 KB an SM are always on their way (4.3 TB/s x 1 us of latency are 33 KB an SM)
- weights do not depend on the kernel before: where launches may overlap, the first buffers, 26 MB
  on all SMs together, are filled while that one still runs, and only activations wait for it

Weights are the first operand of wgmma, whose 64 rows they fill; tokens are its columns, of which 16
are enough. A tile has two halves, A and B: rows that the epilogue combines, gate and up, or the
halves of a head that RoPE turns into each other. So every epilogue is elementwise. Halves of 32
rows share one accumulator, and part in shared memory; halves of 64 rows have one each.

R rows of a half, T tokens of a tile, K inputs of a buffer.
"""

from typing import Any

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

block_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of 3.7, of 3.6
WARPS = 4
PRODUCER_REGISTERS = 40
UNSPECIALISED: tuple[str, ...] = (
    "tokens",
    "second",
    "k_blocks",
    "pieces",
    "tiles",
    "token_tiles",
    "heads",
    "kv_heads",
)


@gluon.jit
def _wait_for_inputs():
    """What the kernel before wrote can be read behind this; no wait where launches are in turn."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _let_next_start():
    """The next kernel's blocks may take the place of blocks of this one that have ended."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _fetch_weights(
    w_desc,
    w_smem,
    full,
    tile_n,
    k,
    slot,
    second,
    BYTES: gl.constexpr,
    ROWS: gl.constexpr,
    BOX: gl.constexpr,
    STEP: gl.constexpr,
    PARTS: gl.constexpr,
    PACKED: gl.constexpr,
):
    """Starts the copies of one buffer's weights; BYTES are those of the whole buffer."""
    mbarrier.expect(full.index(slot), BYTES)
    for part in gl.static_range(ROWS // BOX):
        unit = tile_n * (ROWS // BOX) + part
        row = unit // PARTS * STEP + unit % PARTS * BOX
        if PACKED:
            a_part = w_smem.index(slot).slice(0, ROWS, dim=0)
            b_part = w_smem.index(slot).slice(ROWS, ROWS, dim=0)
        else:
            a_part = w_smem.index(2 * slot)
            b_part = w_smem.index(2 * slot + 1)
        if BOX < ROWS:
            a_part = a_part.slice(part * BOX, BOX, dim=0)
            b_part = b_part.slice(part * BOX, BOX, dim=0)
        tma.async_copy_global_to_shared(w_desc, [row, k], full.index(slot), a_part)
        tma.async_copy_global_to_shared(w_desc, [row + second, k], full.index(slot), b_part)


@gluon.jit
def _steps(tiles, pieces, k_blocks, SPLIT: gl.constexpr):
    """First and last + 1 of this block's steps, those of all tiles laid end to end."""
    pid = gl.program_id(0)
    if SPLIT:
        start = pid // pieces * k_blocks
        piece = pid % pieces
        stop = start + (piece + 1) * k_blocks // pieces
        start += piece * k_blocks // pieces
    else:
        start = pid * tiles // gl.num_programs(0) * k_blocks
        stop = (pid + 1) * tiles // gl.num_programs(0) * k_blocks
    return start, stop


@gluon.jit
def _produce(
    x_desc,
    w_desc,
    w_smem,
    x_smem,
    full,
    empty,
    second,
    tiles,
    pieces,
    k_blocks,
    token_tiles,
    ROWS: gl.constexpr,
    BOX: gl.constexpr,
    STEP: gl.constexpr,
    PARTS: gl.constexpr,
    PACKED: gl.constexpr,
    SPLIT: gl.constexpr,
    BLOCK_T: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    BYTES: gl.constexpr = (2 * ROWS + BLOCK_T) * BLOCK_K * 2
    start, stop = _steps(tiles, pieces, k_blocks, SPLIT)
    ahead = gl.minimum(stop - start, STAGES)
    for i in range(ahead):
        tile = (start + i) // k_blocks
        k = (start + i - tile * k_blocks) * BLOCK_K
        _fetch_weights(w_desc, w_smem, full, tile // token_tiles, k, i, second, BYTES, ROWS, BOX,
                       STEP, PARTS, PACKED)  # fmt: skip
    _wait_for_inputs()
    for i in range(ahead):
        tile = (start + i) // k_blocks
        k = (start + i - tile * k_blocks) * BLOCK_K
        token = tile % token_tiles * BLOCK_T
        tma.async_copy_global_to_shared(x_desc, [token, k], full.index(i), x_smem.index(i))
    for i in range(ahead, stop - start):
        tile = (start + i) // k_blocks
        k = (start + i - tile * k_blocks) * BLOCK_K
        token = tile % token_tiles * BLOCK_T
        slot = i % STAGES
        mbarrier.wait(empty.index(slot), ((i // STAGES) & 1) ^ 1)
        _fetch_weights(w_desc, w_smem, full, tile // token_tiles, k, slot, second, BYTES, ROWS, BOX,
                       STEP, PARTS, PACKED)  # fmt: skip
        tma.async_copy_global_to_shared(x_desc, [token, k], full.index(slot), x_smem.index(slot))


@gluon.jit
def _finish(  # noqa: PLR0915 - three epilogues
    a,
    b,
    row_R,
    token_T,
    tile_n,
    out_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_sin_ptr,
    k_pages_ptr,
    v_pages_ptr,
    slots_ptr,
    tokens,
    outputs,
    heads,
    kv_heads,
    eps,
    MODE: gl.constexpr,
    BIAS: gl.constexpr,
    NORM: gl.constexpr,
    ROWS: gl.constexpr,
    HALF: gl.constexpr,
):
    """What becomes of a tile's sums: MODE 0 stores both, 1 silu(A) * B, 2 heads."""
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    inside_T = token_T < tokens
    out_T = token_T.to(gl.int64) * outputs
    if MODE == 1:
        at_R = tile_n * ROWS + row_R
        product = a / (1.0 + gl.exp(-a)) * b
        inside = (at_R < outputs)[:, None] & inside_T[None, :]
        gl.store(out_ptr + out_T[None, :] + at_R[:, None], product.to(dtype), mask=inside)
    if MODE == 0:
        at_R = tile_n * (2 * ROWS) + row_R
        if BIAS:
            a += gl.load(bias_ptr + at_R, mask=at_R < outputs, other=0.0).to(gl.float32)[:, None]
            b += gl.load(bias_ptr + ROWS + at_R, mask=at_R + ROWS < outputs, other=0.0).to(
                gl.float32
            )[:, None]
        at = out_T[None, :] + at_R[:, None]
        gl.store(out_ptr + at, a.to(dtype), mask=(at_R < outputs)[:, None] & inside_T[None, :])
        gl.store(
            out_ptr + ROWS + at,
            b.to(dtype),
            mask=(at_R + ROWS < outputs)[:, None] & inside_T[None, :],
        )
    if MODE == 2:
        head_R = (tile_n * ROWS + row_R) // HALF
        at_R = (tile_n * ROWS + row_R) % HALF
        there_R = head_R < heads + 2 * kv_heads
        turned_R = head_R < heads + kv_heads
        query_R = head_R < heads
        if BIAS:
            bias_ptr += head_R * (2 * HALF) + at_R
            a += gl.load(bias_ptr, mask=there_R, other=0.0).to(gl.float32)[:, None]
            b += gl.load(bias_ptr + HALF, mask=there_R, other=0.0).to(gl.float32)[:, None]
        if NORM:
            squares = a * a + b * b
            scale = gl.full_like(a, 1.0)
            for part in gl.static_range(ROWS // HALF):
                own = (row_R // HALF == part)[:, None]
                mean_T = gl.sum(gl.where(own, squares, 0.0), 0) / (2 * HALF)
                scale = gl.where(own, (1.0 / gl.sqrt(mean_T + eps))[None, :], scale)
            key_R = turned_R & (head_R >= heads)
            qa_R = gl.load(q_norm_ptr + at_R, mask=query_R, other=0.0).to(gl.float32)
            qb_R = gl.load(q_norm_ptr + HALF + at_R, mask=query_R, other=0.0).to(gl.float32)
            ka_R = gl.load(k_norm_ptr + at_R, mask=key_R, other=0.0).to(gl.float32)
            kb_R = gl.load(k_norm_ptr + HALF + at_R, mask=key_R, other=0.0).to(gl.float32)
            a = gl.where(turned_R[:, None], a * scale * (qa_R + ka_R)[:, None], a)
            b = gl.where(turned_R[:, None], b * scale * (qb_R + kb_R)[:, None], b)
        angle = cos_sin_ptr + token_T[None, :] * (2 * HALF) + at_R[:, None]
        turns = turned_R[:, None] & inside_T[None, :]
        cos = gl.load(angle, mask=turns, other=1.0)
        sin = gl.load(angle + HALF, mask=turns, other=0.0)
        first = a * cos - b * sin
        second = b * cos + a * sin
        place = out_ptr + out_T[None, :] + (head_R * (2 * HALF) + at_R)[:, None]
        inside = query_R[:, None] & inside_T[None, :]
        gl.store(place, first.to(dtype), mask=inside)
        gl.store(place + HALF, second.to(dtype), mask=inside)
        slot_T = gl.load(slots_ptr + token_T, mask=inside_T, other=-1)
        kept_T = slot_T >= 0
        into = slot_T[None, :] * (kv_heads * (2 * HALF)) + at_R[:, None]
        pages: gl.constexpr = k_pages_ptr.dtype.element_ty
        key = (turned_R & (head_R >= heads))[:, None] & kept_T[None, :]
        place = k_pages_ptr + into + ((head_R - heads) * (2 * HALF))[:, None]
        gl.store(place, first.to(pages), mask=key)
        gl.store(place + HALF, second.to(pages), mask=key)
        value = (there_R & (head_R >= heads + kv_heads))[:, None] & kept_T[None, :]
        place = v_pages_ptr + into + ((head_R - heads - kv_heads) * (2 * HALF))[:, None]
        gl.store(place, a.to(pages), mask=value)
        gl.store(place + HALF, b.to(pages), mask=value)


@gluon.jit
def _consume(  # noqa: PLR0915 - one loop, and what its end needs
    out_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_sin_ptr,
    k_pages_ptr,
    v_pages_ptr,
    slots_ptr,
    partial_ptr,
    arrived_ptr,
    w_smem,
    x_smem,
    sums_smem,
    full,
    empty,
    tokens,
    outputs,
    heads,
    kv_heads,
    tiles,
    pieces,
    k_blocks,
    token_tiles,
    eps,
    MODE: gl.constexpr,
    BIAS: gl.constexpr,
    NORM: gl.constexpr,
    ROWS: gl.constexpr,
    HALF: gl.constexpr,
    PACKED: gl.constexpr,
    SPLIT: gl.constexpr,
    BLOCK_T: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Multiplies what arrives; of the blocks that share a tile, the last one finishes it."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_T, 16]
    )
    # 8 rows a thread: 16 bytes of an output, side by side in memory
    WIDE: gl.constexpr = gl.BlockedLayout([8, 1], [ROWS // 8, 256 // ROWS], [1, 4], [0, 1])
    start, stop = _steps(tiles, pieces, k_blocks, SPLIT)
    row_R = gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE))
    at_T = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, WIDE))
    _let_next_start()
    _wait_for_inputs()
    i = 0
    for tile in range(start // k_blocks, (stop + k_blocks - 1) // k_blocks):
        token_T = tile % token_tiles * BLOCK_T + at_T
        steps = gl.minimum(stop, (tile + 1) * k_blocks) - gl.maximum(start, tile * k_blocks)
        if PACKED:
            sums = gl.zeros([2 * ROWS, BLOCK_T], gl.float32, SUMS)
            for _ in range(steps):
                slot = i % STAGES
                mbarrier.wait(full.index(slot), (i // STAGES) & 1)
                x_KT = x_smem.index(slot).permute((1, 0))
                sums = warpgroup_mma(w_smem.index(slot), x_KT, sums, is_async=True)
                sums = warpgroup_mma_wait(0, deps=(sums,))
                mbarrier.arrive(empty.index(slot), count=1)
                i += 1
            sums_smem.store(sums)
            block_barrier()
            a = sums_smem.slice(0, ROWS, dim=0).load(WIDE)
            b = sums_smem.slice(ROWS, ROWS, dim=0).load(WIDE)
        else:
            a_sum = gl.zeros([ROWS, BLOCK_T], gl.float32, SUMS)
            b_sum = gl.zeros([ROWS, BLOCK_T], gl.float32, SUMS)
            for _ in range(steps):
                slot = i % STAGES
                mbarrier.wait(full.index(slot), (i // STAGES) & 1)
                x_KT = x_smem.index(slot).permute((1, 0))
                a_sum = warpgroup_mma(w_smem.index(2 * slot), x_KT, a_sum, is_async=True)
                b_sum = warpgroup_mma(w_smem.index(2 * slot + 1), x_KT, b_sum, is_async=True)
                a_sum, b_sum = warpgroup_mma_wait(0, deps=(a_sum, b_sum))
                mbarrier.arrive(empty.index(slot), count=1)
                i += 1
            a = gl.convert_layout(a_sum, WIDE)
            b = gl.convert_layout(b_sum, WIDE)
        mine = True
        if SPLIT:
            SIZE: gl.constexpr = 2 * ROWS * BLOCK_T
            here = (token_T < tokens)[None, :]
            within = partial_ptr + at_T[None, :] * ROWS + row_R[:, None]
            into = within + gl.program_id(0).to(gl.int64) * SIZE
            gl.store(into, a, mask=here)
            gl.store(into + ROWS * BLOCK_T, b, mask=here)
            block_barrier()
            before = gl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu")
            mine = before == pieces - 1
            if mine:
                gl.store(arrived_ptr + tile, 0)
                a = gl.zeros_like(a)
                b = gl.zeros_like(b)
                # in order, so that sums are always the same; two at once, against latency
                for piece in range(0, pieces, 2):
                    for other in gl.static_range(2):
                        place = (tile * pieces + piece + other).to(gl.int64)
                        there = here & (piece + other < pieces)
                        at = within + place * SIZE
                        a += gl.load(at, mask=there, other=0.0, cache_modifier=".cg")
                        at += ROWS * BLOCK_T
                        b += gl.load(at, mask=there, other=0.0, cache_modifier=".cg")
        if mine:
            _finish(
                a, b, row_R, token_T, tile // token_tiles, out_ptr, bias_ptr, q_norm_ptr,
                k_norm_ptr, cos_sin_ptr, k_pages_ptr, v_pages_ptr, slots_ptr, tokens, outputs,
                heads, kv_heads, eps, MODE, BIAS, NORM, ROWS, HALF,
            )  # fmt: skip


@gluon.jit(do_not_specialize=UNSPECIALISED)
def stream_kernel(
    x_desc,
    w_desc,
    out_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_sin_ptr,
    k_pages_ptr,
    v_pages_ptr,
    slots_ptr,
    partial_ptr,
    arrived_ptr,
    tokens,
    outputs,
    second,
    heads,
    kv_heads,
    tiles,
    pieces,
    k_blocks,
    token_tiles,
    eps,
    MODE: gl.constexpr,
    BIAS: gl.constexpr,
    NORM: gl.constexpr,
    ROWS: gl.constexpr,
    BOX: gl.constexpr,
    STEP: gl.constexpr,
    PARTS: gl.constexpr,
    HALF: gl.constexpr,
    SPLIT: gl.constexpr,
    BLOCK_T: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    PRODUCER: gl.constexpr,
):
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    PACKED: gl.constexpr = ROWS < 64
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=16, rank=2
    )
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0, 1])
    x_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_T, BLOCK_K], SWIZZLED)
    if PACKED:
        w_smem = gl.allocate_shared_memory(dtype, [STAGES, 2 * ROWS, BLOCK_K], SWIZZLED)
        sums_smem = gl.allocate_shared_memory(gl.float32, [2 * ROWS, BLOCK_T], FLAT)
    else:
        w_smem = gl.allocate_shared_memory(dtype, [2 * STAGES, ROWS, BLOCK_K], SWIZZLED)
        sums_smem = w_smem  # not used
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    block_barrier()
    gl.warp_specialize(
        [
            (
                _consume,
                (out_ptr, bias_ptr, q_norm_ptr, k_norm_ptr, cos_sin_ptr, k_pages_ptr, v_pages_ptr,
                 slots_ptr, partial_ptr, arrived_ptr, w_smem, x_smem, sums_smem, full, empty,
                 tokens, outputs, heads, kv_heads, tiles, pieces, k_blocks, token_tiles, eps, MODE,
                 BIAS, NORM, ROWS, HALF, PACKED, SPLIT, BLOCK_T, STAGES),
            ),
            (
                _produce,
                (x_desc, w_desc, w_smem, x_smem, full, empty, second, tiles, pieces, k_blocks,
                 token_tiles, ROWS, BOX, STEP, PARTS, PACKED, SPLIT, BLOCK_T, BLOCK_K, STAGES),
            ),
        ],
        [1],
        [PRODUCER],
    )  # fmt: skip


def run(
    grid: tuple[int],
    arguments: dict[str, Any],
    x_TD: Any,
    weight_OD: Any,
    *,
    overlap: bool,
) -> None:
    """Launches the kernel; `arguments` are those of core.py's kernel without x and weight."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    block_k = arguments["BLOCK_K"]
    stream_kernel[grid](
        **arguments,
        x_desc=TensorDescriptor.from_tensor(x_TD, [arguments["BLOCK_T"], block_k], layout),
        w_desc=TensorDescriptor.from_tensor(weight_OD, [arguments["BOX"], block_k], layout),
        PRODUCER=PRODUCER_REGISTERS,
        num_warps=WARPS,
        launch_pdl=overlap,
    )

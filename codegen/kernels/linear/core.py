"""Matrix products of few tokens, with what follows them: the Triton kernel and its launch.

Bound by the weights' bytes, each of which is read once. A block goes through whole tiles of
outputs, all inputs of each; where there are too few tiles to keep memory busy, several blocks share
one, and the last of them adds their pieces in order: results do not depend on who was last.

A tile has two halves of ROWS rows, A and B. B's rows stand `second` behind A's in the weight: gate
and up, or the halves of a head. On Hopper the Gluon twin in gluon.py runs instead.

R rows of a half, T tokens of a tile, K inputs of a step.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

WARPS = 4
SHORT_TOKENS = 32
"""Steps of at most so many tokens have buffers of more inputs,"""
LEAST_STAGES = 3
"""where so many fit."""
SHARED_BYTES = 232_448
"""Shared memory of a block on Hopper."""
PORTABLE_STAGES = 3
TILES_MAX = 65_536
"""Counters of arrived pieces."""
PIECES_MAX = 512
"""Blocks of the largest form that may share tiles; LEAST_BLOCKS and the tiles that miss it."""
UNSPECIALISED: tuple[str, ...] = (
    "tokens",
    "width",
    "weight_rows",
    "second",
    "tiles",
    "pieces",
    "k_blocks",
    "token_tiles",
    "heads",
    "kv_heads",
)
PLAIN, GATED, HEADS = 0, 1, 2
"""What a tile's sums become: outputs side by side; silu(A) * B; normed, turned and stored heads."""


@triton.jit
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
    MODE: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """What becomes of a tile's sums: MODE 0 stores both, 1 silu(A) * B, 2 heads."""
    dtype = out_ptr.dtype.element_ty
    inside_T = token_T < tokens
    out_T = token_T.to(tl.int64) * outputs
    if MODE == 1:
        at_R = tile_n * ROWS + row_R
        product = a / (1.0 + tl.exp(-a)) * b
        inside = (at_R < outputs)[:, None] & inside_T[None, :]
        tl.store(out_ptr + out_T[None, :] + at_R[:, None], product.to(dtype), mask=inside)
    if MODE == 0:
        at_R = tile_n * (2 * ROWS) + row_R
        if BIAS:
            a += tl.load(bias_ptr + at_R, mask=at_R < outputs, other=0.0).to(tl.float32)[:, None]
            b += tl.load(bias_ptr + ROWS + at_R, mask=at_R + ROWS < outputs, other=0.0).to(
                tl.float32
            )[:, None]
        at = out_T[None, :] + at_R[:, None]
        tl.store(out_ptr + at, a.to(dtype), mask=(at_R < outputs)[:, None] & inside_T[None, :])
        tl.store(
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
            a += tl.load(bias_ptr, mask=there_R, other=0.0).to(tl.float32)[:, None]
            b += tl.load(bias_ptr + HALF, mask=there_R, other=0.0).to(tl.float32)[:, None]
        if NORM:
            squares = a * a + b * b
            scale = tl.full(a.shape, 1.0, tl.float32)
            for part in tl.static_range(ROWS // HALF):
                own = (row_R // HALF == part)[:, None]
                mean_T = tl.sum(tl.where(own, squares, 0.0), 0) / (2 * HALF)
                scale = tl.where(own, (1.0 / tl.sqrt(mean_T + eps))[None, :], scale)
            key_R = turned_R & (head_R >= heads)
            qa_R = tl.load(q_norm_ptr + at_R, mask=query_R, other=0.0).to(tl.float32)
            qb_R = tl.load(q_norm_ptr + HALF + at_R, mask=query_R, other=0.0).to(tl.float32)
            ka_R = tl.load(k_norm_ptr + at_R, mask=key_R, other=0.0).to(tl.float32)
            kb_R = tl.load(k_norm_ptr + HALF + at_R, mask=key_R, other=0.0).to(tl.float32)
            a = tl.where(turned_R[:, None], a * scale * (qa_R + ka_R)[:, None], a)
            b = tl.where(turned_R[:, None], b * scale * (qb_R + kb_R)[:, None], b)
        angle = cos_sin_ptr + token_T[None, :] * (2 * HALF) + at_R[:, None]
        turns = turned_R[:, None] & inside_T[None, :]
        cos = tl.load(angle, mask=turns, other=1.0)
        sin = tl.load(angle + HALF, mask=turns, other=0.0)
        first = a * cos - b * sin
        second = b * cos + a * sin
        place = out_ptr + out_T[None, :] + (head_R * (2 * HALF) + at_R)[:, None]
        inside = query_R[:, None] & inside_T[None, :]
        tl.store(place, first.to(dtype), mask=inside)
        tl.store(place + HALF, second.to(dtype), mask=inside)
        slot_T = tl.load(slots_ptr + token_T, mask=inside_T, other=-1)
        kept_T = slot_T >= 0
        into = slot_T[None, :] * (kv_heads * (2 * HALF)) + at_R[:, None]
        pages = k_pages_ptr.dtype.element_ty
        key = (turned_R & (head_R >= heads))[:, None] & kept_T[None, :]
        place = k_pages_ptr + into + ((head_R - heads) * (2 * HALF))[:, None]
        tl.store(place, first.to(pages), mask=key)
        tl.store(place + HALF, second.to(pages), mask=key)
        value = (there_R & (head_R >= heads + kv_heads))[:, None] & kept_T[None, :]
        place = v_pages_ptr + into + ((head_R - heads - kv_heads) * (2 * HALF))[:, None]
        tl.store(place, a.to(pages), mask=value)
        tl.store(place + HALF, b.to(pages), mask=value)


@triton.jit(do_not_specialize=UNSPECIALISED)
def stream_kernel(
    x_ptr,
    w_ptr,
    width,
    weight_rows,
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
    MODE: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BOX: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    if SPLIT:
        start = pid // pieces * k_blocks
        piece = pid % pieces
        stop = start + (piece + 1) * k_blocks // pieces
        start += piece * k_blocks // pieces
    else:
        start = pid * tiles // tl.num_programs(0) * k_blocks
        stop = (pid + 1) * tiles // tl.num_programs(0) * k_blocks
    row_R = tl.arange(0, ROWS)
    at_T = tl.arange(0, BLOCK_T)
    at_K = tl.arange(0, BLOCK_K)
    width = tl.multiple_of(width, 8)
    for tile in range(start // k_blocks, (stop + k_blocks - 1) // k_blocks):
        low = tl.maximum(start, tile * k_blocks)
        high = tl.minimum(stop, (tile + 1) * k_blocks)
        tile_n = tile // token_tiles
        token_T = tile % token_tiles * BLOCK_T + at_T
        unit_R = tile_n * (ROWS // BOX) + row_R // BOX
        a_R = unit_R // PARTS * STEP + unit_R % PARTS * BOX + row_R % BOX
        b_R = a_R + second
        a = tl.zeros([ROWS, BLOCK_T], tl.float32)
        b = tl.zeros([ROWS, BLOCK_T], tl.float32)
        for i in tl.range(low, high, num_stages=STAGES):
            k_K = (i - tile * k_blocks) * BLOCK_K + at_K
            w_at = w_ptr + k_K[None, :]
            here = (k_K < width)[None, :]
            a_w = tl.load(
                w_at + a_R.to(tl.int64)[:, None] * width,
                mask=here & (a_R < weight_rows)[:, None],
                other=0.0,
            )
            b_w = tl.load(
                w_at + b_R.to(tl.int64)[:, None] * width,
                mask=here & (b_R < weight_rows)[:, None],
                other=0.0,
            )
            x_TK = tl.load(
                x_ptr + token_T.to(tl.int64)[:, None] * width + k_K[None, :],
                mask=here & (token_T < tokens)[:, None],
                other=0.0,
            )
            a = tl.dot(a_w, x_TK.T, a)
            b = tl.dot(b_w, x_TK.T, b)
        mine = True
        if SPLIT:
            here = (token_T < tokens)[None, :]
            within = partial_ptr + at_T[None, :] * ROWS + row_R[:, None]
            into = within + pid.to(tl.int64) * (2 * ROWS * BLOCK_T)
            tl.store(into, a, mask=here)
            tl.store(into + ROWS * BLOCK_T, b, mask=here)
            tl.debug_barrier()
            before = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu")
            mine = before == pieces - 1
            if mine:
                tl.store(arrived_ptr + tile, 0)
                a = tl.zeros([ROWS, BLOCK_T], tl.float32)
                b = tl.zeros([ROWS, BLOCK_T], tl.float32)
                for piece in range(pieces):  # in order, so that sums are always the same
                    at = within + (tile * pieces + piece).to(tl.int64) * (2 * ROWS * BLOCK_T)
                    a += tl.load(at, mask=here, other=0.0, cache_modifier=".cg")
                    at += ROWS * BLOCK_T
                    b += tl.load(at, mask=here, other=0.0, cache_modifier=".cg")
        if mine:
            _finish(
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
                MODE,
                BIAS,
                NORM,
                ROWS,
                HALF,
            )


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a product is cut."""

    rows: int
    """Of a tile's halves: 32 or 64."""
    block_t: int
    """Tokens of a tile, a power of two from 16 on."""
    block_k: int
    pieces: int = 1
    """Blocks that share a tile."""
    overlap: bool = False
    """Whether the launch may begin before the kernel before it has ended."""

    @property
    def stages(self) -> int:
        """Buffers of weights and tokens that fit into shared memory, beside a tile's sums."""
        sums = 4 * 64 * self.block_t
        buffer = 2 * self.block_k * (2 * self.rows + self.block_t)
        return (SHARED_BYTES - 2048 - sums) // buffer


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The tunables from which a form follows."""

    short_k: int
    """Inputs of a buffer in steps of at most SHORT_TOKENS."""
    long_k: int
    """The same in longer ones."""
    least_blocks: int
    """As many blocks keep memory busy: with fewer tiles, blocks share them."""
    wide_tiles: int
    """From so many tiles of 64 rows on, a tile gets 128: half as many turns through the tokens."""
    overlap: bool

    def form(self, rows: int, tokens: int, *, head_dim: int = 0) -> Form:
        """For a weight of so many rows; head_dim of heads that are normed, which a tile holds."""
        wide = triton.cdiv(rows, 64) >= self.wide_tiles or head_dim > 64
        form = Form(
            rows=64 if wide else 32,
            block_t=min(max(triton.next_power_of_2(tokens), 16), 64),
            block_k=self.short_k if tokens <= SHORT_TOKENS else self.long_k,
            pieces=triton.cdiv(self.least_blocks, triton.cdiv(rows, 128 if wide else 64)),
            overlap=self.overlap,
        )
        return form if form.stages >= LEAST_STAGES else replace(form, block_k=self.long_k)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What MODE 2 reads and writes besides the product."""

    heads: int
    kv_heads: int
    q_norm_H: torch.Tensor | None
    k_norm_H: torch.Tensor | None
    eps: float
    cos_sin_T2H2: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    slots_T: torch.Tensor


Launch = Callable[..., None]
"""gluon.run."""


def stream(
    x_TD: torch.Tensor,
    weight_OD: torch.Tensor,
    bias_O: torch.Tensor | None,
    out: torch.Tensor,
    *,
    form: Form,
    mode: int,
    head_dim: int = 128,
    heads: Heads | None = None,
) -> None:
    """Fills `out` (and pages) from x @ weight.T.

    out       [T, outputs], contiguous: 0 all rows of the weight, 1 half of them, 2 those of queries
    head_dim  only MODE 2 reads it: 64 or 128; with norms, no more than 2 x rows
    """
    launch = _hopper(x_TD.device)
    _run(x_TD, weight_OD, bias_O, out, launch, form=form, mode=mode, head_dim=head_dim, heads=heads)


def _run(
    x_TD: torch.Tensor,
    weight_OD: torch.Tensor,
    bias_O: torch.Tensor | None,
    out: torch.Tensor,
    launch: Launch | None,
    *,
    form: Form,
    mode: int,
    head_dim: int,
    heads: Heads | None,
) -> None:
    """As stream; through the Triton kernel where launch is None."""
    tokens, width = x_TD.shape
    outputs, weight_rows = out.shape[-1], weight_OD.shape[0]
    half = head_dim // 2
    token_tiles = triton.cdiv(tokens, form.block_t)
    # gate and up end apart, so their last tile may be ragged before the weight's rows are
    row_tiles = (
        triton.cdiv(outputs, form.rows)
        if mode == GATED
        else triton.cdiv(weight_rows, 2 * form.rows)
    )
    tiles = row_tiles * token_tiles
    assert tiles <= TILES_MAX, f"{tiles} tiles for {TILES_MAX} counters"
    k_blocks = triton.cdiv(width, form.block_k)
    pieces = min(form.pieces, k_blocks)
    device = x_TD.device
    grid = min(tiles, processors(device)) if pieces == 1 else tiles * pieces
    partial, arrived = _scratch(device)
    needed = 2 * grid * form.rows * form.block_t if pieces > 1 else 0
    assert needed <= len(partial), f"{grid} pieces of {form} in {len(partial)} numbers"
    unused = out  # a pointer that no mode reads
    arguments: dict[str, Any] = {
        "out_ptr": out,
        "bias_ptr": unused if bias_O is None else bias_O,
        "q_norm_ptr": unused,
        "k_norm_ptr": unused,
        "cos_sin_ptr": unused,
        "k_pages_ptr": unused,
        "v_pages_ptr": unused,
        "slots_ptr": unused,
        "partial_ptr": partial,
        "arrived_ptr": arrived,
        "tokens": tokens,
        "outputs": outputs,
        "second": {PLAIN: form.rows, GATED: outputs, HEADS: half}[mode],
        "heads": 0,
        "kv_heads": 0,
        "tiles": tiles,
        "pieces": pieces,
        "k_blocks": k_blocks,
        "token_tiles": token_tiles,
        "eps": 0.0,
        "MODE": mode,
        "BIAS": bias_O is not None,
        "NORM": heads is not None and heads.q_norm_H is not None,
        "ROWS": form.rows,
        "BOX": min(half, form.rows) if mode == HEADS else form.rows,
        "STEP": {PLAIN: 2 * form.rows, GATED: form.rows, HEADS: head_dim}[mode],
        "PARTS": max(half // form.rows, 1) if mode == HEADS else 1,
        "HALF": half,
        "SPLIT": pieces > 1,
        "BLOCK_T": form.block_t,
        "BLOCK_K": form.block_k,
    }
    if heads is not None:
        arguments |= {
            "cos_sin_ptr": heads.cos_sin_T2H2,
            "k_pages_ptr": heads.k_pages,
            "v_pages_ptr": heads.v_pages,
            "slots_ptr": heads.slots_T,
            "heads": heads.heads,
            "kv_heads": heads.kv_heads,
            "eps": heads.eps,
        }
        if heads.q_norm_H is not None:
            arguments |= {"q_norm_ptr": heads.q_norm_H, "k_norm_ptr": heads.k_norm_H}
    if launch is not None:
        arguments["STAGES"] = form.stages
        launch((grid,), arguments, x_TD, weight_OD, overlap=form.overlap)
        return
    stream_kernel[(grid,)](
        x_TD,
        weight_OD,
        width,
        weight_rows,
        **arguments,
        STAGES=min(form.stages, PORTABLE_STAGES),
        num_warps=WARPS,
    )


def takes(x_TD: torch.Tensor, weight_OD: torch.Tensor) -> bool:
    """Whether the kernels are made for these: 16 bits, rows that TMA can address, a GPU of ours.

    Tries the kernel out the first time, so ask in steps of any size: graphs are recorded later.
    """
    right = x_TD.dtype == weight_OD.dtype and x_TD.dtype in {torch.bfloat16, torch.float16}
    aligned = x_TD.shape[-1] % 8 == 0 and x_TD.data_ptr() % 16 == weight_OD.data_ptr() % 16 == 0
    whole = x_TD.is_contiguous() and weight_OD.is_contiguous()
    return right and aligned and whole and (not x_TD.is_cuda or _hopper(x_TD.device) is not None)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; a CPU, where the interpreter runs, counts as few."""
    if device.type != "cuda":
        return 5
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _scratch(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces of tiles, and counters, which every launch leaves at 0 as it finds them.

    Made once, by the trial of the kernel, which no CUDA graph records: that would zero the counters
    when it runs, not now. Launches must follow each other, as those of one stream do.
    """
    partial = torch.empty(PIECES_MAX * 2 * 64 * 64, dtype=torch.float32, device=device)
    return partial, torch.zeros(TILES_MAX, dtype=torch.int32, device=device)


@functools.cache
def _hopper(device: torch.device) -> Launch | None:
    """What runs the Gluon kernel, tried once; None where it is of no use, said where it fails."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        from .gluon import run  # noqa: PLC0415 - Hopper's only

        _try_out(device, run)
    except Exception as error:  # noqa: BLE001 - whatever a compiler of another version raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(
            f"linear: the Gluon kernel fails on Triton {triton.__version__} ({reason}); products "
            "of few tokens take the library's, at about 0.8 of the rate",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return run


def _try_out(device: torch.device, launch: Launch | None) -> None:
    """Compiles and runs a small product; raises where that does not work here, or is wrong."""
    x_TD = torch.ones((3, 128), dtype=torch.float16, device=device)
    weight_OD = torch.ones((200, 128), dtype=torch.float16, device=device)
    out = torch.zeros((3, 200), dtype=torch.float16, device=device)
    for pieces in (1, 2):
        form = Form(rows=32, block_t=16, block_k=64, pieces=pieces)
        out.zero_()
        _run(x_TD, weight_OD, None, out, launch, form=form, mode=PLAIN, head_dim=128, heads=None)
        if not out.eq(128).all():
            raise RuntimeError(f"128 ones add up to {out.min().item()} to {out.max().item()}")

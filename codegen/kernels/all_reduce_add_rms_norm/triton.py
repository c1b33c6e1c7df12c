"""Sum over the tp ranks, residual added, and norm, in one launch: for the few tokens of decodes.

A program is a row. It puts its rank's share of the row into memory that the peers can read, tells
each of them, waits until each has told it, reads their shares and does the rest alone ("one shot":
no rank waits for a sum of another). The shares are added in fp32 in the order of the ranks and
rounded once, so that all ranks get the same bits; then it rounds where `add` and `rms_norm` do.
NCCL's sum has as many roundings as its algorithm has steps: one for two ranks, so those are equal
bit by bit.

Why no rank reads what another is writing: row r has a slot of its own, twice, and every rank counts
the launches that used it (`epochs`, on the device, so that a replayed CUDA graph counts, too).
Launch e uses half e mod 2. A share is written, then its flags are set to e (release, the whole
system), and a peer reads it only behind such a flag (acquire). A rank writes a half again in launch
e + 2; before, its launch e + 1 has seen the flag e + 1 of every peer, which that peer set in a
launch that began when its launch e, with all its reads, was over. So no trailing barrier is needed.
The flags only grow; compared by the sign of a difference, they may wrap around. A rank's launches
follow each other, on one stream, and all ranks run the same ones in the same order, recorded or
not. A launch that may overlap with the one before waits for it first. Programs wait only for
the peers' programs of the same row, and a launch has no more rows than fit on the GPU at once less
MARGIN (`rows_at_once`), so none waits for one that cannot start: two ranks' rows of 8192 take 32
registers a thread on sm_90, which leaves room for 264 programs on 132 multiprocessors; others are
taken to use 64, the most that 32 warps can have. Beside a send of NCCL some rows may start late; it
waits for steps that the next stage began before, never for this launch, so it ends. A peer that
died is waited for until somebody ends the process, as in NCCL.

The floor: 2 us for three trips (own share to L2 and the fence; the flag to the peer; the peer's
share back), and (ranks - 1) x bytes of the rows over 450 GB/s, what NVLink carries one way. For
8192 columns in bf16 and two ranks: 1 token 16 KiB, 0.04 us; 256 tokens 4 MiB, 9.3 us.

Measured on two H100 (bench/results/all_reduce_h100_202611.md): 5.3 us for 1 x 4096, 21.3 us for
256 x 8192, about 5.5 us and the bytes read over 270 GB/s; NCCL and the norm take 8.0 and 39.3.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from codegen.kernels.add_rms_norm.triton import add_rms_norm

TOKENS_MAX = 256
"""Steps of more tokens take Comm.all_reduce; fewer on a GPU that holds fewer programs at once."""
MARGIN = 8
"""Programs that would fit and are left out."""
REGISTERS_LEAN = 32
"""A thread's for 16-bit rows padded to WIDTH_LEAN and two ranks, as compiled for sm_90."""
REGISTERS = 64
"""The most of a thread of 32 warps, and of all others that were compiled."""
WIDTH_LEAN = 8192
PAIR_READ_KIB_MAX = 4096
"""The same for what one of two ranks would read: as far as measured, where it takes half as long as
NCCL, which moves as much."""
READ_KIB_MAX = 2048
"""The same with more ranks, of which NCCL moves less. By what two take: 13 to 14 us."""
WIDTH_MAX = 16384
"""Longest row held in registers."""
ELEMENTS_A_WARP = 256
"""16 bytes a thread of 16-bit values: one load, and all of a row in flight."""
OVERLAP = 1
"""1: launches may overlap with those of kernels that wait for what they read."""


@triton.jit
def all_reduce_add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    total_ptr,
    buffers_ptr,
    flags_ptr,
    epochs_ptr,
    eps,
    x_stride,
    residual_stride,
    slot,
    slots,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    at = tl.arange(0, BLOCK)
    there = at < WIDTH
    lane = tl.arange(0, LANES)
    is_peer = (lane < RANKS) & (lane != RANK)
    # what no launch changes is read before the wait for the one before
    weight = tl.load(weight_ptr + at, mask=there, other=0.0)
    parts = ()
    for rank in tl.static_range(RANKS):
        part_ptr = tl.load(buffers_ptr + rank).to(tl.pointer_type(dtype))
        parts += (tl.multiple_of(part_ptr, 16),)
    there_ptr = tl.load(flags_ptr + lane, mask=is_peer, other=0).to(tl.pointer_type(tl.int32))
    there_ptr += row * RANKS + RANK
    here_ptr = tl.load(flags_ptr + RANK).to(tl.pointer_type(tl.int32)) + row * RANKS + lane
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    epoch = tl.load(epochs_ptr + row) + 1
    place = ((epoch & 1).to(tl.int64) * slots + row) * slot
    own = tl.load(x_ptr + row * x_stride + at, mask=there, other=0.0)
    tl.store(parts[RANK] + place + at, own, mask=there)
    residual = tl.load(residual_ptr + row * residual_stride + at, mask=there, other=0.0)
    tl.debug_barrier()  # the flag speaks for all threads
    told = tl.full([LANES], 0, tl.int32) + epoch
    tl.atomic_xchg(there_ptr, told, mask=is_peer, sem="release", scope="sys")
    waiting = 1
    while waiting > 0:
        nothing = tl.full([LANES], 0, tl.int32)
        seen = tl.atomic_add(here_ptr, nothing, mask=is_peer, sem="acquire", scope="sys")
        waiting = tl.max(tl.where(is_peer & (seen - epoch < 0), 1, 0), 0)
    tl.debug_barrier()  # and was seen for all
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            total += own.to(tl.float32)
        else:
            # past L1, which does not know what a peer has written
            part = tl.load(parts[rank] + place + at, mask=there, other=0.0, cache_modifier=".cg")
            total += part.to(tl.float32)
    total = total.to(dtype).to(tl.float32)
    total = (total + residual.to(tl.float32)).to(dtype).to(tl.float32)
    tl.store(total_ptr + row * WIDTH + at, total.to(dtype), mask=there)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, 0) / WIDTH + eps)
    normed = (total * scale).to(dtype).to(tl.float32)
    normed = normed * weight.to(tl.float32)
    tl.store(normed_ptr + row * WIDTH + at, normed.to(dtype), mask=there)
    tl.store(epochs_ptr + row, epoch)


def all_reduce_add_rms_norm(
    x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, comm: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, total), latest first; x is this rank's share of a sum and is used up."""
    tokens, width = x_TD.shape
    row_bytes = width * x_TD.element_size()
    peers = None
    if 0 < tokens <= TOKENS_MAX and width <= WIDTH_MAX:
        peers = comm.peers(TOKENS_MAX, -(-row_bytes // 16) * 16)
    if peers is not None:
        most = PAIR_READ_KIB_MAX if peers.ranks == 2 else READ_KIB_MAX
        if (
            tokens <= _rows_of(x_TD.device, width, x_TD.element_size(), peers.ranks)
            and (peers.ranks - 1) * tokens * row_bytes <= most << 10
        ):
            return one_shot(x_TD, residual_TD, weight_D, eps, peers)
    return add_rms_norm(comm.all_reduce(x_TD), residual_TD, weight_D, eps)


def one_shot(
    x_TD: torch.Tensor,
    residual_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    peers: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in one launch, for at most as many tokens as the peers have slots."""
    if x_TD.stride(-1) != 1:
        x_TD = x_TD.contiguous()
    if residual_TD.stride(-1) != 1:
        residual_TD = residual_TD.contiguous()
    tokens, width = x_TD.shape
    normed_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    total_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    block = triton.next_power_of_2(width)
    overlap = OVERLAP == 1 and _may_overlap(x_TD.device)
    all_reduce_add_rms_norm_kernel[(tokens,)](
        x_TD,
        residual_TD,
        weight_D,
        normed_TD,
        total_TD,
        peers.buffers,
        peers.flags,
        peers.epochs,
        eps,
        x_TD.stride(0),
        residual_TD.stride(0),
        peers.slot_bytes // x_TD.element_size(),
        peers.slots,
        RANK=peers.rank,
        RANKS=peers.ranks,
        LANES=triton.next_power_of_2(peers.ranks),
        WIDTH=width,
        BLOCK=block,
        OVERLAP=overlap,
        launch_pdl=overlap,
        num_warps=_warps(block),
        num_stages=1,
    )
    return normed_TD, total_TD


def _warps(block: int) -> int:
    return min(max(block // ELEMENTS_A_WARP, 1), 32)


def rows_at_once(
    width: int, item_bytes: int, ranks: int, *, cores: int, threads: int, hopper: bool
) -> int:
    """Rows whose programs are on a GPU together, whatever else comes.

    cores    multiprocessors
    threads  that one of them holds; each has 65536 registers
    """
    program = 32 * _warps(triton.next_power_of_2(width))
    lean = hopper and ranks == 2 and item_bytes == 2 and WIDTH_LEAN // 2 < width <= WIDTH_LEAN
    registers = REGISTERS_LEAN if lean else REGISTERS
    return cores * min(threads // program, 65536 // (registers * program)) - MARGIN


@functools.cache
def _rows_of(device: torch.device, width: int, item_bytes: int, ranks: int) -> int:
    """The same of a device; a CPU runs one program after the other, in tests."""
    if device.type != "cuda":
        return TOKENS_MAX
    found = torch.cuda.get_device_properties(device)
    return rows_at_once(
        width,
        item_bytes,
        ranks,
        cores=found.multi_processor_count,
        threads=found.max_threads_per_multi_processor,
        hopper=found.major == 9,
    )


@functools.cache
def _may_overlap(device: torch.device) -> bool:
    """From Hopper on, a kernel can wait for the one before by itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9

"""Kernels that are wrong on purpose, and right ones beside them: what a tool of `sanitize.py` sees.

A tool that reports nothing of a wrong kernel is blind to that fault, whatever it says of ours. The
handovers between warps are three: by nothing, which is a race; by an mbarrier, as our Gluon kernels
do it, which is none; and none at all, where only the dispatch of Triton's `warp_specialize` touches
shared memory. What racecheck reports of the last two is its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

WORDS = 64
"""Numbers of 8 bytes that a control reads or writes: 512 bytes, a whole allocation. Of 4 bytes they
would go through `stmatrix`, which no kernel of ours hands over by."""
BY_NOTHING, BY_BARRIER, NO_HANDOVER = 0, 1, 2
DIVERGENT = tl.constexpr(
    "{ .reg .pred %some; setp.lt.s32 %some, $1, 16; @%some bar.sync 0; mov.b32 $0, $1; }"
)
"""Half a warp at a barrier for all of its threads."""


@triton.jit
def copy_kernel(into_ptr, from_ptr, WORDS: tl.constexpr):
    at = tl.arange(0, WORDS)
    tl.store(into_ptr + at, tl.load(from_ptr + at))


@triton.jit
def far_kernel(into_ptr, from_ptr, far, WORDS: tl.constexpr):
    at = tl.arange(0, WORDS)
    tl.store(into_ptr + far + at, tl.load(from_ptr + at))


@triton.jit
def divergent_kernel(into_ptr):
    at = tl.arange(0, 32)
    at = tl.inline_asm_elementwise(DIVERGENT, "=r,r", [at], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(into_ptr + at, at.to(tl.int64))


@gluon.jit
def _give(  # noqa: PLR0917 - a partition takes its arguments in order
    from_ptr, into_ptr, buffer, ready, HANDOVER: gl.constexpr, WORDS: gl.constexpr
):
    at = gl.arange(0, WORDS, layout=gl.BlockedLayout([1], [32], [1], [0]))
    x = gl.load(from_ptr + at)
    if HANDOVER == 2:
        gl.store(into_ptr + WORDS + at, x)
    else:
        buffer.store(x)
    if HANDOVER == 1:
        mbarrier.arrive(ready, count=1)


@gluon.jit
def _take(  # noqa: PLR0917
    from_ptr, into_ptr, buffer, ready, HANDOVER: gl.constexpr, WORDS: gl.constexpr
):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = gl.arange(0, WORDS, layout=LAYOUT)
    if HANDOVER == 1:
        mbarrier.wait(ready, 0)
    x = gl.load(from_ptr + at) if HANDOVER == 2 else buffer.load(LAYOUT)
    gl.store(into_ptr + at, x)


@gluon.jit
def handover_kernel(from_ptr, into_ptr, HANDOVER: gl.constexpr, WORDS: gl.constexpr):
    """One warp fills a buffer that four others read."""
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    buffer = gl.allocate_shared_memory(gl.int64, [WORDS], PLAIN)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    gl.warp_specialize(
        [
            (_take, (from_ptr, into_ptr, buffer, ready, HANDOVER, WORDS)),
            (_give, (from_ptr, into_ptr, buffer, ready, HANDOVER, WORDS)),
        ],
        [1],
        [24],
    )


@dataclass(frozen=True, kw_only=True)
class Control:
    """A kernel of which a tool is known to have to say something, or nothing."""

    tool: str
    wrong: bool
    run: Callable[[torch.device], None]


def _numbers(device: torch.device, count: int = WORDS) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64).to(device)


def _far_off(device: torch.device) -> None:
    words = 1 << 37  # a tebibyte on, where nothing of this process is
    far_kernel[(1,)](_numbers(device), _numbers(device), words, WORDS=WORDS)
    torch.cuda.synchronize()


def _behind(device: torch.device) -> None:
    into = _numbers(device)
    copy_kernel[(1,)](into[WORDS - 1 :], _numbers(device), WORDS=WORDS)  # all but one lie behind it
    torch.cuda.synchronize()


def _of_the_library(device: torch.device) -> None:
    x, weight = (torch.ones(rows, 136).bfloat16().to(device) for rows in (67, 640))
    product = torch.nn.functional.linear(x, weight).view(torch.int64)
    copy_kernel[(1,)](_numbers(device), product, WORDS=WORDS)
    torch.cuda.synchronize()


def _unwritten(device: torch.device) -> None:
    copy_kernel[(1,)](_numbers(device), torch.empty_like(_numbers(device)), WORDS=WORDS)
    torch.cuda.synchronize()


def _diverging(device: torch.device) -> None:
    divergent_kernel[(1,)](_numbers(device), num_warps=1)
    torch.cuda.synchronize()


def _handed_over(device: torch.device, how: int) -> None:
    into = _numbers(device, 2 * WORDS)
    handover_kernel[(1,)](_numbers(device), into, HANDOVER=how, WORDS=WORDS, num_warps=4)
    torch.cuda.synchronize()


CONTROLS: dict[str, Control] = {
    "store far from all allocations": Control(tool="memcheck", wrong=True, run=_far_off),
    "store behind an allocation": Control(tool="memcheck", wrong=True, run=_behind),
    "handover by nothing": Control(
        tool="racecheck", wrong=True, run=lambda device: _handed_over(device, BY_NOTHING)
    ),
    "handover by an mbarrier": Control(
        tool="racecheck", wrong=False, run=lambda device: _handed_over(device, BY_BARRIER)
    ),
    "dispatch of warp_specialize alone": Control(
        tool="racecheck", wrong=False, run=lambda device: _handed_over(device, NO_HANDOVER)
    ),
    "half a warp at a barrier": Control(tool="synccheck", wrong=True, run=_diverging),
    "read of what nobody wrote": Control(tool="initcheck", wrong=True, run=_unwritten),
    "read of what the library wrote": Control(tool="initcheck", wrong=False, run=_of_the_library),
}

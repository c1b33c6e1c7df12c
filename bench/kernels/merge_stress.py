"""Results that blocks hand to each other through global memory, thousands of times.

racecheck sees shared memory only, so this is what stands for it: the merge of a decode's pieces by
the last block to end, the sums of a shared tile of a product, and launches that begin before the
kernel before has ended. Every partial result is NaN before each launch, a copy on another stream
disturbs the order in which blocks end, and all launches have to leave the very same bits, and all
counters zero. One block that reads before another's writes are visible shows as NaN.

    PYTHONPATH=. python bench/kernels/merge_stress.py [--launches 2000]
"""

import argparse
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import torch

from bench.kernels.attention_check import poisoned
from bench.kernels.sanitize_attention import lists_of, placed, step
from bench.kernels.sanitize_data import normal, typed
from codegen.kernels.add_rms_norm import triton as norming
from codegen.kernels.gate_up_silu import triton as gating
from codegen.kernels.linear import core
from codegen.kernels.linear import triton as multiplying
from codegen.kernels.paged_attention import triton as attention

Call = Callable[[], tuple[torch.Tensor, ...]]
DISTURBING_BYTES = 64 << 20
FAULTS = 400
"""Launches in which a fault that may stay hidden is to show."""
SLOT, FIRST_SLOT, PIECES = 8, 10, 11
"""Columns of a work list."""
ALIKE: dict[str, int] = {"MERGE_SLOTS": 8, "MERGE_ROWS": 32, "FEW_TOKENS": 1}
"""As many pieces at once in either merge of groups of 4, so that both add in the same order."""


class Disturbance:
    """Copies on a stream of their own, which take SMs and memory from what is checked."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        size = DISTURBING_BYTES if self.stream else 1
        self.pair = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2)]

    def start(self) -> None:
        """Queues one."""
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                self.pair[0].copy_(self.pair[1])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Integers that are equal only where all bits are."""
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def repeated(call: Call, launches: int, device: torch.device) -> tuple[int, int]:
    """Numbers, over all launches, whose bits differ from the first one's; NaN in the first."""
    disturbance = Disturbance(device)
    first = [each.clone() for each in call()]
    unset = sum(int(each.isnan().sum()) for each in first)
    off = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(launches):
        disturbance.start()
        for own, each in zip(call(), first, strict=True):
            off += (bits(own) != bits(each)).sum()
    return int(off), unset


def poison(inputs: SimpleNamespace) -> int:
    """Makes NaN of the partial results that a step's launches share; how many numbers those are."""
    count = 0
    for call in itertools.chain(*inputs.memo.values()):
        if isinstance(call, attention.Call):
            held = call.attention._arguments  # noqa: SLF001 - what blocks share
            for name in ("partial_ptr", "partial_lse_ptr"):
                held[name].fill_(torch.nan)
                count += held[name].numel()
    return count


def off_by(call: Call, known: Sequence[torch.Tensor]) -> int:
    """Numbers of a launch whose bits differ from known ones."""
    return sum(int((bits(a) != bits(b)).sum()) for a, b in zip(call(), known, strict=True))


def shown(off: int) -> str:
    """Whether the check sees a fault that no launch can hide."""
    return f"{off} numbers are off" if off else "the check is BLIND"


def seen(call: Call, counters: torch.Tensor, firsts: torch.Tensor, device: torch.device) -> str:
    """What the check says of faults that are put into the counters before a launch.

    Merged by none: cannot be hidden, as nothing is then written over NaN. Merged by the first piece
    to arrive: a race with the other pieces, which they may win, so tried until it shows.
    firsts  the counters with which the first piece to arrive takes itself for the last
    """
    known = [each.clone() for each in call()]
    counters.fill_(-1)
    lost = shown(off_by(call, known))
    disturbance = Disturbance(device)
    raced = f"won by the other pieces {FAULTS} times"
    for launch in range(1, FAULTS + 1):
        disturbance.start()
        counters.copy_(firsts)
        if off := off_by(call, known):
            raced = f"{off} numbers are off in launch {launch}"
            break
    counters.zero_()
    return f"merged by none, {lost}; merged by its first piece, {raced}"


def misplaced(call: Call, items_IF: torch.Tensor) -> str:
    """The same of pieces that write to the place of their tile's first one: theirs stay NaN."""
    known = [each.clone() for each in call()]
    own = items_IF[:, SLOT].clone()
    several = items_IF[:, PIECES] > 1
    items_IF[:, SLOT] = torch.where(several, items_IF[:, FIRST_SLOT], own)
    off = off_by(call, known)
    items_IF[:, SLOT] = own
    return f"pieces not written, {shown(off)}"


def attended(
    device: torch.device, rows: list[tuple[int, int, bool]], heads: tuple[int, int], **values: int
) -> tuple[Call, SimpleNamespace]:
    """A decode step under constants of triton.py, its partial results poisoned; its inputs."""
    kv_heads, group = heads
    pages, host = step(rows, page=128)
    q, k, v = typed(device, normal(len(rows), kv_heads * group, 128, seed=1),
                    *(normal(pages, 128, kv_heads, 128, seed=seed) for seed in (2, 3)))  # fmt: skip
    inputs = placed(host, device)

    def call() -> tuple[torch.Tensor, ...]:
        poison(inputs)
        with ExitStack() as stack:
            stack.enter_context(mock.patch.multiple(attention, **values))
            stack.enter_context(mock.patch.object(torch, "empty", poisoned))
            stack.enter_context(
                mock.patch.object(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))
            )
            found: tuple[torch.Tensor, ...] = attention.paged_attention(
                q, k, v, k, inputs, 128**-0.5
            )
        return found

    return call, inputs


def merges(device: torch.device, launches: int) -> list[str]:
    """The merge by the last block, against itself and against a second launch."""
    lines = []
    short = 1 if device.type == "cuda" else 8  # the interpreter is no place for long contexts
    steps: list[tuple[str, list[tuple[int, int, bool]], tuple[int, int]]] = [
        ("1 x 16K, 32/8", [(1, 16_384 // short**2, True)], (8, 4)),
        ("3 of 700 to 9000, 64/8",
         [(1, keys // short, True) for keys in (9000, 700, 4100)], (8, 8)),
        ("40 of about 900, 8/2", [(1, 900 + at, True) for at in range(0, 40, short**2)], (2, 4)),
    ]  # fmt: skip
    for name, rows, heads in steps:
        fused, inputs = attended(device, rows, heads, GLUON=0, FUSE_MERGE=2, APART_TILES=0, **ALIKE)
        off, unset = repeated(fused, launches, device)
        form, work = lists_of(inputs)[0]
        apart, _ = attended(device, rows, heads, GLUON=0, FUSE_MERGE=0, **ALIKE)
        pairs = list(zip(fused(), apart(), strict=True))
        differing = sum(int((bits(one) != bits(other)).sum()) for one, other in pairs)
        most = max(float((one.float() - other.float()).abs().max()) for one, other in pairs)
        numbers = sum(one.numel() for one, _ in pairs)
        pieces = int(work.items_IF[:, PIECES].max())
        counters = work.counters is not None and bool(work.counters.any())  # before any fault
        assert form.fused, "a second launch merges here"
        assert poison(inputs), "nothing is poisoned"
        assert pieces > 1 or device.type == "cpu", "nothing to merge"
        control = "one piece a tile"
        if pieces > 1 and work.counters is not None:
            firsts = torch.zeros_like(work.counters)
            cut = work.items_IF[work.items_IF[:, PIECES] > 1]
            firsts.view(-1, heads[0])[cut[:, FIRST_SLOT].long()] = cut[:, PIECES:] - 1
            control = seen(fused, work.counters, firsts, device)
            control = f"{misplaced(fused, work.items_IF)}; {control}"
        lines.append(
            f"last block merges {name}, up to {pieces} pieces: {launches} launches, {off} numbers "
            f"off the first, {unset} NaN; {differing} of {numbers} differ from a second launch's "
            f"merge, by {most:.1e} at most; counters {'LEFT' if counters else 'zero'}; "
            f"{control}"
        )
    return lines


def shared_tiles(device: torch.device, launches: int) -> str:
    """A product whose tiles are shared by several blocks."""
    x, weight = typed(device, normal(5, 4096, seed=1), normal(512, 4096, seed=2, scale=1 / 64))
    form = multiplying.choice().form(512, 5)
    launch = core._hopper(x.device)  # noqa: SLF001 - tried out before anything is poisoned
    # by the tensor's device, which has a number: one without would get buffers of its own
    partial, arrived = core._scratch(x.device)  # noqa: SLF001 - what blocks share

    def call() -> tuple[torch.Tensor, ...]:
        partial.fill_(torch.nan)
        with mock.patch.object(torch, "empty", poisoned):
            return (multiplying.linear(x, weight, None),)

    off, unset = repeated(call, launches, device)
    left = bool(arrived.any())
    assert form.pieces > 1, "no tile is shared"
    firsts = torch.full_like(arrived, form.pieces - 1)
    control = seen(call, arrived, firsts, device)
    return (
        f"product of 512 x 4096, {form.pieces} blocks a tile, {'Gluon' if launch else 'portable'}: "
        f"{launches} launches, {off} numbers off the first, {unset} NaN; counters "
        f"{'LEFT' if left else 'zero'}; {control}"
    )


def overlapping(device: torch.device, launches: int) -> str:
    """Copy, product, norm, gated product: each may start while the one before still runs."""
    sources = torch.stack(typed(device, *(normal(5, 1024, seed=seed) for seed in range(4))))
    first, gate = (normal(rows, 1024, seed=rows, scale=1 / 32) for rows in (1024, 512))
    first, gate, scale = typed(device, first, gate, normal(1024, seed=7))
    x = torch.empty_like(sources[0])

    def chain(at: int) -> torch.Tensor:
        x.copy_(sources[at])
        normed, total = norming.add_rms_norm(multiplying.linear(x, first, None), x, scale, 1e-5)
        return torch.cat((gating.gate_up_silu(normed, gate), total), dim=1)

    modules = (multiplying, norming, gating)
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "OVERLAP", 0))
        known = [chain(at).clone() for at in range(4)]
    off = torch.zeros((), dtype=torch.int64, device=device)
    disturbance = Disturbance(device)
    for number in range(launches):
        if number % 2:
            disturbance.start()
        off += (bits(chain(number % 4)) != bits(known[number % 4])).sum()
    return (
        f"chain of overlapping launches: {launches} rounds, {int(off)} numbers off those of "
        "launches in turn"
    )


def main() -> None:
    """Prints a line a check; exit status 1 where any bit is off."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, default=2000)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    device = torch.device(options.device)
    began = time.monotonic()
    parts: list[Callable[[], list[str]]] = [
        lambda: merges(device, options.launches),
        lambda: [shared_tiles(device, options.launches)],
        lambda: [overlapping(device, options.launches)],
    ]
    lines = []
    for part in parts:
        try:
            found = part()
        except Exception as error:  # noqa: BLE001 - the others still say something
            found = [f"FAILED: {type(error).__name__}: {error}"]
        print("\n".join(found), flush=True)
        lines += found
    print(f"{time.monotonic() - began:.0f} s")
    good = all(", 0 numbers off" in line and not re.search("LEFT|BLIND", line) for line in lines)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

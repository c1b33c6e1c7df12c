"""One launch for sum over ranks, residual and norm, beside NCCL's sum and our norm, on these GPUs.

    PYTHONPATH=. python bench/kernels/all_reduce_rates.py --out DIR

Starts a process for each GPU, which meet as the ranks of a plan do (runtime/parallel/groups.py).
First values: every size against float64, the sum bit by bit, all ranks alike; then a race stress,
launches in bursts behind delays that each rank draws for itself, fresh data, every one compared;
the same replayed as a CUDA graph. Then times, as nodes of CUDA graphs, the two in turn; the slowest
rank's median counts. `floor_us` is 2 us for the trips and the peers' rows over 450 GB/s. Ends
within 90 s. Where there is no GPU, two processes run the values in Triton's interpreter.
"""

import argparse
import csv
import hashlib
import logging
import os
import random
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._C._distributed_c10d import TCPStore  # noqa: E402

from bench.kernels.attention_peers import environment, table  # noqa: E402
from codegen.kernels.add_rms_norm.triton import add_rms_norm  # noqa: E402
from codegen.kernels.all_reduce_add_rms_norm.triton import one_shot  # noqa: E402
from plans.mesh import Parallelism  # noqa: E402
from runtime.parallel.groups import RankComm, join_groups  # noqa: E402
from runtime.parallel.peers import SharedMemory, addressed, shared_bytes  # noqa: E402
from runtime.parallel.progress import Progress  # noqa: E402

EPS = 1e-5
SLOTS = 256
SIZES = (
    ((1, 4096), (1, 8192), (3, 5120), (7, 1000), (64, 8192), (128, 4096), (256, 8192))
    if GPU
    else ((1, 256), (3, 100))
)
"""Tokens and columns whose values are checked."""
TIMED = tuple((tokens, width) for width in (4096, 8192) for tokens in (1, 8, 32, 64, 128, 256))
STRESS = 2000 if GPU else 30
STRESSED = (1, 1, 2, 8, 33, 64) if GPU else (1, 2, 3)
DTYPE = torch.bfloat16 if GPU else torch.float16
"""The interpreter cuts bf16 off where a GPU rounds."""
WIDTH = 8192 if GPU else 256
BURST = 4
CALLS, REPLAYS, ROUNDS = 40, 8, 15
TRIPS_US, LINK_BYTES_PER_US = 2.0, 450e3
LIMIT_S = 85.0


@dataclass
class Bench:
    """What a rank has."""

    rank: int
    ranks: int
    device: torch.device
    comm: RankComm
    memory: list[Tensor]
    """Of all ranks, where they have no GPU."""
    lines: list[str] = field(default_factory=list)
    known: dict[int, SharedMemory] = field(default_factory=dict)

    def peers(self, width: int) -> SharedMemory | None:
        """For rows of 16-bit values."""
        slot_bytes = -(-2 * width // 16) * 16
        if GPU:
            return self.comm.peers(SLOTS, slot_bytes)
        if width not in self.known:  # one row of memory a width, as flags begin at 0
            at = [each.data_ptr() + len(self.known) * OWN_BYTES for each in self.memory]
            self.known[width] = addressed(
                at, rank=self.rank, slots=SLOTS, slot_bytes=slot_bytes, device=self.device
            )
        return self.known[width]

    def say(self, text: str) -> None:
        """A line of the report; the first rank's is written."""
        self.lines.append(text)
        if self.rank == 0:
            print(text, flush=True)

    def everyone(self, value: Any) -> list[Any]:
        """All ranks' values."""
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, value)
        return found


OWN_BYTES = shared_bytes(2, SLOTS, 512)
"""Of one width, in the interpreter."""


def drawn(bench: Bench, seed: int, tokens: int, width: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Shares of all ranks, residual and weight, the same numbers on all of them."""
    generator = torch.Generator(bench.device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=bench.device).to(DTYPE)

    shares = normal(bench.ranks, tokens, width)
    return list(shares), normal(tokens, width), normal(width)


def summed(shares: list[Tensor], residual: Tensor) -> Tensor:
    """The definition: fp32 in the order of the ranks, rounded, and that of the sum."""
    total = torch.zeros_like(shares[0], dtype=torch.float32)
    for each in shares:
        total = total + each.float()
    return total.to(DTYPE) + residual


def values(bench: Bench) -> bool:
    """Every size; whether all were right."""
    good = True
    for at, (tokens, width) in enumerate(SIZES):
        peers = bench.peers(width)
        assert peers is not None, "asked for before"
        shares, residual, weight = drawn(bench, 100 + at, tokens, width)
        poison = [torch.full_like(residual, torch.nan) for _ in range(2)]
        del poison  # the allocator hands the same memory out again
        normed, total = one_shot(shares[bench.rank], residual, weight, EPS, peers)
        exact = total.double()
        exact = exact / (exact.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
        off = float((normed.double() - exact).norm() / exact.norm())
        same = bool(torch.equal(total, summed(shares, residual)))
        bits = b"".join(each.cpu().view(torch.int16).numpy().tobytes() for each in (normed, total))
        alike = len(set(bench.everyone(hashlib.sha256(bits).hexdigest()))) == 1
        right = all(bench.everyone(same and alike and off < 1e-2))
        good &= right
        bench.say(
            f"values {tokens} x {width}: {'right' if right else 'WRONG'}"
            f" (sum equal: {same}, ranks alike: {alike}, norm off by {off:.1e})"
        )
    return good


def delay(own: random.Random) -> None:
    """None, some microseconds on the device, or a longer one on the host."""
    kind = own.randrange(4)
    if GPU and kind in {1, 2}:
        torch.cuda._sleep(own.randrange(60_000))  # noqa: SLF001 - the only way to keep a stream busy
    elif kind == 3 and own.random() < 0.1:
        time.sleep(own.random() * 1e-3)


def stress(bench: Bench) -> bool:
    """Bursts behind delays of each rank's own; whether every launch was right."""
    peers = bench.peers(WIDTH)
    assert peers is not None, "asked for before"
    own, alike = random.Random(bench.rank), random.Random(-1)
    wrong = torch.zeros((), dtype=torch.int64, device=bench.device)
    launches = 0
    began_s = time.perf_counter()
    for number in range(STRESS):
        work = [
            drawn(bench, 10_000 + BURST * number + at, alike.choice(STRESSED), WIDTH)
            for at in range(alike.randint(1, BURST))
        ]
        delay(own)
        found = []
        for shares, residual, weight in work:
            found.append(one_shot(shares[bench.rank], residual, weight, EPS, peers))
            if own.random() < 0.2:
                delay(own)
        for (shares, residual, weight), (normed, total) in zip(work, found, strict=True):
            expected = summed(shares, residual)
            apart = add_rms_norm(expected, torch.zeros_like(residual), weight, EPS)[0]
            far = (normed.float() - apart.float()).abs() > 2**-6 * apart.float().abs().clamp_min(1)
            wrong += (total != expected).any() | far.any() | ~normed.isfinite().all()
        launches += len(work)
        if GPU and number % 50 == 49:
            torch.cuda.synchronize()
    count = sum(bench.everyone(int(wrong)))
    bench.say(
        f"race stress: {STRESS} bursts, {launches} launches, {count} wrong,"
        f" {time.perf_counter() - began_s:.1f} s"
    )
    return count == 0


def replayed_stress(bench: Bench) -> bool:
    """The same launches again and again from a CUDA graph, with fresh data."""
    peers = bench.peers(WIDTH)
    assert peers is not None, "asked for before"
    own = random.Random(100 + bench.rank)
    tokens = (1, 64, 8, 1, 33)
    held = [drawn(bench, at, count, WIDTH) for at, count in enumerate(tokens)]
    found: list[tuple[Tensor, Tensor]] = []

    def run() -> None:
        found[:] = [
            one_shot(shares[bench.rank], residual, weight, EPS, peers)
            for shares, residual, weight in held
        ]

    graph = recorded(run)
    wrong = torch.zeros((), dtype=torch.int64, device=bench.device)
    for number in range(300):
        for at, (shares, residual, _) in enumerate(held):
            fresh, other, _ = drawn(bench, 50_000 + 10 * number + at, tokens[at], WIDTH)
            residual.copy_(other)
            for into, each in zip(shares, fresh, strict=True):
                into.copy_(each)
        delay(own)
        graph.replay()
        for (shares, residual, _), (_, total) in zip(held, found, strict=True):
            wrong += (total != summed(shares, residual)).any()
    count = sum(bench.everyone(int(wrong)))
    bench.say(f"graph stress: 300 replays of {len(held)} launches, {count} wrong")
    return count == 0


def recorded(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of what runs, which has run before; NCCL's own thread may not end the recording."""
    run()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    torch.cuda.synchronize()
    dist.barrier()
    return graph


def ways_of(
    bench: Bench, shares: list[Tensor], others: list[tuple[Tensor, Tensor]]
) -> dict[str, Callable[[], None]]:
    """What is timed: each goes through the shares, with (residual, weight) of each."""
    peers = bench.peers(shares[0].shape[1])
    work = [(shares[at % len(shares)], *others[at % len(others)]) for at in range(CALLS)]

    def fused() -> None:
        for share, residual, weight in work:
            one_shot(share, residual, weight, EPS, peers)

    def apart() -> None:
        for share, residual, weight in work:
            add_rms_norm(bench.comm.all_reduce(share), residual, weight, EPS)

    def alone() -> None:
        for share, *_ in work:
            bench.comm.all_reduce(share)

    ways = {"NCCL and norm": apart, "NCCL alone": alone}
    return ways if peers is None else {"one launch": fused, **ways}


def timed(bench: Bench, tokens: int, width: int) -> list[dict[str, Any]]:
    """A row for each way."""
    sets = [drawn(bench, at, tokens, width) for at in range(8)]
    shares = [each[0][bench.rank].clone() for each in sets]
    ways = ways_of(bench, shares, [each[1:] for each in sets])
    graphs = {name: recorded(each) for name, each in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            for into, (every, *_) in zip(shares, sets, strict=True):
                into.copy_(every[bench.rank])  # NCCL sums in place: it would grow to infinity
            dist.barrier()
            torch.cuda.synchronize()
            start.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            times[name].append(1e3 * start.elapsed_time(end) / REPLAYS / CALLS)
    floor = TRIPS_US + (bench.ranks - 1) * tokens * width * 2 / LINK_BYTES_PER_US
    return [row_of(bench, (tokens, width), name, own, floor) for name, own in times.items()]


def row_of(
    bench: Bench, size: tuple[int, int], way: str, own: list[float], floor: float
) -> dict[str, Any]:
    """The slowest rank's median, and all ranks' extremes."""
    every = bench.everyone((statistics.median(own), min(own), max(own)))
    return {
        "ranks": bench.ranks,
        "tokens": size[0],
        "width": size[1],
        "way": way,
        "us": round(max(each[0] for each in every), 2),
        "least_us": round(min(each[1] for each in every), 2),
        "most_us": round(max(each[2] for each in every), 2),
        "floor_us": round(floor, 2) if way == "one launch" else "",
    }


def run_rank(rank: int, ranks: int, port: int, memory: list[Tensor], out: Path) -> None:
    """All of a rank's work; the first writes what was found, after each part."""
    logging.basicConfig(level=logging.WARNING, format=f"rank {rank}: %(message)s")
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if GPU else torch.device("cpu")
    if GPU:
        torch.cuda.set_device(device)
    store = TCPStore(
        "127.0.0.1", port, ranks, is_master=rank == 0, timeout=timedelta(seconds=LIMIT_S)
    )
    groups = join_groups(Parallelism(tp=ranks), rank, store, device)
    bench = Bench(rank, ranks, device, RankComm(groups, Progress()), memory)
    rows: list[dict[str, Any]] = []
    try:
        shared = bench.peers(WIDTH) is not None
        bench.say(f"{ranks} ranks, memory shared: {shared}")
        if shared:
            good = values(bench)
            write(out, bench, rows)
            good &= stress(bench)
            good &= not GPU or replayed_stress(bench)
            bench.say(f"values are {'right' if good else 'WRONG'}")
        for tokens, width in sorted(TIMED) if GPU else ():
            rows += timed(bench, tokens, width)
            write(out, bench, rows)
    except Exception:  # noqa: BLE001 - what was found before is written
        bench.say(traceback.format_exc())
    write(out, bench, rows)
    if rank == 0 and rows:
        print(table(rows, list(rows[0])), flush=True)
    # not a return: communicators of ranks that are gone may block in their destructors
    sys.stdout.flush()
    os._exit(0)


def write(out: Path, bench: Bench, rows: list[dict[str, Any]]) -> None:
    """The files, from the first rank."""
    if bench.rank:
        return
    fields = list(rows[0]) if rows else ["ranks"]
    text = [*environment(), "", *bench.lines, "", table(rows, fields), ""]
    (out / "all_reduce_rates.md").write_text("\n".join(text))
    with (out / "all_reduce_rates.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=fields)
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Starts the ranks and ends them in time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")  # as the runtime's workers have it
    ranks = torch.cuda.device_count() if GPU else 2
    if ranks < 2:
        print("one GPU: no peers to sum with")
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    memory = []
    if not GPU:
        size = OWN_BYTES * (len(SIZES) + 1)
        memory = [torch.zeros(size, dtype=torch.uint8).share_memory_() for _ in range(ranks)]
    context = mp.get_context("spawn")
    started = [
        context.Process(target=run_rank, args=(rank, ranks, port, memory, options.out))
        for rank in range(ranks)
    ]
    for each in started:
        each.start()
    until_s = time.monotonic() + LIMIT_S
    for each in started:
        each.join(max(until_s - time.monotonic(), 0.0))
    if any(each.is_alive() for each in started):
        print(f"ended after {LIMIT_S:.0f} s; what was found by then is written", flush=True)
        for each in started:
            each.kill()
            each.join()
    print([each.exitcode for each in started])


if __name__ == "__main__":
    main()

"""Collectives between the devices of this machine: one process a device, NCCL.

All are timed as nodes of a CUDA graph: so do collectives run in a recorded step, and a transfer to
the next stage is launched by a host that is ahead of its device, so that what counts is the link's
time and not the 50 us in which a host launches one. Every rank measures, the slowest counts.
Whatever happens to a rank, the call ends soon after its limit with what all ranks have measured by
then.
"""

import datetime as dt
import queue
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch._C._distributed_c10d import TCPStore

from codegen.clock import Timing, summary

CALLS = 16
ROUNDS = 7
GRACE_S = 5.0
"""Beyond the limit: for the row that runs when it is reached, and for ranks to end."""
Row = tuple[str, int]
"""Operation, and bytes that a rank gives."""
Backend = Literal["nccl", "gloo"]
"""gloo times the same calls between CPUs: what a machine without devices can show of this."""


def measure_links(
    rows: Sequence[Row], devices: int, *, limit_s: float, backend: Backend = "nccl"
) -> dict[Row, Timing]:
    """Times over so many devices of this machine, of the rows for which there was time.

    Rows should come in the order of their importance: the limit cuts off the last ones.
    """
    ends_s = time.time() + limit_s  # one clock for all processes of a machine
    store = TCPStore("127.0.0.1", 0, devices + 1, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(
            target=_rank, args=(rank, devices, store.port, list(rows), ends_s, backend, answers)
        )
        for rank in range(devices)
    ]
    for process in processes:
        process.start()
    found: dict[Row, list[Timing]] = {}
    open_ranks = set(range(devices))
    try:
        while open_ranks and time.time() < ends_s + GRACE_S:
            try:
                rank, row, timing = answers.get(timeout=0.2)
            except queue.Empty:
                gone = [rank for rank in open_ranks if processes[rank].exitcode is not None]
                if gone and answers.empty():
                    sys.stderr.write(f"links: rank {gone[0]} ended early\n")
                    break
                continue
            if row is None:
                open_ranks.discard(rank)
            else:
                found.setdefault(row, []).append(timing)
    finally:
        for process in processes:
            process.join(timeout=0.0 if open_ranks else GRACE_S)
            if process.is_alive():
                process.kill()
                process.join()
    return {
        row: max(found[row], key=lambda timing: timing.us)
        for row in rows
        if len(found.get(row, ())) == devices
    }


def _rank(
    rank: int,
    devices: int,
    port: int,
    rows: list[Row],
    ends_s: float,
    backend: Backend,
    answers: Any,
) -> None:
    """One process: all rows in the same order as the others, until rank 0 says that it is time."""
    store = TCPStore("127.0.0.1", port, devices + 1, is_master=False)
    left = dt.timedelta(seconds=max(ends_s - time.time(), 1.0))
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=devices, device_id=device, timeout=left
        )
    else:
        device = torch.device("cpu")
        dist.init_process_group(backend, store=store, rank=rank, world_size=devices, timeout=left)
    for at, (op, size) in enumerate(rows):
        if rank == 0:
            store.set(f"row {at}", "go" if time.time() < ends_s else "stop")
        if store.get(f"row {at}") == b"stop":
            break
        try:
            timing = _timed(op, size, rank, devices, device)
        except RuntimeError as error:
            sys.stderr.write(f"rank {rank}: {op} of {size} bytes: {error}\n")
        else:
            answers.put((rank, (op, size), timing))
    answers.put((rank, None, None))
    dist.destroy_process_group()


def _timed(op: str, size: int, rank: int, devices: int, device: torch.device) -> Timing:
    call = _call(op, size, rank, devices, device)
    for _ in range(3):
        call()

    def calls() -> None:
        for _ in range(CALLS):
            call()

    if device.type != "cuda":
        return summary([_wall_us(calls) for _ in range(ROUNDS)])
    torch.cuda.synchronize()
    run = _recorded(calls)
    us = []
    for _ in range(ROUNDS):
        dist.barrier()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        us.append(1e3 * float(start.elapsed_time(end)) / CALLS)
    return summary(us)


def _recorded(calls: Callable[[], None]) -> Callable[[], None]:
    """The calls as one graph; as they are where they cannot be recorded, which all ranks find."""
    graph = torch.cuda.CUDAGraph()
    try:
        # NCCL's own threads look at their events while this one records
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            calls()
    except RuntimeError as error:
        sys.stderr.write(f"not recorded, timed as eager calls: {error}\n")
        torch.cuda.synchronize()
        return calls
    return graph.replay


def _wall_us(calls: Callable[[], None]) -> float:
    """Microseconds of one of the calls, which return when they are done."""
    dist.barrier()
    began_s = time.perf_counter()
    calls()
    return 1e6 * (time.perf_counter() - began_s) / CALLS


def _call(
    op: str, size: int, rank: int, devices: int, device: torch.device
) -> Callable[[], object]:
    """One collective, or this rank's part of it."""
    # zeros: a sum of them stays finite however often, and a link takes any bits alike
    given = torch.zeros(size // 2 // devices * devices, device=device, dtype=torch.bfloat16)
    if op == "all_reduce":
        return lambda: dist.all_reduce(given)
    if op == "all_to_all":
        taken = torch.empty_like(given)
        return lambda: dist.all_to_all_single(taken, given)
    target = torch.empty(len(given) * devices, device=device, dtype=torch.bfloat16)
    if op == "all_gather":
        return lambda: dist.all_gather_into_tensor(target, given)
    if rank == 0:
        return lambda: dist.send(given, 1)
    if rank == 1:
        return lambda: dist.recv(target[: len(given)], 0)
    return lambda: None  # a transfer between two does not concern the others

"""Collectives between the devices of this machine: one process a device, NCCL.

Collectives are timed as nodes of a CUDA graph, as in a recorded step; a transfer from one device to
the next by events around eager calls. Every rank measures, the slowest counts.
"""

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from codegen.clock import Timing, summary

CALLS = 16
ROUNDS = 7


def measure_links(rows: Sequence[tuple[str, int]], devices: int) -> dict[tuple[str, int], Timing]:
    """Times of (op, bytes that a rank gives) over so many devices of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(rank, devices, port, list(rows), answers))
        for rank in range(devices)
    ]
    for process in processes:
        process.start()
    found: list[dict[tuple[str, int], Timing]] = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return {
        row: max((each[row] for each in found if row in each), key=lambda timing: timing.us)
        for row in rows
        if any(row in each for each in found)
    }


def _rank(rank: int, devices: int, port: int, rows: list[tuple[str, int]], answers: Any) -> None:
    """One process: all rows in the same order as the others."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", rank=rank, world_size=devices, device_id=device)
    found = {}
    for op, size in rows:
        try:
            found[op, size] = _timed(op, size, rank, devices)
        except RuntimeError as error:
            print(f"rank {rank}: {op} of {size} bytes: {error}", flush=True)  # noqa: T201 - a child
    answers.put(found)
    dist.destroy_process_group()


def _timed(op: str, size: int, rank: int, devices: int) -> Timing:
    call = _call(op, size, rank, devices)
    for _ in range(3):
        call()
    torch.cuda.synchronize()

    def calls() -> None:
        for _ in range(CALLS):
            call()

    run = calls
    if op != "send_recv":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        run = graph.replay
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


def _call(op: str, size: int, rank: int, devices: int) -> Callable[[], object]:
    """One collective, or this rank's part of it."""
    # zeros: a sum of them stays finite however often, and a link takes any bits alike
    source = torch.zeros(size // 2, device="cuda", dtype=torch.bfloat16)
    target = torch.empty(size // 2 * devices, device="cuda", dtype=torch.bfloat16)
    if op == "all_reduce":
        return lambda: dist.all_reduce(source)
    if op == "all_gather":
        return lambda: dist.all_gather_into_tensor(target, source)
    if rank == 0:
        return lambda: dist.send(source, 1)
    if rank == 1:
        return lambda: dist.recv(target[: size // 2], 0)
    return lambda: None  # a transfer between two does not concern the others

"""Starts the ranks of a plan: all of them on this machine, or as torchrun has started them.

One process, the driver, holds the engines, one a replica, and is no rank. Started directly, it
starts every rank as its child. Under torchrun the process of rank 0 becomes the driver and starts
rank 0 as its child; the others are ranks themselves. All meet at a store of torch.distributed.
"""

import multiprocessing
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.process import BaseProcess

import torch
from msgspec import Struct
from torch._C._distributed_c10d import PrefixStore, TCPStore

from plans.errors import BundleMismatch, MedhaError
from plans.plan import Plan
from runtime.parallel.control import Workers
from runtime.parallel.worker import CONTROL_KEY, RANDOM, Setup, worker_main

LOCAL = "127.0.0.1"
ENDING_S = 5.0
"""How long ending workers may take before they are killed."""
FAILED_S = 0.5
"""The same where the run has failed: some may wait for others that will never answer."""
KILLED_S = 5.0
"""How long to wait for a killed one: a driver that hangs may keep it in the kernel for ever."""


class Torchrun(Struct, frozen=True, kw_only=True):
    """This process's place, as torchrun says it."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    host: str
    port: int
    attempt: int
    """Restarts so far; they share a store."""
    agent_store: bool
    """The launcher hosts the store; else rank 0 does."""


def torchrun_place(environment: Mapping[str, str]) -> Torchrun | None:
    """The place that the environment gives; None where no launcher has started this process."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    return Torchrun(
        rank=rank,
        ranks=ranks,
        local_rank=int(environment.get("LOCAL_RANK", rank)),
        local_ranks=int(environment.get("LOCAL_WORLD_SIZE", ranks)),
        host=environment["MASTER_ADDR"],
        port=int(environment["MASTER_PORT"]),
        attempt=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
        agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def check_launch(plan: Plan, place: Torchrun | None) -> None:
    """Raises BundleMismatch where the processes or devices are not those of the plan.

    Nothing is loaded before, and no process waits for another.
    """
    mesh, map_ = plan.parallelism, plan.placement.rank_map
    nodes = sorted({node for node, _ in map_})
    command = (
        f"torchrun --nnodes {len(nodes)} --nproc-per-node {mesh.ranks // len(nodes)} "
        "--rdzv-backend c10d --rdzv-endpoint HOST:PORT -m runtime.cli_run BUNDLE ..."
    )
    what = (
        f"the plan has {mesh.ranks} ranks (tp {mesh.tp}, spp {mesh.spp}, kvp {mesh.kvp}, "
        f"replicas {mesh.replicas})"
    )
    if place is None:
        if len(nodes) > 1:
            raise BundleMismatch(f"{what} on {len(nodes)} nodes; start on every node:\n  {command}")
        here = range(mesh.ranks)
    else:
        if place.ranks != mesh.ranks:
            raise BundleMismatch(
                f"{what}, and {place.ranks} processes were started; start:\n  {command}"
            )
        first = place.rank - place.local_rank
        here = range(first, first + place.local_ranks)
        planned = [rank for rank in range(mesh.ranks) if map_[rank][0] == map_[place.rank][0]]
        if list(here) != planned:
            raise BundleMismatch(
                f"ranks {list(here)} were started on this node, and the plan places {planned} "
                f"together; start:\n  {command}"
            )
    if not plan.topology.device.startswith("cpu"):
        needed, found = 1 + max(map_[rank][1] for rank in here), torch.cuda.device_count()
        if found < needed:
            raise BundleMismatch(
                f"the plan uses {needed} devices of {plan.topology.device} on this node, and "
                f"{found} CUDA devices are visible; nearest: plan for what is here"
            )


@contextmanager
def running_workers(
    bundle: str,
    plan: Plan,
    weights: str,
    seed: int,
    place: Torchrun | None,
    *,
    graphs: bool = True,
) -> Iterator[list[Workers]]:
    """All ranks of a plan, loaded and ready, by replica; ended, or killed, when the block ends.

    Call in the driver: check_launch has passed, and under torchrun the rank is 0.

    graphs  let all ranks record decode steps where the program allows it
    """
    mesh = plan.parallelism
    store, port = open_store(place)
    attempt = secrets.token_hex(8) if place is None else _attempt(place)
    # what starts on one machine stays on it; torchrun's own address is one that all nodes reach
    alone = place is None or place.local_ranks == place.ranks
    host = LOCAL if place is None else place.host
    replicas = [
        Workers(plan, bind=LOCAL if alone else "*", host=LOCAL if alone else host, replica=replica)
        for replica in range(mesh.replicas)
    ]
    processes: list[dict[int, BaseProcess]] = [{} for _ in replicas]
    with _told_to_end():
        try:
            for replica, workers in enumerate(replicas):
                prefix = _prefix(attempt, replica)
                PrefixStore(prefix, store).set(CONTROL_KEY, workers.address)
            for number in range(mesh.ranks) if place is None else (0,):
                replica, rank = divmod(number, mesh.ranks_per_replica)
                setup = Setup(
                    bundle=bundle,
                    weights=weights,
                    seed=seed,
                    replica=replica,
                    rank=rank,
                    ranks=mesh.ranks,
                    store_host=host,
                    store_port=port,
                    store_prefix=_prefix(attempt, replica),
                    threads=threads_for(mesh.ranks if place is None else place.local_ranks),
                )
                processes[replica][rank] = start_worker(setup)
            for workers, own in zip(replicas, processes, strict=True):
                workers.join(own, seed=seed if weights == RANDOM else None, graphs=graphs)
            yield replicas
        finally:
            for workers in replicas:
                workers.stop()
            failed = any(workers.failed for workers in replicas)
            started = [process for own in processes for process in own.values()]
            _end(started, FAILED_S if failed else ENDING_S)


def start_worker(setup: Setup) -> BaseProcess:
    """Starts a rank as a child, forked from a process that has torch loaded and nothing running."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runtime.parallel.worker"])
    process = context.Process(target=worker_main, args=(setup,), name=f"rank {setup.rank}")
    process.daemon = True
    process.start()
    return process


def torchrun_setup(bundle: str, plan: Plan, weights: str, seed: int, place: Torchrun) -> Setup:
    """What this process, a rank other than 0 under torchrun, runs with."""
    replica, rank = divmod(place.rank, plan.parallelism.ranks_per_replica)
    return Setup(
        bundle=bundle,
        weights=weights,
        seed=seed,
        replica=replica,
        rank=rank,
        ranks=place.ranks,
        store_host=place.host,
        store_port=place.port,
        store_prefix=_prefix(_attempt(place), replica),
        threads=threads_for(place.local_ranks),
    )


def threads_for(ranks: int) -> int:
    """Torch's threads of each of so many ranks on this machine."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal():
        return max(int(wanted), 1)
    return max(len(os.sched_getaffinity(0)) // ranks, 1)


def _prefix(attempt: str, replica: int) -> str:
    return f"{attempt}/{replica}"


def _attempt(place: Torchrun) -> str:
    return f"medha-{place.attempt}"


def open_store(place: Torchrun | None) -> tuple[TCPStore, int]:
    """The store, hosted by this process where no launcher does, and its port."""
    if place is None:
        # by itself it would listen on every interface
        listener = socket.create_server((LOCAL, 0))
        port: int = listener.getsockname()[1]
        store = TCPStore(
            LOCAL,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),  # the store closes it
        )
        return store, port
    store = TCPStore(
        place.host,
        place.port,
        is_master=not place.agent_store,
        wait_for_workers=False,
        timeout=timedelta(minutes=5),
    )
    return store, place.port


@contextmanager
def _told_to_end() -> Iterator[None]:
    """Makes SIGTERM an error of the engine's thread, so that requests end with a reason.

    A launcher sends it when another of its ranks has ended. The second one kills.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise MedhaError("told to end (SIGTERM): by a user, or by torchrun after a rank has ended")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(processes: Sequence[BaseProcess], patience_s: float) -> None:
    """Lets no started process outlive this one's use for it."""
    until_s = time.monotonic() + patience_s
    for process in processes:
        process.join(max(until_s - time.monotonic(), 0.0))
        if process.exitcode is None:
            process.kill()
            process.join(KILLED_S)

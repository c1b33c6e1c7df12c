"""Who talks to whom: one communicator for each axis of the mesh that a rank shares.

NCCL on GPUs, gloo on CPUs. Ranks and axes as in plans/mesh.py; each replica is a world of its own,
whose ranks count from 0.
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from plans.mesh import Coordinates, Parallelism, axis_ranks, coordinates
from runtime.parallel.kvp import Merges
from runtime.parallel.peers import SharedMemory, share
from runtime.parallel.progress import COMPUTES, WAITS, Progress


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The communicators of one rank; None where its axis has one rank, or at a pipeline's end."""

    place: Coordinates
    tp: dist.ProcessGroup | None
    kvp: dist.ProcessGroup | None
    before: dist.ProcessGroup | None
    """This rank and the one of the stage before."""
    after: dist.ProcessGroup | None
    kvp_ranks: tuple[int, ...]
    stage_ranks: tuple[int, ...]


def join_groups(mesh: Parallelism, rank: int, store: Store, device: torch.device) -> Groups:
    """Meets the other ranks of the replica through the store and makes all communicators."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=mesh.ranks_per_replica,
        device_id=device if device.type == "cuda" else None,
    )
    found: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for ranks in _all_groups(mesh):  # every rank makes every group, in one order
        group = dist.new_group(list(ranks))
        if rank in ranks:
            found[ranks] = group
    for group in found.values():
        # the first collective sets connections up; later ones need not all members at once
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    place = coordinates(mesh, rank)
    stages = axis_ranks(mesh, rank, "spp")
    at = place.stage
    return Groups(
        place=place,
        tp=found.get(axis_ranks(mesh, rank, "tp")) if mesh.tp > 1 else None,
        kvp=found.get(axis_ranks(mesh, rank, "kvp")) if mesh.kvp > 1 else None,
        before=found[stages[at - 1 : at + 1]] if at > 0 else None,
        after=found[stages[at : at + 2]] if at + 1 < mesh.spp else None,
        kvp_ranks=axis_ranks(mesh, rank, "kvp"),
        stage_ranks=stages,
    )


def _all_groups(mesh: Parallelism) -> list[tuple[int, ...]]:
    """Ranks of every group of one replica, each once."""
    found: dict[tuple[int, ...], None] = {}
    for rank in range(mesh.ranks_per_replica):
        for axis in ("tp", "kvp"):
            ranks = axis_ranks(mesh, rank, axis)
            if len(ranks) > 1:
                found[ranks] = None
        stages = axis_ranks(mesh, rank, "spp")
        for at in range(len(stages) - 1):
            found[stages[at : at + 2]] = None
    return list(found)


class RankComm:
    """Comm of plans/ops.py over the groups of one rank."""

    def __init__(self, groups: Groups, progress: Progress) -> None:
        """Set `exchange` before each step."""
        self._groups = groups
        self._progress = progress
        self.exchange: Merges | None = None
        """What the step shares with other kvp groups; None for nothing."""
        self.merge_s = 0.0
        """Host seconds in merges since it was last set to 0."""
        self._peers: dict[tuple[int, int], SharedMemory | None] = {}

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the tp ranks, in place: the program uses the sum alone."""
        if self._groups.tp is None:
            return x
        self._progress.enter(f"{WAITS} for the tp ranks to add up")
        x = x.contiguous()
        dist.all_reduce(x, group=self._groups.tp)
        self._progress.enter(COMPUTES)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Join of the tp ranks' shares on the last dimension; no rows need no message."""
        group = self._groups.tp
        if group is None:
            return x
        ranks = dist.get_world_size(group)
        if x.numel() == 0:
            return x.new_empty((*x.shape[:-1], ranks * x.shape[-1]))
        self._progress.enter(f"{WAITS} for the tp ranks to join")
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks)]
        dist.all_gather(parts, x.contiguous(), group=group)
        self._progress.enter(COMPUTES)
        return torch.cat(parts, dim=-1)

    def peers(self, slots: int, slot_bytes: int) -> SharedMemory | None:
        """Memory that the tp ranks' kernels share; None where theirs are no GPUs that can.

        Made at the first call with these sizes, which all tp ranks make, as warming up does.
        """
        key, group = (slots, slot_bytes), self._groups.tp
        if key in self._peers:
            return self._peers[key]
        if group is None or dist.get_backend(group) != "nccl":
            return self._peers.setdefault(key, None)
        if torch.cuda.is_current_stream_capturing():
            return None
        self._progress.enter(f"{WAITS} for the tp ranks to share memory")
        self._peers[key] = share(group, slots, slot_bytes)
        self._progress.enter(COMPUTES)
        return self._peers[key]

    def vocab_offset(self, share: int) -> int:
        """First vocabulary row of this rank."""
        return self._groups.place.tp * share

    def merge(self, out_TNH: Tensor, lse_TN: Tensor) -> Tensor:
        """Merge of the kvp groups' partial attention, where the step has rows of several."""
        exchange, group = self.exchange, self._groups.kvp
        if exchange is None or group is None:
            return out_TNH
        self._progress.enter(f"{WAITS} for kvp groups {exchange.peer_names()}")
        started_s = time.perf_counter()
        merged_TNH = exchange.merge(out_TNH, lse_TN, group)
        self.merge_s += time.perf_counter() - started_s
        self._progress.enter(COMPUTES)
        return merged_TNH

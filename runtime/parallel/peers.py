"""Memory that the GPUs of a tp group share, for kernels that are a collective by themselves.

Symmetric memory of torch.distributed: every rank allocates alike, and each maps the others' memory
through NVLink. Links without atomic operations of their own, as PCIe, are left to NCCL: flags are
set by these, and the sizes for which a kernel is used were measured on NVLink. No multicast:
nothing here needs it, and not every machine may use it. All ranks decide alike, so that none waits
in a kernel for a peer that calls NCCL. Whatever is missing, an access, the library, the memory, is
said once, and the collectives of NCCL are used.
"""

import ctypes
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _SymmetricMemory
from torch.distributed._symmetric_memory import rendezvous

NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
"""Environment variable that torch reads when it maps memory."""

NATIVE_ATOMICS = 3
"""CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED of the CUDA driver API: all of them."""
DRIVER = "libcuda.so.1"

_LOG = logging.getLogger(__name__)


@dataclass(kw_only=True)
class SharedMemory:
    """Peers of plans/ops.py."""

    rank: int
    ranks: int
    slots: int
    slot_bytes: int
    buffers: Tensor
    flags: Tensor
    epochs: Tensor
    keeps: Any = None
    """What maps the memory: it is gone with this."""


def addressed(
    addresses: list[int],
    *,
    rank: int,
    slots: int,
    slot_bytes: int,
    device: torch.device,
    keeps: Any = None,
) -> SharedMemory:
    """The peers whose memory, of shared_bytes and zero, begins at these addresses."""
    data_bytes = 2 * slots * slot_bytes
    buffers = torch.tensor(addresses, dtype=torch.int64, device=device)
    return SharedMemory(
        rank=rank,
        ranks=len(addresses),
        slots=slots,
        slot_bytes=slot_bytes,
        buffers=buffers,
        flags=buffers + data_bytes,
        epochs=torch.zeros(slots, dtype=torch.int32, device=device),
        keeps=keeps,
    )


def shared_bytes(ranks: int, slots: int, slot_bytes: int) -> int:
    """Bytes of one rank's memory: two halves of data, and a flag for each slot and rank."""
    return 2 * slots * slot_bytes + 4 * slots * ranks


def share(group: dist.ProcessGroup, slots: int, slot_bytes: int) -> SharedMemory | None:
    """Makes the memory of a group of GPUs, each its process's current one; None on all for none.

    A collective, which waits for the device: not while a CUDA graph is recorded.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    places: list[Any] = [None] * ranks
    dist.all_gather_object(places, (os.uname().nodename, device.index), group=group)
    problem = _unreachable(places, rank)
    memory = handle = None
    if not problem:
        try:
            size = shared_bytes(ranks, slots, slot_bytes)
            memory = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)
            memory.zero_()
            torch.cuda.synchronize(device)
        except Exception as error:  # noqa: BLE001 - of torch or the driver, one as good as another
            problem = _said(error)
    if not _agreed(group, problem, device):  # before anyone waits for the others' memory
        _warn(problem)
        return None
    assert memory is not None, "allocated, or agreed that it is not"
    os.environ.setdefault(NO_MULTICAST, "1")
    try:
        handle = rendezvous(memory, group.group_name)
        if handle.buffer_ptrs[rank] != memory.data_ptr():
            problem = "the addresses are not those of this memory"
    except Exception as error:  # noqa: BLE001 - as above
        problem = _said(error)
    if not _agreed(group, problem, device):
        _warn(problem)
        return None
    assert handle is not None, "met, or agreed that it did not"
    return addressed(
        list(handle.buffer_ptrs),
        rank=rank,
        slots=slots,
        slot_bytes=slot_bytes,
        device=device,
        keeps=(memory, handle),
    )


def _unreachable(places: list[tuple[str, int]], rank: int) -> str:
    """Why this rank's device cannot read a peer's memory; empty where it can."""
    host, own = places[rank]
    for other, (other_host, index) in enumerate(places):
        if other == rank:
            continue
        if other_host != host:
            return f"tp rank {other} is on {other_host}"
        if index >= torch.cuda.device_count() or not torch.cuda.can_device_access_peer(own, index):
            return f"device {own} has no access to the memory of device {index}"
        problem = _no_atomics(own, index)
        if problem:
            return problem
    return ""


def _no_atomics(own: int, other: int) -> str:
    """Why this device cannot do atomic operations on another's memory; empty where it can.

    Asks the driver, as torch has no call for it; both count the devices that the process sees.
    """
    value, source, target = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    try:
        driver = ctypes.CDLL(DRIVER)
        status = (
            driver.cuInit(0)
            or driver.cuDeviceGet(ctypes.byref(source), own)
            or driver.cuDeviceGet(ctypes.byref(target), other)
            or driver.cuDeviceGetP2PAttribute(ctypes.byref(value), NATIVE_ATOMICS, source, target)
        )
    except (OSError, AttributeError) as error:
        return _said(error)
    if status:
        return f"the link of devices {own} and {other} is unknown: CUDA driver error {status}"
    if not value.value:
        return f"the link of devices {own} and {other} has no native atomic operations"
    return ""


def _agreed(group: dist.ProcessGroup, problem: str, device: torch.device) -> bool:
    """Whether no rank of the group has a problem."""
    count = torch.tensor([int(bool(problem))], device=device)
    dist.all_reduce(count, group=group)
    return not count.item()


def _said(error: Exception) -> str:
    reason = str(error).strip().split("\n", maxsplit=1)[0]
    return f"{type(error).__name__}: {reason}"


def _warn(problem: str) -> None:
    _LOG.warning(
        "sums over the tp ranks are left to NCCL: no memory shared with them (%s)",
        problem or "another rank says why",
    )

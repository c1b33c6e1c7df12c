"""Whether ranks share memory is decided once, alike on all of them, and never while recording."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from plans.mesh import Coordinates
from runtime.parallel import groups, peers
from runtime.parallel.groups import Groups, RankComm
from runtime.parallel.progress import Progress
from runtime.parallel.rank import Alone

GROUP = object()


def comm_of(tp: object) -> RankComm:
    place = Coordinates(tp=0, group=0, stage=0, replica=0)
    found = Groups(
        place=place,
        tp=tp,  # type: ignore[arg-type]
        kvp=None,
        before=None,
        after=None,
        kvp_ranks=(0,),
        stage_ranks=(0,),
    )
    return RankComm(found, Progress())


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Stands for the backend of GPUs: what would be shared, call by call."""
    calls: list[tuple] = []
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(groups, "share", lambda *args: (calls.append(args), len(calls))[1])
    return calls


def test_the_same_memory_is_given_at_every_call_of_a_size(made):
    comm = comm_of(GROUP)
    assert [comm.peers(4, 16), comm.peers(4, 32), comm.peers(4, 16)] == [1, 2, 1]
    assert made == [(GROUP, 4, 16), (GROUP, 4, 32)]


def test_nothing_is_made_while_a_graph_is_recorded(made, monkeypatch):
    comm = comm_of(GROUP)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert comm.peers(4, 16) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert comm.peers(4, 16) == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert comm.peers(4, 16) == 1


def test_a_refusal_is_final(made, monkeypatch):
    comm = comm_of(GROUP)
    monkeypatch.setattr(groups, "share", lambda *args: made.append(args))
    assert comm.peers(4, 16) is comm.peers(4, 16) is None
    assert len(made) == 1


@pytest.mark.parametrize("tp", [None, GROUP])
def test_ranks_without_gpus_or_peers_share_nothing(tp, made, monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    assert comm_of(tp).peers(4, 16) is None
    assert Alone().peers(4, 16) is None
    assert made == []


@pytest.mark.parametrize(
    ("places", "rank", "said"),
    [
        ([("a", 0), ("a", 1)], 0, ""),
        ([("a", 0), ("b", 0)], 1, "tp rank 0 is on a"),
        ([("a", 0), ("a", 2)], 0, "no access to the memory of device 2"),  # the link of 0 and 2
        ([("a", 0), ("a", 7)], 0, "no access to the memory of device 7"),  # not seen from here
    ],
)
def test_what_is_out_of_reach_is_named(places, rank, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: other != 2)
    monkeypatch.setattr(peers, "_no_atomics", lambda own, other: "")
    found = peers._unreachable(places, rank)  # noqa: SLF001 - its callers need GPUs
    assert said in found if said else found == ""


class Driver:
    """Stands for CUDA's: the atomic attribute of links, between handles that are no indices."""

    def __init__(self, *, native: int, status: int) -> None:
        self.native, self.status = native, status

    def cuInit(self, flags: int) -> int:  # noqa: N802 - the driver's name
        return 0

    def cuDeviceGet(self, handle: Any, index: int) -> int:  # noqa: N802
        handle._obj.value = 70 + index  # noqa: SLF001 - what byref points at
        return 0

    def cuDeviceGetP2PAttribute(  # noqa: N802
        self, value: Any, attribute: int, source: Any, target: Any
    ) -> int:
        assert (attribute, source.value, target.value) == (3, 70, 71)
        value._obj.value = self.native  # noqa: SLF001
        return self.status


@pytest.mark.parametrize(
    ("native", "status", "said"),
    [
        (1, 0, ""),
        (0, 0, "the link of devices 0 and 1 has no native atomic operations"),
        (1, 101, "CUDA driver error 101"),
    ],
)
def test_a_link_without_atomics_is_out_of_reach(native, status, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: True)
    driver = Driver(native=native, status=status)
    monkeypatch.setattr(peers.ctypes, "CDLL", lambda name: driver)
    found = peers._unreachable([("a", 0), ("a", 1)], 0)  # noqa: SLF001
    assert said in found if said else found == ""


def test_flags_follow_two_halves_of_data():
    memory = torch.zeros(peers.shared_bytes(2, 3, 32), dtype=torch.uint8)
    found = peers.addressed(
        [1000, 9000], rank=1, slots=3, slot_bytes=32, device=torch.device("cpu"), keeps=memory
    )
    assert (found.rank, found.ranks) == (1, 2)
    assert found.buffers.tolist() == [1000, 9000]
    assert found.flags.tolist() == [1000 + 2 * 3 * 32, 9000 + 2 * 3 * 32]
    assert memory.numel() == 2 * 3 * 32 + 4 * 3 * 2
    assert found.epochs.tolist() == [0, 0, 0]


# --- the decision, with a library that stands for the real one ------------------------------------


class Library:
    """Symmetric memory of a group of two on this CPU, that fails where it is told to."""

    def __init__(self, patch: pytest.MonkeyPatch, *, fails: str, other: int) -> None:
        self.fails, self.other, self.met = fails, other, 0
        self.agreed: list[int] = []
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: fails != "access")
        patch.setattr(peers, "_no_atomics", lambda own, other: "")
        patch.setattr(torch, "device", lambda *args: "cpu")
        patch.setattr(dist, "get_rank", lambda group: 0)
        patch.setattr(dist, "get_world_size", lambda group: 2)
        patch.setattr(dist, "all_gather_object", self.gather)
        patch.setattr(dist, "all_reduce", self.reduce)
        patch.setattr(peers, "_SymmetricMemory", self)
        patch.setattr(peers, "rendezvous", self.rendezvous)

    def gather(self, places: list, place: tuple, *, group: object) -> None:
        places[:] = [("here", 0), ("here", 1)]

    def reduce(self, count: torch.Tensor, *, group: object) -> None:
        self.agreed.append(int(count))
        count += int(self.other == len(self.agreed))

    def empty_strided_p2p(self, size, stride, dtype, device) -> torch.Tensor:
        if self.fails == "memory":
            raise RuntimeError("out of memory\nand a trace")
        return torch.full(size, 9, dtype=dtype)

    def rendezvous(self, memory: torch.Tensor, name: str) -> SimpleNamespace:
        self.met += 1
        assert not memory.any(), "flags begin at 0"
        if self.fails == "meeting":
            raise RuntimeError("no such call")
        own = 1 if self.fails == "address" else memory.data_ptr()
        return SimpleNamespace(buffer_ptrs=[own, 4096])


@pytest.mark.parametrize(
    ("fails", "other", "meets", "said"),
    [
        ("", 0, 1, None),
        ("access", 0, 0, "device 0 has no access"),
        ("memory", 0, 0, "RuntimeError: out of memory)"),
        ("", 1, 0, "another rank says why"),
        ("meeting", 0, 1, "no such call"),
        ("address", 0, 1, "addresses are not those"),
        ("", 2, 1, "another rank says why"),
    ],
)
def test_all_ranks_share_or_none_and_the_reason_is_said(
    *, fails, other, meets, said, monkeypatch, caplog
):
    monkeypatch.delenv(peers.NO_MULTICAST, raising=False)
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        library = Library(patch, fails=fails, other=other)
        group = SimpleNamespace(group_name="tp")
        found = peers.share(group, 3, 32)  # type: ignore[arg-type]
    assert library.met == meets
    assert len(library.agreed) == 1 + meets  # as many messages on every rank
    if said is None:
        assert found is not None
        assert found.buffers.tolist()[1] == 4096
        assert caplog.text == ""
    else:
        assert found is None
        assert said in caplog.text
        assert caplog.text.count("\n") == 1

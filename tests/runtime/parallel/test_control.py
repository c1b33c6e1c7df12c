"""The driver's end of the control plane, with peers that the test speaks for."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import torch
import zmq
from builders import make_plan

from plans.codec import content_hash
from plans.errors import MedhaError
from plans.mesh import Parallelism
from runtime.parallel import control, wire
from runtime.parallel.control import Workers

PLAN = make_plan(parallelism=Parallelism(spp=2))


Peer = Callable[[str], "zmq.Socket[bytes]"]


@contextmanager
def listening() -> Iterator[tuple[Workers, Peer]]:
    """A driver, and what connects to it under a name."""
    workers, context = Workers(PLAN, bind="127.0.0.1", host="127.0.0.1"), zmq.Context()
    sockets: list[zmq.Socket[bytes]] = []

    def peer(name: str) -> "zmq.Socket[bytes]":
        sockets.append(context.socket(zmq.DEALER))
        sockets[-1].identity = name.encode()
        sockets[-1].connect(workers.address)
        return sockets[-1]

    try:
        yield workers, peer
    finally:
        context.destroy(linger=0)
        workers.stop()


def heard(workers: Workers, messages: int) -> list[Any]:
    """What comes until so many messages were taken or dropped."""
    found: list[Any] = []
    while len(found) + workers.dropped < messages:
        found += workers.poll(1.0)
    return found


DONE = wire.StageDone(0, 1, 0, 0.0, 0.5, 0.0, {0: 9})


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("rank-0", [b"garbage"]),
        ("rank-0", [b""]),
        ("rank-0", [b"\x93\x63\x00\x00"]),  # a tag that no message has
        ("rank-0", [wire.encode(DONE), b"more"]),
        ("stranger", [wire.encode(DONE)]),
        ("rank-0", [wire.encode(msgspec.structs.replace(DONE, rank=1))]),
        ("beat-0", [wire.encode(DONE)]),
        ("rank-0", [wire.encode(wire.Beat(0, 0, 0, ""))]),
        ("beat-99", [wire.encode(wire.Beat(99, 0, 0, ""))]),
        ("rank--1", [wire.encode(msgspec.structs.replace(DONE, rank=-1))]),
        ("stranger", [wire.encode(wire.Failure(0, 0, "forged"))]),
    ],
)
def test_what_no_rank_has_said_is_dropped_and_counted_and_the_rest_is_heard(name, frames):
    with listening() as (workers, peer):
        peer(name).send_multipart(frames)
        assert heard(workers, 1) == []
        assert workers.dropped == 1
        peer("rank-1").send(wire.encode(wire.Ready(1, 0, "")))
        assert heard(workers, 2) == [wire.Ready(1, 0, "")]


def test_ranks_that_never_finish_loading_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(control, "LOAD_S", 0.0)
    with listening() as (workers, peer):
        sockets = [peer(f"rank-{rank}") for rank in (0, 1)]
        for rank, each in enumerate(sockets):
            hello = wire.Hello(
                rank=rank,
                host=socket.gethostname(),
                pid=os.getpid(),
                ranks=2,
                plan_hash=content_hash(PLAN),
                torch=str(torch.__version__),
                seed=3,
            )
            each.send(wire.encode(hello))
        sockets[0].send(wire.encode(wire.Ready(0, 0, "")))
        with pytest.raises(MedhaError, match=r"ranks \[.*1\] did not finish loading within 0 s"):
            workers.join({}, seed=3)
        assert workers.failed

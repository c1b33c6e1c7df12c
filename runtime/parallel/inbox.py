"""A worker's end of the control plane.

Two threads, each with a socket of its own: the one that works receives steps and sends results, the
other beats. Steps are handed out in step_id order, whatever order they arrive in.
"""

import math
import multiprocessing
import os
import sys
import threading

import zmq

from runtime.parallel import wire
from runtime.parallel.progress import COMPILES, COMPUTES, DEVICE, LOADS, WAITS, Progress

BEAT_S = 0.5
LINGER_MS = 1000
"""How long the last messages of an ending process may take to leave it."""


class Inbox:
    """Receives from the driver and answers it; for the thread that works."""

    def __init__(self, address: str, rank: int) -> None:
        """Connects; the driver may come up later."""
        self._context = zmq.Context()
        self._socket = _socket(self._context, address, f"rank-{rank}")
        self.closing = threading.Event()
        """Set when the context is about to close: the thread that beats closes its own socket."""
        self._early: dict[int, wire.StepMessage] = {}
        self._next_step = 0

    @property
    def context(self) -> "zmq.Context[zmq.Socket[bytes]]":
        """For the socket of the beats."""
        return self._context

    def send(self, message: wire.FromWorker) -> None:
        """To the driver."""
        self._socket.send(wire.encode(message))

    def restart(self) -> None:
        """The next step is step 0."""
        self._early.clear()
        self._next_step = 0

    def receive(self, *, timeout_s: float | None) -> "wire.FromDriver | None":
        """The next message; None where none comes in time. A step only when it is its turn."""
        while True:
            early = self._early.pop(self._next_step, None)
            if early is not None:
                self._next_step += 1
                return early
            # up, as a wait of less than a millisecond would be none at all
            if not self._socket.poll(None if timeout_s is None else math.ceil(timeout_s * 1e3)):
                return None
            message: wire.FromDriver = wire.decode_from_driver(self._socket.recv())
            if not isinstance(message, wire.StepMessage):
                return message
            self._early[message.step_id] = message

    def close(self) -> None:
        """Lets what was sent leave, and closes."""
        self.closing.set()
        self._socket.close(linger=LINGER_MS)
        self._context.term()


def start_beats(inbox: Inbox, address: str, rank: int, progress: Progress, parent: int) -> None:
    """Starts the thread that beats; it ends the process where what started it is gone."""
    arguments = (inbox, address, rank, progress, parent)
    threading.Thread(target=_beat, args=arguments, daemon=True, name="beats").start()


def _beat(inbox: Inbox, address: str, rank: int, progress: Progress, parent: int) -> None:
    socket = _socket(inbox.context, address, f"beat-{rank}")
    while not inbox.closing.is_set():
        beat = wire.Beat(rank, progress.oldest_step, progress.moves, phase_of(progress))
        try:
            socket.send(wire.encode(beat), zmq.NOBLOCK)
        except zmq.Again:  # nobody reads: the next one will say the same
            pass
        except zmq.ZMQError:  # the context is closed: the process ends
            break
        if _is_orphan(parent):
            os._exit(1)
        inbox.closing.wait(BEAT_S)
    socket.close(linger=0)


def _is_orphan(parent: int) -> bool:
    """Whether the process that wanted this one is gone.

    A child of the driver is forked by a server, which may outlive the driver: what tells is the
    pipe that multiprocessing keeps between the two. Under torchrun the parent is the launcher.
    """
    driver = multiprocessing.parent_process()
    return os.getppid() != parent or (driver is not None and not driver.is_alive())


def phase_of(progress: Progress) -> str:
    """The phase, told apart from the compiling of a kernel that its step may be the first to need.

    Found on the stack of the thread that works: a compiler's hooks would be bound to its version.
    """
    if progress.loading:
        return LOADS
    if progress.phase != COMPUTES:
        # with work on the device, waiting for others is what the device does
        waits_there = progress.unfinished is not None and progress.phase.startswith(WAITS)
        return DEVICE if waits_there else progress.phase
    frame = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001 - documented
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("triton.compiler"):
            return COMPILES
        frame = frame.f_back
    return COMPUTES


def _socket(
    context: "zmq.Context[zmq.Socket[bytes]]", address: str, name: str
) -> "zmq.Socket[bytes]":
    socket = context.socket(zmq.DEALER)
    socket.identity = name.encode()
    socket.connect(address)
    return socket

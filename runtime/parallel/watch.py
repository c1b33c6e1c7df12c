"""Notices ranks that are gone, silent or stuck, and says which one it was.

    gone     its process has ended (only of processes that this one started)
    silent   no beat for SILENT_S: stopped, swapped out, or its machine is unreachable
    stuck    steps are in flight and it has computed for stall_s without getting on; if every rank
             waits for others, none gets on, and all of them are named. A step may be the first to
             need a kernel, so its compiler gets more time. Exchanges are work of the devices, so
             one that hangs leaves others with work that does not end: it is the one whose oldest
             step is the lowest, and of the same step the one of the earliest stage

Pure but for the processes: the caller brings the messages and the time.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from plans.mesh import coordinates
from plans.plan import Plan
from runtime.parallel import wire
from runtime.parallel.progress import COMPILES, COMPUTES, DEVICE, IDLE, LOADS

SILENT_S = 3.0
SILENT_LOADING_S = 60.0
"""The same while it loads: a first call of a device's library may hold every thread up."""
STALL_S = 4.0
STALL_STEPS = 20
"""A rank may compute for as long as this many steps of the plan's budget before it counts as stuck:
a slow machine is no failure."""
COMPILE_S = 120.0
"""How long a step may wait for a kernel that a rank compiles."""
FRESH_S = 1.0
"""Without a look at the messages for this long, silence means nothing: they are in the queue."""


class Process(Protocol):
    """What is asked of a process that this one started (multiprocessing's have it)."""

    @property
    def exitcode(self) -> int | None:
        """None while it runs; negative where a signal ended it."""
        ...


@dataclass
class _Rank:
    stage: int
    seen_s: float
    moved_s: float
    moves: int = -1
    step_id: int = -1
    phase: str = LOADS
    where: str = ""


class Watch:
    """State of each rank as its beats tell it."""

    def __init__(
        self, plan: Plan, processes: Mapping[int, Process], now_s: float, *, replica: int = 0
    ) -> None:
        """All ranks of the replica are well at now_s; they count from 0 in every replica."""
        self._first = replica * plan.parallelism.ranks_per_replica
        self._processes = dict(processes)
        mesh = plan.parallelism
        self._ranks = {
            rank: _Rank(coordinates(mesh, rank).stage, now_s, now_s)
            for rank in range(mesh.ranks_per_replica)
        }
        self._stall_s = max(STALL_S, STALL_STEPS * plan.scheduler.idle_budget_s)
        self._looked_s = now_s
        self._busy_since_s: float | None = None
        self._compiled_s = now_s
        """When a rank was last seen to compile, and so to hold others up."""
        self._in_line: tuple[int, int] | None = None
        """Oldest step that a rank is at, and the earliest stage of such ranks."""
        self._in_line_since_s = now_s

    def place(self, hello: wire.Hello) -> None:
        """Notes where a rank runs."""
        self._ranks[hello.rank].where = f" ({hello.host}, pid {hello.pid})"

    def ready(self, number: int) -> None:
        """A rank has loaded: from now on it is to beat in time."""
        self._ranks[number].phase = IDLE

    def beat(self, beat: wire.Beat, now_s: float) -> None:
        """Takes a beat."""
        rank = self._ranks[beat.rank]
        rank.seen_s = now_s
        rank.step_id, rank.phase = beat.step_id, beat.phase
        if beat.moves != rank.moves:
            rank.moves, rank.moved_s = beat.moves, now_s

    def gone(self) -> str | None:
        """The ended processes among those started here."""
        codes = {rank: process.exitcode for rank, process in self._processes.items()}
        ended = {rank: code for rank, code in codes.items() if code is not None}
        if not ended:
            return None
        # one that a signal ended was the first: the others end by themselves, with an error
        killed = {rank: code for rank, code in ended.items() if code < 0} or ended
        return "; ".join(
            f"{self._name(rank)} was killed by signal {-code}"
            if code < 0
            else f"{self._name(rank)} ended with status {code}"
            for rank, code in killed.items()
        )

    def check(self, now_s: float, *, in_flight: bool) -> str | None:
        """What is wrong, if anything; call with every message of the queue taken."""
        gone = self.gone()
        if gone is not None:
            return gone
        if now_s - self._looked_s > FRESH_S:
            for rank in self._ranks.values():
                rank.seen_s = max(rank.seen_s, now_s - FRESH_S)
                rank.moved_s = max(rank.moved_s, now_s - FRESH_S)
        self._looked_s = now_s
        for number, each in self._ranks.items():
            limit_s = SILENT_LOADING_S if each.phase == LOADS else SILENT_S
            if now_s - each.seen_s > limit_s:
                return f"{self._name(number)} sent no sign of life for {limit_s:g} s"
        return self._stuck(now_s, in_flight=in_flight)

    def _stuck(self, now_s: float, *, in_flight: bool) -> str | None:
        if not in_flight:
            self._busy_since_s = self._in_line = None
            return None
        if self._busy_since_s is None:
            self._busy_since_s = now_s
        busy_s = self._busy_since_s
        busy = {
            rank: (each.step_id, each.stage)
            for rank, each in self._ranks.items()
            if each.phase in {COMPUTES, COMPILES, DEVICE}
        }
        first = min(busy.values(), default=None)
        if first != self._in_line:
            self._in_line, self._in_line_since_s = first, now_s
        compiling = [each for each in self._ranks.values() if each.phase == COMPILES]
        if any(now_s - max(each.moved_s, busy_s) < COMPILE_S for each in compiling):
            self._compiled_s = now_s
            return None
        from_s = max(busy_s, self._compiled_s)
        still = {
            rank: now_s - max(each.moved_s, from_s) > self._stall_s
            for rank, each in self._ranks.items()
        }
        # all others may be waiting for the first ones, and these for each other
        stuck = [rank for rank, at in busy.items() if at == first] or list(still)
        if not all(still[rank] for rank in stuck):
            return None
        if not busy:
            return f"no rank got further for {self._stall_s:g} s: {self._at(stuck)}"
        if now_s - self._in_line_since_s <= self._stall_s:
            return None
        return f"{self._names(stuck)} got no further for {self._stall_s:g} s: {self._at(stuck)}"

    def _name(self, rank: int) -> str:
        return f"rank {self._first + rank}{self._ranks[rank].where}"

    def _names(self, ranks: Iterable[int]) -> str:
        return ", ".join(self._name(rank) for rank in ranks)

    def _at(self, ranks: Iterable[int]) -> str:
        states = ((rank, self._ranks[rank]) for rank in ranks)
        return "; ".join(
            f"rank {self._first + rank} {each.phase}, at step {each.step_id}"
            for rank, each in states
        )

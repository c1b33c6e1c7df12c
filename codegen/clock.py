"""How kernels are timed: as nodes of a CUDA graph, data not in L2, medians of rounds.

A call in a graph costs what it costs in a recorded step, without the host's launch. The calls of
a graph work on different copies of their data, several times the size of L2 in sum.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Microseconds of one call."""

    us: float
    """Median of the rounds."""
    spread_us: float
    """Of the middle three fifths of them."""


class Clock(Protocol):
    """Times groups of calls against each other."""

    def __call__(self, groups: Sequence[Sequence[Call]]) -> list[Timing]:
        """Time of one call of each group; the groups take turns, so that a drift hits all."""
        ...


def summary(us: Sequence[float]) -> Timing:
    """Median and spread of the rounds of one group."""
    ordered = sorted(us)
    low, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return Timing(us=statistics.median(ordered), spread_us=high - low)


class GraphClock:
    """The clock of a CUDA device."""

    def __init__(self, *, rounds: int = 9, most_s: float = 0.25, heat_s: float = 0.0) -> None:
        """Takes what it is worth to know a time.

        rounds  at least 3, fewer where a group takes longer than most_s in sum
        heat_s  each group runs as long before it is timed: a chip that its power limits is fast for
                the first tenths of a second, which no long prompt sees
        """
        self._rounds = rounds
        self._most_s = most_s
        self._heat_s = heat_s

    def __call__(self, groups: Sequence[Sequence[Call]]) -> list[Timing]:
        """Records a graph for each group and replays them in turn."""
        graphs = [_recorded(calls) for calls in groups]
        times: list[list[float]] = [[] for _ in groups]
        for graph in graphs:
            _heat(graph, self._heat_s)
        began_s = time.perf_counter()
        for number in range(self._rounds):
            for at in range(len(groups)) if number % 2 == 0 else reversed(range(len(groups))):
                times[at].append(_replayed_us(graphs[at]) / len(groups[at]))
            if number >= 2 and time.perf_counter() - began_s > self._most_s * len(groups):
                break
        return [summary(each) for each in times]


def _recorded(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph of the calls, replayed once to warm it."""
    calls[0]()  # compiles, and builds what an op keeps for a step
    for call in calls[1:]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _heat(graph: torch.cuda.CUDAGraph, seconds: float) -> None:
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < seconds:
        _replayed_us(graph)


def _replayed_us(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * float(start.elapsed_time(end))


def host_us(call: Call, calls: int = 50) -> float:
    """Microseconds that the host needs to launch a call, the device not waited for: best of 5."""
    call()
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - began) * 1e6 / calls)
    torch.cuda.synchronize()
    return best

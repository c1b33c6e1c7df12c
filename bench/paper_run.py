"""Serves one load under one policy by one of two protocols, and condenses it to a row.

fair      open loop; TTFT from the scheduled arrival; served until DRAIN_S after the window, and
          whatever has not finished by then is late, its times infinite
harness   as the authors' harness measures: at most 100 requests in flight, the clock of a
          request starts when it is sent, the run ends with the window, and only what has
          completed is counted
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import Struct

from bench.paper_setup import WINDOW_S, mix_file
from plans.chunks import WorkTable
from plans.plan import Plan
from runtime.arrivals import Load, offer
from runtime.clock import VirtualClock
from runtime.engine import Engine
from runtime.executor.simulated import SimulatedExecutor
from runtime.metrics import mean_tbt_s, met_slo, spread
from runtime.request import Record, Request
from runtime.scheduler import Scheduling, load_policy

Protocol = Literal["fair", "harness"]
DRAIN_S = 600.0
"""More than three times the longest deadline of the mixes (165 s), and the longest answer after."""
IN_FLIGHT = 100
"""10 client processes of 10 threads each."""
QUANTITIES = ("ttft", "e2e", "tpot")
CLASSES = ("short", "long", "all")


class Case(Struct, frozen=True, kw_only=True):
    """One run: everything that decides its outcome, beside the plan."""

    protocol: Protocol
    mix: int
    qps: float
    policy: str
    seed: int
    window_s: float = WINDOW_S


class Outcome(Struct, frozen=True, kw_only=True):
    """A case and what came of it; times in seconds, infinite where they never came."""

    case: Case
    offered: int
    sent: int
    """Requests that left the client; fewer than offered in the harness alone."""
    load: float
    """Predicted lone prefill seconds offered a second: above 1 no order can serve it."""
    classes: dict[str, dict[str, float]]
    """Class to figure: requests, finished, attained (TTFT in time), met (TTFT and TPOT), and
    p50, p90, p99, mean of each of QUANTITIES."""
    gaps_p99_s: float
    """Of all gaps between two tokens."""
    steps: int
    evictions: int
    wall_s: float


class _Window:
    """Observer that lets the next request out when one has ended."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.engine: Engine | None = None
        self.sent: list[Request] = []
        self._queue = deque(requests)

    def send(self, now_s: float) -> None:
        """The head of the queue leaves at its time, or now where that has passed."""
        if self._queue and self.engine is not None:
            request = self._queue.popleft()
            sent = msgspec.structs.replace(request, arrival_s=max(request.arrival_s, now_s))
            self.sent.append(sent)
            self.engine.add(sent)

    def arrived(self, sequence: Any, now_s: float) -> None:
        """Nothing to do."""

    def submitted(self, step: Any, now_s: float) -> None:
        """Nothing to do."""

    def collected(self, result: Any) -> None:
        """Nothing to do."""

    def ended(self, record: Record, now_s: float) -> None:
        """A thread of the client is free."""
        self.send(now_s)


def run_case(
    plan: Plan,
    case: Case,
    traces: Path,
    *,
    scheduling: Scheduling | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[Outcome, list[Record]]:
    """Serves a case; `scheduling` replaces the policy of that name, for trials.

    progress  hears the virtual time now and then
    """
    started_s = time.perf_counter()
    load = Load(qps=case.qps, duration_s=case.window_s, seed=case.seed)
    offered = offer(
        mix_file(traces, case.mix), load, context_tokens=plan.limits.context_tokens
    ).requests
    window = _Window(offered)
    clock = VirtualClock()
    engine = Engine(
        plan,
        SimulatedExecutor(plan, clock),
        clock,
        scheduling or load_policy(case.policy, plan.scheduler),
        observer=window if case.protocol == "harness" else None,
    )
    if case.protocol == "harness":
        window.engine = engine
        for _ in range(IN_FLIGHT):
            window.send(0.0)
        stop_s = case.window_s
    else:
        for request in offered:
            engine.add(request)
        stop_s = case.window_s + DRAIN_S
    next_s = 0.0
    while engine.tick(stop_s):
        if progress is not None and clock.now_s() >= next_s:
            next_s = clock.now_s() + 60.0
            progress(clock.now_s())
    window.engine = None
    engine.close()
    finished = [each for each in engine.records if each.finished]
    if case.protocol == "harness":
        sent = [each for each in window.sent if each.arrival_s < case.window_s]
        counted = [each.request for each in finished]
    else:
        sent = list(offered)
        counted = sent
    gaps_s = np.concatenate([np.array(drawn) for drawn in engine.gaps.values()])
    work = WorkTable(plan.prefill.chunks, plan.step_time, plan.kv.tokens_per_kvp_shard)
    outcome = Outcome(
        case=case,
        offered=len(offered),
        sent=len(sent),
        load=sum(work.solo_s(each.prompt_tokens) for each in offered) / case.window_s,
        classes=_classes(plan, counted, engine.records),
        gaps_p99_s=spread(gaps_s).p99 or 0.0,
        steps=engine.book.steps,
        evictions=sum(each.evictions for each in engine.records),
        wall_s=time.perf_counter() - started_s,
    )
    return outcome, list(engine.records)


def _classes(
    plan: Plan, counted: Sequence[Request], records: Sequence[Record]
) -> dict[str, dict[str, float]]:
    by_number = {each.request.number: each for each in records}
    long_tokens = plan.scheduler.long_tokens
    split = {
        "short": [each for each in counted if each.prompt_tokens < long_tokens],
        "long": [each for each in counted if each.prompt_tokens >= long_tokens],
        "all": list(counted),
    }
    return {
        name: _figures(plan, [by_number[each.number] for each in requests])
        for name, requests in split.items()
    }


def _figures(plan: Plan, records: Sequence[Record]) -> dict[str, float]:
    count = len(records)
    finished = [each for each in records if each.finished]
    never = [float("inf")] * (count - len(finished))
    samples = {
        "ttft": [each.ttft_s for each in records],
        "e2e": [each.finished_s - each.request.arrival_s for each in finished] + never,
        "tpot": [mean_tbt_s(each) for each in finished],
    }
    figures: dict[str, float] = {"requests": count, "finished": len(finished)}
    if count:
        attained = sum(each.ttft_s <= each.deadline_s for each in records)
        figures["attained"] = attained / count
        figures["met"] = sum(met_slo(each, plan.targets) for each in records) / count
    for name, values in samples.items():
        drawn = spread(np.array(values, dtype=np.float64))
        for figure in ("p50", "p90", "p99", "mean"):
            value = getattr(drawn, figure)
            if value is not None:
                figures[f"{name}_{figure}"] = value
    return figures

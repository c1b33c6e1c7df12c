"""Serves requests in virtual time: the engine over the simulated executor, for every replica."""

import time
from array import array
from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct

from plans.chunks import WorkTable
from plans.plan import Plan
from runtime.clock import VirtualClock
from runtime.engine import Engine, Log, Observer
from runtime.executor.base import Floats
from runtime.executor.simulated import SimulatedExecutor
from runtime.request import Record, Request
from runtime.scheduler import load_policy

Observe = Callable[[int], Observer | None]
"""The observer of a replica, by its number."""

MakeExecutor = Callable[[Plan, VirtualClock], SimulatedExecutor]
"""The executor of a replica, over its clock."""


class Run(Struct, frozen=True, kw_only=True):
    """What came of it, replicas together."""

    records: tuple[Record, ...]
    short_gaps_s: Floats
    """Every gap between two tokens of a short request."""
    long_gaps_s: Floats
    wall_s: float
    """Real seconds that the simulation took."""


def simulate(
    plan: Plan,
    requests: Sequence[Request],
    policy: str,
    *,
    observe: Observe | None = None,
    log: Log | None = None,
    executor: MakeExecutor = SimulatedExecutor,
) -> Run:
    """Serves all requests to their end.

    policy    NAME or NAME,chunk=N, as scheduler.load_policy reads it
    log       of the decisions of the first replica
    executor  where steps take another time than the plan's formula says
    errors    UnknownName or UsageError for the policy; Refused for a request beyond the limits
    """
    started_s = time.perf_counter()
    scheduling = load_policy(policy, plan.scheduler)
    records: list[Record] = []
    gaps: dict[str, array[float]] = {"short": array("d"), "long": array("d")}
    for replica, share in enumerate(assign(plan, requests)):
        clock = VirtualClock()
        engine = Engine(
            plan,
            executor(plan, clock),
            clock,
            scheduling,
            observer=None if observe is None else observe(replica),
            log=log if replica == 0 else None,
        )
        for request in share:
            engine.add(request)
        engine.run()
        engine.close()
        records += engine.records
        for name, drawn in engine.gaps.items():
            gaps[name].extend(drawn)
    return Run(
        records=tuple(records),
        short_gaps_s=np.array(gaps["short"]),
        long_gaps_s=np.array(gaps["long"]),
        wall_s=time.perf_counter() - started_s,
    )


def assign(plan: Plan, requests: Sequence[Request]) -> list[list[Request]]:
    """Requests of each replica: each goes where the least predicted prefill seconds are left.

    Admission knows predictions and not how far an engine has come, so a replica is taken to work
    off its prefills one after the other. Between equals the one that was given less so far: decodes
    pile up where requests went, and prefill seconds do not see them.
    """
    replicas = plan.parallelism.replicas
    shares: list[list[Request]] = [[] for _ in range(replicas)]
    if replicas == 1:
        return [list(requests)]
    work = WorkTable(plan.prefill.chunks, plan.step_time, plan.kv.tokens_per_kvp_shard)
    free_s = [0.0] * replicas
    for request in requests:
        pending_s = [max(each - request.arrival_s, 0.0) for each in free_s]
        replica = min(range(replicas), key=lambda each: (pending_s[each], len(shares[each])))
        free_s[replica] = (
            request.arrival_s + pending_s[replica] + work.solo_s(request.prompt_tokens)
        )
        shares[replica].append(request)
    return shares

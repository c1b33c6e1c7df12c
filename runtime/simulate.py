"""Serves requests in virtual time: the engine over the simulated executor, for every replica.

The engine is the live one, and so is what it is made with: where the plan's executor feeds tokens
back, steps are packed ahead and the formula is corrected by what steps took.
"""

import time
from array import array
from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct

from plans.chunks import WorkTable
from plans.plan import Plan
from runtime.clock import VirtualClock
from runtime.engine import Engine, Log, Observer
from runtime.executor.ahead import keeps_ahead
from runtime.executor.base import Floats
from runtime.executor.simulated import AheadExecutor, SimulatedExecutor
from runtime.request import Record, Request
from runtime.scheduler import PACKER, load_policy

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
    executor: MakeExecutor | None = None,
) -> Run:
    """Serves all requests to their end.

    policy    NAME or NAME,chunk=N, as scheduler.load_policy reads it
    log       of the decisions of the first replica
    executor  where steps take another time than the plan's formula says; None for the plan's own
    errors    UnknownName or UsageError for the policy; Refused for a request beyond the limits
    """
    started_s = time.perf_counter()
    records: list[Record] = []
    gaps: dict[str, array[float]] = {"short": array("d"), "long": array("d")}
    for replica, share in enumerate(assign(plan, requests)):
        clock = VirtualClock()
        engine = engine_of(
            plan,
            policy,
            clock,
            executor=None if executor is None else executor(plan, clock),
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


def packs_ahead(plan: Plan, policy: str) -> bool:
    """Whether a simulation packs a step while one runs, as the plan's live executor does.

    Re-creations of other engines do not: those engines were measured, and they were held against
    that, without it.
    """
    return keeps_ahead(plan) and load_policy(policy, plan.scheduler).composer == PACKER


def engine_of(
    plan: Plan,
    policy: str,
    clock: VirtualClock,
    *,
    executor: SimulatedExecutor | None = None,
    observer: Observer | None = None,
    log: Log | None = None,
) -> Engine:
    """An engine in virtual time, over the executor that the policy's steps would have live."""
    if executor is None:
        kind = AheadExecutor if packs_ahead(plan, policy) else SimulatedExecutor
        executor = kind(plan, clock)
    return Engine(
        plan,
        executor,
        clock,
        load_policy(policy, plan.scheduler),
        observer=observer,
        log=log,
        learn=executor.feeds_back,
        ahead=executor.feeds_back,
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

"""Who goes next (policies, a file each) and how a step is filled (pack.py)."""

import pkgutil
from dataclasses import dataclass

from plans.errors import UnknownName, UsageError
from plans.plan import Scheduler
from runtime.scheduler.policy import Policy

POLICIES = {
    "fcfs": "runtime.scheduler.fcfs:Fcfs",
    "lars": "runtime.scheduler.lars:Lars",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduling:
    """A policy by name, ready to use."""

    name: str
    policy: Policy
    chunk_tokens: int | None
    """Static token budget of a step instead of the time budget (`--policy fcfs,chunk=512`)."""


def load_policy(spec: str, scheduler: Scheduler) -> Scheduling:
    """Reads NAME or NAME,chunk=N; raises UnknownName or UsageError."""
    name, _, options = spec.partition(",")
    if name not in POLICIES:
        raise UnknownName("scheduling policy", name, POLICIES)
    chunk_tokens = None
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key != "chunk" or not value.isdecimal() or int(value) < 1:
            raise UsageError(f"--policy {spec}: option {option!r} is not chunk=N with N >= 1")
        chunk_tokens = int(value)
    factory = pkgutil.resolve_name(POLICIES[name])
    policy = factory(max_yield=scheduler.max_yield) if name == "lars" else factory()
    return Scheduling(name=spec, policy=policy, chunk_tokens=chunk_tokens)

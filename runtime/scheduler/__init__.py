"""Who goes next (policies, a file each) and how a step is filled (pack.py, engines/).

`NAME` orders requests for our packer. `NAME@ENGINE` composes whole steps as that engine does, for
comparison only: then a peer is beaten by the policy and not by the packer alone.
"""

import math
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field

from plans.errors import UnknownName, UsageError
from plans.plan import Scheduler
from runtime.scheduler.policy import Policy

POLICIES = {
    "edf": "runtime.scheduler.edf:Edf",
    "fcfs": "runtime.scheduler.fcfs:Fcfs",
    "fcfs-whole": "runtime.scheduler.fcfs:Fcfs",
    "hrrn": "runtime.scheduler.hrrn:Hrrn",
    "lars": "runtime.scheduler.lars:Lars",
    "lars-lanes": "runtime.scheduler.lars_lanes:LarsLanes",
    "lars-paper": "runtime.scheduler.lars_paper:LarsPaper",
    "lrs": "runtime.scheduler.lrs:Lrs",
    "slack": "runtime.scheduler.slack:Slack",
    "slack-remaining": "runtime.scheduler.slack_remaining:SlackRemaining",
    "srpt": "runtime.scheduler.srpt:Srpt",
    "threshold": "runtime.scheduler.fcfs:Fcfs",
    "turns": "runtime.scheduler.turns:Turns",
}
ENGINES = {
    "fcfs@vllm": "runtime.scheduler.engines.vllm:VllmSteps",
    "hrrn@sglang": "runtime.scheduler.engines.sglang:SglangSteps",
    "threshold@vllm": "runtime.scheduler.engines.vllm:VllmSteps",
    "turns@lmdeploy": "runtime.scheduler.engines.lmdeploy:LmdeploySteps",
}
PACKER = "runtime.scheduler.pack:Packer"

OPTIONS = {
    "fcfs@vllm": ("ahead", "chunk"),
    "fcfs-whole": (),
    "hrrn@sglang": ("chunk", "mixed"),
    "srpt": ("aging", "chunk"),
    "threshold": ("chunk", "threshold"),
    "threshold@vllm": ("adaptive", "ahead", "always", "chunk", "threshold"),
}
"""Options of a name; a name that is not here takes `chunk` alone."""
FORMS = {
    "adaptive": "adaptive",
    "ahead": "ahead",
    "aging": "aging=R with R >= 0",
    "always": "always",
    "chunk": "chunk=N with N >= 1",
    "mixed": "mixed",
    "threshold": "threshold=N with N >= 1",
}
"""How an option is written; a bare word is a switch."""
ENGINE_TOKENS = 8192
"""Tokens of a step of vLLM on H100 and H200, of SGLang and of LMDeploy, where none are given."""
THRESHOLD_STEP_TOKENS = 2048
THRESHOLD_TOKENS = 1024
"""vLLM leaves the threshold off; the two are the pair that was tuned on an H200 for mixed load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduling:
    """A policy by name, ready to use."""

    name: str
    policy: Policy
    chunk_tokens: int | None
    """Static token budget of a step instead of the time budget (`--policy fcfs,chunk=512`)."""
    request_tokens: int | None = None
    """Most tokens of one request in a step while others are there."""
    one_prompt: bool = False
    """Prompts run one at a time, each to its end."""
    composer: str = PACKER
    """What composes the steps: the path of a class for compose.py."""
    options: Mapping[str, float] = field(default_factory=dict)
    """Options by name, a switch as 1."""


def load_policy(spec: str, scheduler: Scheduler) -> Scheduling:
    """Reads NAME[,option...] as in POLICIES, ENGINES and OPTIONS.

    scheduler  the plan's: its max_yield, and the max_step_tokens that no step may exceed
    errors     UnknownName; UsageError for an option that the name does not take or a wrong value
    """
    name, *texts = spec.split(",")
    if name not in POLICIES and name not in ENGINES:
        raise UnknownName("scheduling policy", name, [*POLICIES, *ENGINES])
    options = _options(spec, name, texts)
    step_tokens = options.get("chunk")
    if step_tokens is not None and step_tokens > scheduler.max_step_tokens:
        raise UsageError(
            f"--policy {spec}: chunk={step_tokens:.0f} exceeds the max_step_tokens of the plan; "
            f"nearest: chunk={scheduler.max_step_tokens}"
        )
    ordering = name.partition("@")[0]
    if step_tokens is None and name in ENGINES:
        wanted = THRESHOLD_STEP_TOKENS if ordering == "threshold" else ENGINE_TOKENS
        step_tokens = min(wanted, scheduler.max_step_tokens)
    elif name == "fcfs-whole":
        step_tokens = scheduler.max_step_tokens
    threshold = options.get("threshold", THRESHOLD_TOKENS) if ordering == "threshold" else None
    return Scheduling(
        name=spec,
        policy=_policy(name, options, scheduler, step_tokens),
        chunk_tokens=None if step_tokens is None else int(step_tokens),
        request_tokens=None if threshold is None else int(threshold),
        one_prompt=name == "fcfs-whole",
        composer=ENGINES.get(name, PACKER),
        options=options,
    )


def _policy(
    name: str, options: Mapping[str, float], scheduler: Scheduler, step_tokens: float | None
) -> Policy:
    ordering = name.partition("@")[0]
    factory = pkgutil.resolve_name(POLICIES[ordering])
    policy: Policy
    if ordering in {"lars", "lars-paper"}:
        policy = factory(max_yield=scheduler.max_yield)
    elif ordering == "srpt":
        policy = factory(aging=options.get("aging", 0.0))
    elif name == "turns@lmdeploy" and step_tokens is not None:
        policy = factory(long_tokens=int(step_tokens))
    else:
        policy = factory()
    return policy


def _options(spec: str, name: str, texts: list[str]) -> dict[str, float]:
    known = OPTIONS.get(name, ("chunk",))
    found: dict[str, float] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if key not in known:
            takes = "; ".join(FORMS[each] for each in known) or "no options"
            raise UsageError(f"--policy {spec}: {text!r} is no option; {name} takes {takes}")
        number = 1.0 if FORMS[key] == key and not equals else _number(key, value)
        if number is None:
            raise UsageError(f"--policy {spec}: option {text!r} is not {FORMS[key]}")
        if key in found:
            raise UsageError(f"--policy {spec}: option {key} is given twice")
        found[key] = number
    return found


def _number(key: str, text: str) -> float | None:
    """The value of an option; None where it is wrong."""
    if FORMS[key] == key:
        return None
    if key == "aging":
        try:
            rate = float(text)
        except ValueError:
            return None
        return rate if math.isfinite(rate) and rate >= 0 else None
    whole = text.isascii() and text.isdecimal() and int(text) >= 1
    return float(text) if whole else None

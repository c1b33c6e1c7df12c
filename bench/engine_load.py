"""The loads of bench/engine_gpu.py, what came of one, and the same in virtual time.

A load is a list of arrivals; the live engine and the simulated one are given the same, and one
observer takes down both, so that figures of both come from the same few lines. No torch here:
bench/prediction_error.py predicts the loads again where there is none.
"""

import csv
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from plans.plan import Plan
from runtime.clock import VirtualClock
from runtime.executor.ahead import keeps_ahead
from runtime.executor.base import Step, StepResult
from runtime.executor.simulated import AheadExecutor, Host, SimulatedExecutor
from runtime.request import Record, Request
from runtime.request import Sequence as Live
from runtime.scheduler import pack
from runtime.scheduler.loads import GroupLoads
from runtime.simulate import simulate

NEW_TOKENS = 64
SHORT = 1000
BURST = 256
RATE_RPS = 4.0
LOAD_S = 60.0
LONG_AT_S = 5.0
POLL_S = 5e-5
"""As runtime/executor/live.py looks at what the device is at."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """One request: when it arrives, and its prompt."""

    at_s: float
    tokens: int
    seed: int
    """Of its prompt."""


PACKED = "with a tile"
"""How the packer cuts chunks; results without a word on it are of before, when they ended anywhere
in a tile of queries."""


@contextmanager
def packed_as(how: str) -> Iterator[None]:
    """The packer as it was in a run that says `how` its chunks end."""
    kept = pack._whole_queries  # noqa: SLF001 - the one rule that came between
    if how != PACKED:
        pack._whole_queries = lambda tile, prefix, tokens: tokens  # noqa: SLF001
    try:
        yield
    finally:
        pack._whole_queries = kept  # noqa: SLF001


def burst_load(count: int = BURST) -> list[Ask]:
    """All at once."""
    return [Ask(0.0, SHORT, seed) for seed in range(count)]


def mixed_load(seed: int, long_tokens: int, duration_s: float = LOAD_S) -> list[Ask]:
    """Short prompts at random times; the last one is long."""
    draw = np.random.default_rng(seed)
    arrivals = np.cumsum(draw.exponential(1 / RATE_RPS, int(2 * RATE_RPS * LOAD_S)))
    shorts = [
        Ask(float(at_s), SHORT, 1000 + number)
        for number, at_s in enumerate(arrivals[arrivals < duration_s])
    ]
    return [*shorts, Ask(min(LONG_AT_S, duration_s / 2), long_tokens, seed)]


@dataclass
class StepLog:
    """Observer: every step with what it held and took, and every request's token times."""

    plan: Plan
    steps: list[Row] = field(default_factory=list)
    times: dict[int, list[float]] = field(default_factory=dict)
    """Clock at each token, by request."""
    host: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Seconds to decide and to launch a step, by its number; the server of a live run fills it."""
    _packed: dict[int, float] = field(default_factory=dict)

    def arrived(self, sequence: Live, now_s: float) -> None:
        """Nothing to note."""

    def submitted(self, step: Step, now_s: float) -> None:
        """When it was packed."""
        self._packed[step.step_id] = now_s

    def collected(self, result: StepResult) -> None:
        """A row, and a time for every token."""
        step = result.step
        loads = GroupLoads(
            self.plan.step_time,
            groups=self.plan.parallelism.kvp,
            shard_tokens=self.plan.kv.tokens_per_kvp_shard,
        )
        loads.add_step(step)
        decide_s, submit_s = self.host.pop(step.step_id, (math.nan, math.nan))
        self.steps.append(
            {
                "step": step.step_id,
                "decodes": len(step.decodes),
                "decode_kv_tokens": int(step.decode_prefix.sum()) + len(step.decodes),
                "chunk_tokens": sum(chunk.tokens for chunk in step.chunks),
                "chunks": " ".join(f"{chunk.tokens}@{chunk.prefix}" for chunk in step.chunks),
                "plan_ms": 1e3 * loads.seconds(),
                "device_ms": 1e3 * sum(result.stage_s),
                "decide_ms": 1e3 * decide_s,
                "submit_ms": 1e3 * submit_s,
                "packed_s": self._packed.pop(step.step_id, math.nan),
                "ended_s": result.finished_s,
            }
        )
        sampling = [chunk.request for chunk in step.chunks if chunk.samples]
        for number in (*step.decodes.tolist(), *sampling):
            self.times.setdefault(number, []).append(result.finished_s)

    def ended(self, record: Record, now_s: float) -> None:
        """Nothing to note."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a load; seconds from its start."""

    load: Sequence[Ask]
    times: Sequence[Sequence[float]]
    """Of the tokens of each request, in the load's order."""
    steps: Sequence[Row]

    def ttft_s(self) -> list[float]:
        """Of each request."""
        return [times[0] - ask.at_s for ask, times in zip(self.load, self.times, strict=True)]

    def gaps_s(self, tokens: int) -> list[float]:
        """Between two tokens of requests with such a prompt."""
        return [
            gap
            for ask, times in zip(self.load, self.times, strict=True)
            if ask.tokens == tokens
            for gap in np.diff(np.array(times)).tolist()
        ]

    def seconds(self) -> float:
        """Until the last token."""
        return max(times[-1] for times in self.times)

    def sums(self) -> Row:
        """Steps, and what they are predicted to take and took."""
        return {
            "steps": len(self.steps),
            "plan_s": sum(each["plan_ms"] for each in self.steps) / 1e3,
            "device_s": sum(each["device_ms"] for each in self.steps) / 1e3,
        }


def burst_row(outcome: Outcome) -> Row:
    """Figures of a burst."""
    ttft, gaps, seconds = outcome.ttft_s(), outcome.gaps_s(SHORT), outcome.seconds()
    tokens = sum(ask.tokens + NEW_TOKENS for ask in outcome.load)
    return {
        "requests": len(outcome.load),
        "chunks_end": PACKED,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "ttft_p50_s": percentile(ttft, 0.5),
        "ttft_p99_s": percentile(ttft, 0.99),
        "tbt_p50_ms": 1e3 * percentile(gaps, 0.5),
        "tbt_p99_ms": 1e3 * percentile(gaps, 0.99),
        **outcome.sums(),
    }


def mixed_row(outcome: Outcome) -> Row:
    """Figures of a mixed load."""
    *ttft, long_s = outcome.ttft_s()
    gaps = outcome.gaps_s(SHORT)
    return {
        "shorts": len(ttft),
        "chunks_end": PACKED,
        "long_tokens": outcome.load[-1].tokens,
        "short_ttft_p50_s": percentile(ttft, 0.5),
        "short_ttft_p90_s": percentile(ttft, 0.9),
        "short_ttft_p99_s": percentile(ttft, 0.99),
        "tbt_p50_ms": 1e3 * percentile(gaps, 0.5),
        "tbt_p90_ms": 1e3 * percentile(gaps, 0.9),
        "tbt_p99_ms": 1e3 * percentile(gaps, 0.99),
        "tbt_max_ms": 1e3 * max(gaps),
        "long_ttft_s": long_s,
        "seconds": outcome.seconds(),
        **outcome.sums(),
    }


def with_budget(plan: Plan, budget_s: float) -> Plan:
    """The plan with steps of another length while others decode.

    A step is also held to the time between tokens that the plan aims at, of which the planner makes
    the budget a fixed share: both move.
    """
    idle_s = max(plan.scheduler.idle_budget_s, budget_s)
    tbt_s = plan.targets.tbt_s * (budget_s / plan.scheduler.step_budget_s)
    return replace(
        plan,
        targets=replace(plan.targets, tbt_s=tbt_s),
        scheduler=replace(plan.scheduler, step_budget_s=budget_s, idle_budget_s=idle_s),
    )


# --- in virtual time ------------------------------------------------------------------------------

MakeExecutor = Callable[[Plan, VirtualClock], SimulatedExecutor]


class Scaled(AheadExecutor):
    """Steps that take so many times what the plan says: those with chunks, and decodes alone."""

    def __init__(
        self, plan: Plan, clock: VirtualClock, *, host: Host, chunks: float, decodes: float
    ) -> None:
        super().__init__(plan, clock, host=host)
        self._chunks, self._decodes = chunks, decodes

    def stages_s(self, step: Step) -> tuple[float, ...]:
        """The plan's seconds, scaled."""
        share = self._chunks if step.chunks else self._decodes
        return tuple(share * seconds for seconds in super().stages_s(step))


def predicted(
    plan: Plan, load: Sequence[Ask], policy: str, executor: MakeExecutor | None = None
) -> Outcome:
    """The load served in virtual time; executor None is what the plan's own replays run on."""
    log = StepLog(plan)
    requests = [
        Request(number=number, arrival_s=ask.at_s, prompt_tokens=ask.tokens, max_tokens=NEW_TOKENS)
        for number, ask in enumerate(load)
    ]
    simulate(plan, requests, policy, observe=lambda _: log, executor=executor)
    return Outcome(
        load=load, times=[log.times[number] for number in range(len(load))], steps=log.steps
    )


PREDICTED, BY_PLAN = "predicted", "by the plan alone"
BY_HOST, BY_RUN = "host put in", "host and step times put in"
"""What is known: the plan and what the host takes for lone prompts; the plan; what the host takes
in this run; and how much longer its steps take than the plan says."""


def predictions(
    plan: Plan, load: Sequence[Ask], measured: Outcome, policy: str, lone: Host
) -> Iterable[tuple[str, Outcome]]:
    """The load predicted, and with what this run showed put in, one after the other.

    What is left between the last of them and the measurement is neither the step formula nor the
    launches: the queue, or what differs from step to step. Only the first two are predictions.
    """
    yield PREDICTED, predicted(plan, load, policy, with_host(plan, lone))
    yield BY_PLAN, predicted(plan, load, policy)
    if keeps_ahead(plan):
        host = host_of(measured.steps)
        yield BY_HOST, predicted(plan, load, policy, with_host(plan, host))
        chunks, decodes = shares_of(measured.steps)
        scaled = functools.partial(Scaled, host=host, chunks=chunks, decodes=decodes)
        yield BY_RUN, predicted(plan, load, policy, scaled)


def with_host(plan: Plan, host: Host) -> MakeExecutor | None:
    """Makes the executor with the host's times; None, the plan's own, where there is none ahead."""
    return functools.partial(AheadExecutor, host=host) if keeps_ahead(plan) else None


def host_of(steps: Sequence[Row], most_tokens: float = math.inf) -> Host:
    """Median host times of a run's steps with chunks of at most so many tokens; 0 for none."""
    known = [each for each in steps if not math.isnan(each["submit_ms"])]

    def median_s(name: str, chosen: Iterable[Row]) -> float:
        values = [each[name] for each in chosen]
        return median(values) / 1e3 if values else 0.0

    chunked = (each for each in known if each["chunks"] and each["chunk_tokens"] <= most_tokens)
    return Host(
        decide_s=median_s("decide_ms", known),
        chunk_s=median_s("submit_ms", chunked),
        decode_s=median_s("submit_ms", (each for each in known if not each["chunks"])),
        poll_s=POLL_S,
    )


def shares_of(steps: Sequence[Row]) -> tuple[float, float]:
    """Device over predicted time of all steps with chunks, and of all decodes."""

    def share(chosen: Sequence[Row]) -> float:
        plan_ms = sum(each["plan_ms"] for each in chosen)
        return sum(each["device_ms"] for each in chosen) / plan_ms if plan_ms else 1.0

    chunked = [each for each in steps if each["chunks"]]
    return share(chunked), share([each for each in steps if not each["chunks"]])


# --- files ----------------------------------------------------------------------------------------


def write_steps(path: Path, steps: Sequence[Row]) -> None:
    """All steps of all loads, one a line."""
    if not steps:
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(steps[0]), lineterminator="\n")
        writer.writeheader()
        for step in steps:
            short = {
                name: f"{value:.6g}" if isinstance(value, float) else value
                for name, value in step.items()
            }
            writer.writerow(short)


def median(values: Sequence[float]) -> float:
    """Or NaN for none."""
    return float(np.median(values)) if values else math.nan


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; NaN for none."""
    return float(np.quantile(values, share, method="inverted_cdf")) if values else math.nan

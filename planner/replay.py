"""Replays a plan in virtual time: the runtime's own loop and policy over the simulated executor.

Queueing, percentiles and goodput come from here and from no formula. A plan of one GPU is replayed
with a step packed ahead, as it runs live. One replica is run, with its share of the arrivals;
replicas are independent and alike. Lengths are stratified: n requests take the quantiles
(i + 1/2) / n of their class in an order shuffled by the seed, so that a few dozen hold the mix, the
rare million-token prompt included; arrivals are Poisson.

A short replay ends after so many steps. What has neither finished nor missed a target by then is
undecided: it is counted as such and stands in no percentile, since it is neither good nor late.
"""

import math
from collections.abc import Sequence as Items

import numpy as np

from plans.chunks import WorkTable
from plans.plan import Percentiles, Plan, Replay
from plans.workload import RequestClass, Workload, length_at
from runtime.arrivals import child_rng, cut_lengths
from runtime.clock import VirtualClock
from runtime.engine import Engine
from runtime.executor.base import Floats, Step, StepResult
from runtime.metrics import met_slo, nearest_rank
from runtime.request import Record, Request, Sequence
from runtime.simulate import engine_of

LOAD = 0.7
"""Share of capacity at which plans are compared where no rate is asked for."""
MOST_REQUESTS = 400
LEAST_REQUESTS = 10
TAILS = 20.0
"""How many times the longest request's own time arrivals go on where capacity is measured."""


class _Count:
    """Hears the engine's events: requests in the system over time, work of each stage, steps."""

    def __init__(self, stages: int) -> None:
        self.steps = 0
        self.busy_s = [0.0] * stages
        self.arrived: list[Request] = []
        self._inside = 0
        self._since_s = 0.0
        self.request_seconds = 0.0

    def _move(self, now_s: float) -> None:
        self.request_seconds += self._inside * (now_s - self._since_s)
        self._since_s = now_s

    def arrived_at(self, request: Request, now_s: float) -> None:
        self._move(now_s)
        self._inside += 1
        self.arrived.append(request)

    def left(self, now_s: float) -> None:
        self._move(now_s)
        self._inside -= 1


class _Observer:
    """The engine's view of a _Count."""

    def __init__(self, count: _Count) -> None:
        self._count = count

    def arrived(self, sequence: Sequence, now_s: float) -> None:
        """Counts a request in."""
        self._count.arrived_at(sequence.request, now_s)

    def submitted(self, step: Step, now_s: float) -> None:
        """Counts a step."""
        self._count.steps += 1

    def collected(self, result: StepResult) -> None:
        """Adds the step to each stage's work."""
        for stage, seconds in enumerate(result.stage_s):
            self._count.busy_s[stage] += seconds

    def ended(self, record: Record, now_s: float) -> None:
        """Counts a request out."""
        self._count.left(now_s)


def offered(
    workload: Workload, *, count: int, rate_rps: float, seed: int, context_tokens: int
) -> list[Request]:
    """`count` or a few more requests of the mix, with Poisson arrivals from time 0 on."""
    kinds = [row for row, many in enumerate(_counts(workload, count)) for _ in range(many)]
    order = child_rng(seed, "replay", "order").permutation(len(kinds))
    drawn: list[tuple[int, int, str]] = []
    for row, each in enumerate(workload.classes):
        many = kinds.count(row)
        strata = (np.arange(many) + 0.5) / max(many, 1)
        inputs = child_rng(seed, "replay", each.name, "input").permutation(strata)
        outputs = child_rng(seed, "replay", each.name, "output").permutation(strata)
        for input_q, output_q in zip(inputs.tolist(), outputs.tolist(), strict=True):
            lengths = length_at(each.input_tokens, input_q), length_at(each.output_tokens, output_q)
            drawn.append((*cut_lengths(*lengths, context_tokens), each.name))
    gaps = child_rng(seed, "replay", "arrivals").exponential(1 / rate_rps, size=len(drawn))
    times = np.cumsum(gaps) - gaps[0]
    return [
        Request(
            number=number,
            arrival_s=at_s,
            prompt_tokens=drawn[index][0],
            max_tokens=drawn[index][1],
            class_name=drawn[index][2],
        )
        for number, (index, at_s) in enumerate(zip(order.tolist(), times.tolist(), strict=True))
    ]


def _counts(workload: Workload, count: int) -> list[int]:
    """Requests of each class, by largest remainder; every class has one where there is room.

    The commonest class is filled up to a multiple of ten: the nearest-rank P90 of n strata is then
    a quantile just below 0.9 and not above it, which a target at P90 would be judged by.
    """
    total = sum(each.share for each in workload.classes)
    exact = [each.share / total * count for each in workload.classes]
    counts = [math.floor(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda row: (counts[row] - exact[row], row))
    for row in by_rest[: count - sum(counts)]:
        counts[row] += 1
    if count >= 4 * len(counts):
        for row in range(len(counts)):
            if not counts[row]:
                counts[row] += 1
                counts[counts.index(max(counts))] -= 1
    commonest = counts.index(max(counts))
    counts[commonest] += -counts[commonest] % 10
    return counts


def replay(
    plan: Plan,
    *,
    rate_rps: float,
    seed: int,
    steps: int,
    count: int | None = None,
) -> Replay:
    """What one replica does at its share of the rate.

    steps  the run is stopped after so many, or when nothing is left to do
    count  requests offered; None takes as many as should arrive within the steps
    """
    own_rps = rate_rps / plan.parallelism.replicas
    if count is None:
        step_s = plan.scheduler.step_budget_s / plan.parallelism.spp  # they follow at this pace
        count = math.ceil(own_rps * steps * step_s)
        count = min(max(count, LEAST_REQUESTS), MOST_REQUESTS)
    requests = offered(
        plan.workload,
        count=count,
        rate_rps=own_rps,
        seed=seed,
        context_tokens=plan.limits.context_tokens,
    )
    counted, engine, end_s = _run(plan, requests, steps)
    return _report(plan, counted, engine, end_s=end_s, rate_rps=rate_rps, seed=seed)


def _run(plan: Plan, requests: Items[Request], steps: int) -> tuple[_Count, Engine, float]:
    """The engine after the run, its end in virtual seconds, and what was counted on the way."""
    clock = VirtualClock()
    counted = _Count(plan.parallelism.spp)
    engine = engine_of(plan, plan.scheduler.policy, clock, observer=_Observer(counted))
    for request in requests:
        engine.add(request)
    while counted.steps < steps and engine.tick():
        pass
    end_s = clock.now_s()
    engine.close()
    return counted, engine, end_s


def _report(
    plan: Plan, counted: _Count, engine: Engine, *, end_s: float, rate_rps: float, seed: int
) -> Replay:
    decided, undecided = _decided(engine.records, end_s)
    met = sum(met_slo(record, plan.targets) for record in decided)
    attainment = met / len(decided) if decided else 1.0
    within_s = [
        min(record.finished_s if record.finished else end_s, end_s) - record.request.arrival_s
        for record in engine.records
    ]
    arrived = len(counted.arrived)
    ttft_s = {name: [] for name in ("all", "short", "long")}  # type: dict[str, list[float]]
    for record in engine.records:
        if record not in undecided or math.isfinite(record.ttft_s):
            long = record.request.prompt_tokens >= plan.scheduler.long_tokens
            for name in ("all", "long" if long else "short"):
                ttft_s[name].append(record.ttft_s)
    gaps = {name: np.array(drawn) for name, drawn in engine.gaps.items()}
    gaps["all"] = _joined([gaps[name] for name in sorted(gaps)])
    return Replay(
        policy=plan.scheduler.policy,
        seed=seed,
        arrival_rps=rate_rps,
        duration_s=end_s,
        requests=arrived,
        finished=sum(record.finished for record in engine.records),
        undecided=len(undecided),
        steps=counted.steps,
        utilisation=min(max(counted.busy_s) / end_s, 1.0) if end_s else 0.0,
        arrivals_per_s=arrived / end_s if end_s else 0.0,
        in_system_mean=counted.request_seconds / end_s if end_s else 0.0,
        time_in_system_mean_s=sum(within_s) / arrived if arrived else 0.0,
        least_slowdown=min(
            (each.ttft_s / each.work_s for each in engine.records if math.isfinite(each.ttft_s)),
            default=None,
        ),
        attainment=attainment,
        goodput_rps=attainment * rate_rps,
        ttft_s={name: percentiles(np.array(values)) for name, values in sorted(ttft_s.items())},
        tbt_s={name: percentiles(values) for name, values in sorted(gaps.items())},
    )


def _decided(records: Items[Record], end_s: float) -> tuple[list[Record], list[Record]]:
    """Records that count, and those of which nobody can say yet whether they will be in time."""
    decided, undecided = [], []
    for record in records:
        waited_s = min(record.ttft_s, end_s - record.request.arrival_s)
        if record.finished or waited_s > record.deadline_s:
            decided.append(record)
        else:
            undecided.append(record)
    return decided, undecided


def percentiles(samples: Floats) -> Percentiles:
    """Nearest-rank percentiles; None for a sample that never came, and where there is none."""
    if not len(samples):
        return Percentiles(p50=None, p90=None, p99=None, max=None)
    ordered = np.sort(samples)
    found = [nearest_rank(ordered, percent) for percent in (50, 90, 99)] + [float(ordered[-1])]
    p50, p90, p99, most = (value if math.isfinite(value) else None for value in found)
    return Percentiles(p50=p50, p90=p90, p99=p99, max=most)


def _joined(gaps: list[Floats]) -> Floats:
    return np.concatenate(gaps) if gaps else np.zeros(0)


def delivered_rps(plan: Plan, *, rate_rps: float, seed: int, tails: float = TAILS) -> float:
    """Requests a second that the runtime works off when offered the mix at a rate.

    The run goes to its end. What the last long request takes alone behind the last arrival is no
    lack of capacity: so long is the tail that is not counted, and the arrivals go on for `tails`
    times as long, which leaves an error of about a share of 1 / tails. Offered more than it can do,
    a plan delivers its capacity.
    """
    own_rps = rate_rps / plan.parallelism.replicas
    work = WorkTable(plan.prefill.chunks, plan.step_time, plan.kv.tokens_per_kvp_shard)
    context = plan.limits.context_tokens
    longest = [cut_lengths(*_most(each), context) for each in plan.workload.classes]
    tail_s = max(
        work.solo_s(prompt) + answer * plan.scheduler.step_budget_s for prompt, answer in longest
    )
    requests = offered(
        plan.workload,
        count=max(math.ceil(own_rps * tails * tail_s), LEAST_REQUESTS),
        rate_rps=own_rps,
        seed=seed,
        context_tokens=context,
    )
    _, engine, end_s = _run(plan, requests, steps=10**9)
    assert all(record.finished for record in engine.records), "a request was lost"
    busy_s = max(end_s - tail_s / 2, requests[-1].arrival_s)
    return len(requests) / busy_s * plan.parallelism.replicas


def _most(each: RequestClass) -> tuple[int, int]:
    """Longest prompt and answer of a class."""
    return each.input_tokens[-1][1], each.output_tokens[-1][1]

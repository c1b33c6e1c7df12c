"""What a run achieved: latency spreads, SLO attainment and goodput, for all, short and long.

Every offered request counts. One that was refused, or had no first token when the run ended, has an
infinite TTFT; one that did not finish has an infinite end-to-end time; neither meets its SLO.
Percentiles are nearest-rank: the smallest sample that at least the share p does not exceed, so each
is a value that really occurred. An infinite value is written as null in JSON, with the count beside
it (`missing`).

A request meets its SLO when it finished, its TTFT is within its deadline (its own target, else its
class's, else the plan's rule), and its mean time between tokens (TPOT) is within its TBT target.
The single gaps are in `tbt_s`: every gap between two tokens of one request is a sample.

Goodput is requests that met their SLO over the makespan: first arrival to last event.
"""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from msgspec import Struct

from plans.workload import Targets
from runtime.executor.base import Floats
from runtime.request import Record, Request

NO_GAPS: Floats = np.zeros(0)


class Spread(Struct, frozen=True, kw_only=True):
    """Percentiles of one quantity, in seconds; None where there is no sample at all."""

    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None
    mean: float | None
    missing: int = 0
    """Samples that never came and count as infinite."""


class ClassSummary(Struct, frozen=True, kw_only=True):
    """One class of requests."""

    requests: int
    """Offered."""
    finished: int
    refused: int
    unfinished: int
    """Neither finished nor refused when the run ended."""
    ttft_s: Spread
    tbt_s: Spread
    e2e_s: Spread
    slo_attainment: float | None
    """Share of the offered requests that met their SLO; None where none was offered."""


class Summary(Struct, frozen=True, kw_only=True):
    """One policy over one load."""

    policy: str
    classes: dict[str, ClassSummary]
    """`all`, `short` and `long`."""
    goodput_rps: float
    output_tokens_per_s: float
    makespan_s: float
    wall_s: float
    """Real seconds that the run took, virtual time or not."""
    refused: int
    evictions: int
    """Times that a request lost its KV and was put back."""
    recomputed_tokens: int
    """Tokens computed again after that."""


def to_json(summary: object) -> str:
    """One JSON object; infinity and NaN, which JSON does not have, become null."""
    return msgspec.json.format(msgspec.json.encode(summary), indent=2).decode()


def nearest_rank(ordered: Floats, percent: float) -> float:
    """Nearest-rank percentile of rising, non-empty samples."""
    rank = math.ceil(percent / 100 * len(ordered))
    return float(ordered[max(rank, 1) - 1])


def spread(samples: Floats) -> Spread:
    """Spread of samples, among which infinity stands for one that never came."""
    if not len(samples):
        return Spread(p50=None, p90=None, p99=None, max=None, mean=None)
    ordered = np.sort(samples)
    return Spread(
        p50=nearest_rank(ordered, 50),
        p90=nearest_rank(ordered, 90),
        p99=nearest_rank(ordered, 99),
        max=float(ordered[-1]),
        mean=float(ordered.mean()),
        missing=int(np.isinf(ordered).sum()),
    )


def mean_tbt_s(record: Record) -> float:
    """Mean seconds between tokens (TPOT); 0 for an answer of one token."""
    if record.generated < 2:
        return 0.0
    return (record.finished_s - record.first_token_s) / (record.generated - 1)


def tbt_target_s(request: Request, targets: Targets) -> float:
    """The request's own target, else its class's, else the plan's."""
    if request.tbt_target_s is not None:
        return request.tbt_target_s
    named = targets.classes.get(request.class_name or "")
    return targets.tbt_s if named is None or named.tbt_s is None else named.tbt_s


def met_slo(record: Record, targets: Targets) -> bool:
    """Whether the request finished in time."""
    return (
        record.finished
        and record.ttft_s <= record.deadline_s
        and mean_tbt_s(record) <= tbt_target_s(record.request, targets)
    )


def summarise(
    records: Sequence[Record],
    *,
    offered: Sequence[Request],
    policy: str,
    targets: Targets,
    long_tokens: int,
    short_gaps_s: Floats = NO_GAPS,
    long_gaps_s: Floats = NO_GAPS,
    wall_s: float = 0.0,
) -> Summary:
    """Summary of a run.

    records        one for each request that ended, was refused, or was left by the end of the run
    offered        all requests; one without a record counts as unfinished
    long_tokens    prompts from this length on are long
    *_gaps_s       every gap between two tokens of a request, by the class of the request
    """
    by_number = {record.request.number: record for record in records}
    outcomes = [(request, by_number.get(request.number)) for request in offered]
    short = [row for row in outcomes if row[0].prompt_tokens < long_tokens]
    long = [row for row in outcomes if row[0].prompt_tokens >= long_tokens]
    makespan_s = _makespan_s(offered, records)
    met = sum(met_slo(record, targets) for _, record in outcomes if record)
    tokens = sum(record.generated for record in records)
    return Summary(
        policy=policy,
        classes={
            "all": _class(outcomes, np.concatenate([short_gaps_s, long_gaps_s]), targets),
            "short": _class(short, short_gaps_s, targets),
            "long": _class(long, long_gaps_s, targets),
        },
        goodput_rps=met / makespan_s if makespan_s else 0.0,
        output_tokens_per_s=tokens / makespan_s if makespan_s else 0.0,
        makespan_s=makespan_s,
        wall_s=wall_s,
        refused=sum(record.reason == "refused" for record in records),
        evictions=sum(record.evictions for record in records),
        recomputed_tokens=sum(record.recomputed_tokens for record in records),
    )


def _class(
    outcomes: list[tuple[Request, Record | None]], gaps_s: Floats, targets: Targets
) -> ClassSummary:
    ended = [record for _, record in outcomes if record is not None]
    missing = [math.inf] * (len(outcomes) - len(ended))
    finished = sum(record.finished for record in ended)
    refused = sum(record.reason == "refused" for record in ended)
    ttft_s = [record.ttft_s for record in ended]
    e2e_s = [
        record.finished_s - record.request.arrival_s if record.finished else math.inf
        for record in ended
    ]
    met = sum(met_slo(record, targets) for record in ended)
    return ClassSummary(
        requests=len(outcomes),
        finished=finished,
        refused=refused,
        unfinished=len(outcomes) - finished - refused,
        ttft_s=spread(np.array(ttft_s + missing, dtype=np.float64)),
        tbt_s=spread(gaps_s),
        e2e_s=spread(np.array(e2e_s + missing, dtype=np.float64)),
        slo_attainment=met / len(outcomes) if outcomes else None,
    )


def _makespan_s(offered: Sequence[Request], records: Sequence[Record]) -> float:
    """From the first arrival to the last thing that happened; 0 where nothing was offered."""
    if not offered:
        return 0.0
    events = [request.arrival_s for request in offered]
    first = min(events)
    for record in records:
        times = (record.first_chunk_s, record.first_token_s, record.finished_s)
        events += [at_s for at_s in times if math.isfinite(at_s)]
    return max(events) - first

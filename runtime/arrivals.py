"""Makes the requests that are offered to an engine: lengths from a trace or a workload, and times.

    trace     the trace's own times; with a rate they are stretched or squeezed to it
    poisson   exponential gaps at a rate; rows in an order shuffled by the seed, pass after pass
    burst     everything at once

Nothing here shares a random generator: each draw has a generator of its own, seeded by the root
seed and the draw's name, so that one more draw changes no other.
"""

import hashlib
import math
from pathlib import Path
from typing import Literal

import numpy as np
from msgspec import Struct

from plans.errors import InvalidFile, UsageError
from plans.workload import Workload, length_at
from runtime.executor.base import Floats
from runtime.request import Request
from runtime.servegen import is_archive, sample_archive
from runtime.traces import Trace, TraceRow, read_trace

Arrivals = Literal["trace", "poisson", "burst"]
WORKLOAD_DURATION_S = 300.0
"""How long a workload, which has no end of its own, is offered where nobody says."""


MOST_REQUESTS = 10_000_000
"""What a run may offer at most: some gigabytes of requests and records."""
LEAST_QPS = 1e-9
"""One request in thirty years."""


class Offered(Struct, frozen=True, kw_only=True):
    """Requests by arrival, numbered in that order from 0, and what a reader must know of them."""

    requests: tuple[Request, ...]
    source: str
    arrivals: Arrivals
    notes: tuple[str, ...] = ()


class Load(Struct, frozen=True, kw_only=True):
    """How much is offered, as asked for on the command line."""

    qps: float | None = None
    """Mean requests a second; None takes the trace's own times."""
    duration_s: float | None = None
    """Requests that arrive later are left out; None offers the whole trace."""
    seed: int = 0
    arrivals: Arrivals | None = None
    """None: the trace's own where it has them and poisson otherwise."""


def child_rng(seed: int, *names: str) -> np.random.Generator:
    """A generator for one purpose: seeded by the root seed and the purpose's names."""
    digest = hashlib.sha256("/".join(names).encode()).digest()
    return np.random.default_rng(np.random.SeedSequence([seed, int.from_bytes(digest[:16])]))


def offer(source: Path | Workload, load: Load, *, context_tokens: int) -> Offered:
    """Requests of a trace file or a workload.

    context_tokens  most tokens of prompt and answer. A row of a file above it is an InvalidFile;
                    lengths drawn from a distribution are cut to it, and a note says how many
    errors          InvalidFile, UsageError
    """
    _check(load)
    if isinstance(source, Workload):
        return _from_workload(source, load, context_tokens)
    if is_archive(source):
        rng = child_rng(load.seed, "servegen")
        trace = sample_archive(source, rng, qps=load.qps, duration_s=load.duration_s)
        load = Load(duration_s=load.duration_s, seed=load.seed, arrivals="trace")
        return _from_trace(trace, load, context_tokens)
    trace_or_workload = read_trace(source)
    if isinstance(trace_or_workload, Workload):
        return _from_workload(trace_or_workload, load, context_tokens)
    return _from_trace(trace_or_workload, load, context_tokens)


def _check_count(requests: float, flags: str) -> None:
    """Refuses what memory could not hold, before any of it is drawn; raises UsageError."""
    if requests > MOST_REQUESTS:
        raise UsageError(
            f"{flags} offers {requests:.3g} requests; at most {MOST_REQUESTS:,} are simulated"
        )


def _check(load: Load) -> None:
    for flag, value in (("--qps", load.qps), ("--duration", load.duration_s)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{flag} {value}: must be above 0 and finite")
    if load.qps is not None and load.qps < LEAST_QPS:
        raise UsageError(f"--qps {load.qps:g}: must be at least {LEAST_QPS:g}")
    if load.qps is not None and load.duration_s is not None:
        flags = f"--qps {load.qps:g} for --duration {load.duration_s:g}"
        _check_count(load.qps * load.duration_s, flags)
    if load.seed < 0:
        raise UsageError(f"--seed {load.seed}: must be 0 or more")


def _rate(load: Load, source: str) -> float:
    if load.qps is None:
        raise UsageError(f"{source}: --qps is needed, the mean requests a second")
    return load.qps


def poisson_times(rng: np.random.Generator, qps: float, *, duration_s: float) -> Floats:
    """Rising times in [0, duration_s) with exponential gaps of mean 1 / qps."""
    drawn: list[Floats] = []
    last = 0.0
    while last < duration_s:
        expected = (duration_s - last) * qps
        gaps = rng.exponential(1 / qps, size=int(expected + 4 * math.sqrt(expected)) + 16)
        drawn.append(last + np.cumsum(gaps))
        last = float(drawn[-1][-1])
    times = np.concatenate(drawn)
    return times[times < duration_s]


def _from_trace(trace: Trace, load: Load, context_tokens: int) -> Offered:
    arrivals = load.arrivals or ("trace" if trace.timed else "poisson")
    notes = list(trace.notes)
    if arrivals == "trace":
        rows, times = _replayed(trace, load, notes)
    elif arrivals == "poisson":
        rows, times = _poisson(trace, load, notes)
    else:
        count = len(trace.rows)
        if load.duration_s is not None:
            count = max(1, round(_rate(load, trace.source) * load.duration_s))
        rows, times = _shuffled(trace.rows, count, load.seed), np.zeros(count)
    if not rows:
        raise UsageError(f"{trace.source}: no request arrives before {load.duration_s} s")
    _check_lengths(trace, context_tokens)
    requests = []
    cut = 0
    for number, (row, at_s) in enumerate(zip(rows, times.tolist(), strict=True)):
        prompt, answer = cut_lengths(row.input_tokens, row.output_tokens, context_tokens)
        cut += (prompt, answer) != (row.input_tokens, row.output_tokens)
        requests.append(
            Request(
                number=number,
                arrival_s=at_s,
                prompt_tokens=prompt,
                max_tokens=answer,
                ttft_target_s=row.ttft_target_s,
                tbt_target_s=row.tbt_target_s,
                class_name=row.class_name,
            )
        )
    if cut:
        notes.append(_cut_note(cut, len(requests), context_tokens))
    return Offered(
        requests=tuple(requests), source=trace.source, arrivals=arrivals, notes=tuple(notes)
    )


def _replayed(trace: Trace, load: Load, notes: list[str]) -> tuple[list[TraceRow], Floats]:
    """Rows at the trace's own times, in their order."""
    if not trace.timed:
        raise UsageError(f"{trace.source} has no arrivals: use --arrivals poisson or burst")
    times = np.array([row.arrival_s for row in trace.rows], dtype=np.float64)
    if load.qps is not None:
        factor = _stretch(trace.source, times, load.qps)
        times = times * factor
        notes.append(f"arrival times x {factor:.4g}, for {load.qps:g} requests/s on average")
    order = np.argsort(times, kind="stable")  # rows of one stamp keep the file's order
    times = times[order]
    kept = len(times)
    if load.duration_s is not None:
        kept = int(np.searchsorted(times, load.duration_s, side="left"))
    return [trace.rows[index] for index in order[:kept]], times[:kept]


def _poisson(trace: Trace, load: Load, notes: list[str]) -> tuple[list[TraceRow], Floats]:
    """Shuffled rows at random times; without a duration each row once."""
    qps = _rate(load, trace.source)
    rng = child_rng(load.seed, "arrivals")
    if load.duration_s is None:
        times = np.cumsum(rng.exponential(1 / qps, size=len(trace.rows)))
    else:
        times = poisson_times(rng, qps, duration_s=load.duration_s)
    if len(times) > len(trace.rows):
        notes.append(f"{len(trace.rows)} rows repeated to make {len(times)} requests")
    return _shuffled(trace.rows, len(times), load.seed), times


def _check_lengths(trace: Trace, context_tokens: int) -> None:
    """A row that was read and cannot be served is the file's error, whatever is picked of it."""
    for row in trace.rows:
        if row.line and row.input_tokens + row.output_tokens > context_tokens:
            need = max(each.input_tokens + each.output_tokens for each in trace.rows)
            raise InvalidFile(
                trace.source,
                f"line {row.line}",
                f"{row.input_tokens} prompt and {row.output_tokens} answer tokens exceed the plan's"
                f" context limit of {context_tokens}; nearest: a plan with --max-context {need}",
            )


def _stretch(source: str, times: Floats, qps: float) -> float:
    """Factor on the times that makes their mean rate qps."""
    span = float(times.max() - times.min())
    if span == 0:
        raise UsageError(f"{source}: all rows arrive at once, so no factor makes them {qps} a s")
    return (len(times) - 1) / span / qps


def _shuffled(rows: tuple[TraceRow, ...], count: int, seed: int) -> list[TraceRow]:
    """Rows in shuffled order; each pass over them has an order of its own."""
    picked: list[TraceRow] = []
    while len(picked) < count:
        rng = child_rng(seed, "order", str(len(picked) // len(rows)))
        picked += [rows[index] for index in rng.permutation(len(rows))]
    return picked[:count]


def cut_lengths(prompt: int, answer: int, context_tokens: int) -> tuple[int, int]:
    """The same lengths, the prompt first cut to what the context holds beside the answer."""
    answer = min(answer, context_tokens - 1)
    return min(prompt, context_tokens - answer), answer


def _cut_note(cut: int, count: int, context_tokens: int) -> str:
    return f"{cut} of {count} requests cut to the plan's context limit of {context_tokens} tokens"


def _from_workload(workload: Workload, load: Load, context_tokens: int) -> Offered:
    arrivals = load.arrivals or "poisson"
    if arrivals == "trace":
        raise UsageError(f"{workload.name} has no arrivals: use --arrivals poisson or burst")
    qps = _rate(load, f"workload {workload.name}")
    duration_s = load.duration_s or WORKLOAD_DURATION_S
    _check_count(qps * duration_s, f"--qps {qps:g} for {duration_s:g} s")
    if arrivals == "poisson":
        times = poisson_times(child_rng(load.seed, "arrivals"), qps, duration_s=duration_s)
    else:
        times = np.zeros(max(1, round(qps * duration_s)))
    if not len(times):
        raise UsageError(f"--qps {qps} for --duration {duration_s} offers no request")
    shares = np.array([row.share for row in workload.classes])
    classes = child_rng(load.seed, "classes").choice(
        len(shares), size=len(times), p=shares / shares.sum()
    )
    inputs = child_rng(load.seed, "input_tokens").random(len(times))
    outputs = child_rng(load.seed, "output_tokens").random(len(times))
    requests = []
    cut = 0
    for number, at_s in enumerate(times.tolist()):
        lengths = workload.classes[classes[number]]
        drawn = (
            length_at(lengths.input_tokens, float(inputs[number])),
            length_at(lengths.output_tokens, float(outputs[number])),
        )
        prompt, answer = cut_lengths(*drawn, context_tokens)
        cut += (prompt, answer) != drawn
        requests.append(
            Request(
                number=number,
                arrival_s=at_s,
                prompt_tokens=prompt,
                max_tokens=answer,
                class_name=lengths.name,
            )
        )
    notes = [f"lengths drawn from workload {workload.name}"]
    if cut:
        notes.append(_cut_note(cut, len(requests), context_tokens))
    return Offered(
        requests=tuple(requests),
        source=f"workload {workload.name}",
        arrivals=arrivals,
        notes=tuple(notes),
    )

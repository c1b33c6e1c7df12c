"""What happened when, as Chrome trace events: a JSON file that Perfetto and chrome://tracing open.

    stages     a track each; a slice is one step on that stage, with its tokens, chunks and decodes
    requests   a track each, by arrival: `queue` from arrival to the first chunk, the chunks while
               they are in the first stage, `decode` from the first token to the last. A request
               that lost its KV shows the chunks that compute it again, inside `decode` if it
               already had a token
    counters   running, waiting, KV pages

`Recorder` observes an engine and keeps what the tracks need. A replica has a recorder of its own;
with several of them, tracks and counters carry the number of the replica.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from runtime.executor.base import Step, StepResult
from runtime.request import Record, Sequence

STAGES, REQUESTS = 1, 2
"""Process numbers of the two groups of tracks."""
US_PER_S = 1e6
"""The format counts in microseconds."""

Event = dict[str, Any]


class ChunkSlice(Struct, frozen=True, kw_only=True):
    """One prefill chunk of a step."""

    request: int
    tokens: int
    prefix: int


class StepSlice(Struct, frozen=True, kw_only=True):
    """One step that ended."""

    step_id: int
    starts_s: tuple[float, ...]
    """When it entered each stage."""
    stage_s: tuple[float, ...]
    chunks: tuple[ChunkSlice, ...]
    decodes: int
    kv_pages: int
    """Pages in use, over all groups, once the step was submitted."""

    @property
    def tokens(self) -> int:
        """Query tokens."""
        return self.decodes + sum(chunk.tokens for chunk in self.chunks)


class Recorder:
    """Engine observer that keeps the steps and the ends of one replica."""

    def __init__(self, *, stages: int, replica: int = 0) -> None:
        """stages is the plan's number of pipeline stages."""
        self.replica = replica
        self.stages = stages
        self.steps: list[StepSlice] = []
        self.records: list[Record] = []
        self._submitted_s: dict[int, float] = {}
        self._pages: dict[int, int] = {}
        self._pages_in_use: dict[int, int] = {}
        self._free_s = [0.0] * stages

    def arrived(self, sequence: Sequence, now_s: float) -> None:
        """Arrivals are in the records."""

    def submitted(self, step: Step, now_s: float) -> None:
        """Notes the time and the pages."""
        self._submitted_s[step.step_id] = now_s
        for number in (*step.evicted, *step.ended):
            self._pages.pop(number, None)
        for grown in step.pages:
            self._pages[grown.request] = self._pages.get(grown.request, 0) + len(grown.pages)
        self._pages_in_use[step.step_id] = sum(self._pages.values())

    def collected(self, result: StepResult) -> None:
        """Keeps the step; a stage takes it when it left the stage before and is free."""
        step = result.step
        at_s = self._submitted_s.pop(step.step_id)
        starts_s = []
        for stage, seconds in enumerate(result.stage_s):
            at_s = max(at_s, self._free_s[stage])
            starts_s.append(at_s)
            at_s += seconds
            self._free_s[stage] = at_s
        self.steps.append(
            StepSlice(
                step_id=step.step_id,
                starts_s=tuple(starts_s),
                stage_s=result.stage_s,
                chunks=tuple(
                    ChunkSlice(request=chunk.request, tokens=chunk.tokens, prefix=chunk.prefix)
                    for chunk in step.chunks
                ),
                decodes=len(step.decodes),
                kv_pages=self._pages_in_use.pop(step.step_id),
            )
        )

    def ended(self, record: Record, now_s: float) -> None:
        """Keeps the end."""
        self.records.append(record)


def write_timeline(path: Path, recorders: Iterable[Recorder]) -> None:
    """Writes the file; open it at ui.perfetto.dev."""
    events = {"displayTimeUnit": "ms", "traceEvents": [*trace_events([*recorders])]}
    path.write_bytes(msgspec.json.encode(events))


def trace_events(recorders: list[Recorder]) -> Iterator[Event]:
    """All events of a run; slices of one track never overlap unless one lies inside the other."""
    yield _name("process_name", STAGES, 0, "stages")
    yield _name("process_name", REQUESTS, 0, "requests")
    for recorder in recorders:
        place = f"replica {recorder.replica} " if len(recorders) > 1 else ""
        first_track = recorder.replica * recorder.stages
        for stage in range(recorder.stages):
            yield _name("thread_name", STAGES, first_track + stage, f"{place}stage {stage}")
        begun_s: dict[int, float] = {}
        for step in recorder.steps:
            for chunk in step.chunks:
                begun_s.setdefault(chunk.request, step.starts_s[0])
            yield from _step_events(step, first_track, place)
        for record in recorder.records:
            yield from _record_events(record, begun_s.get(record.request.number))
        yield from _queue_counters(recorder.records, begun_s, place)


def _name(kind: str, process: int, track: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": process, "tid": track, "args": {"name": name}}


def _slice(
    process: int, track: int, name: str, start_s: float, seconds: float, **args: Any
) -> Event:
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": track,
        "ts": start_s * US_PER_S,
        "dur": max(seconds, 0.0) * US_PER_S,
        "args": args,
    }


def _counter(name: str, at_s: float, value: int) -> Event:
    return {
        "ph": "C",
        "name": name,
        "pid": STAGES,
        "tid": 0,
        "ts": at_s * US_PER_S,
        "args": {name: value},
    }


def _step_events(step: StepSlice, first_track: int, place: str) -> Iterator[Event]:
    name = f"step {step.step_id}"
    for stage, (start_s, seconds) in enumerate(zip(step.starts_s, step.stage_s, strict=True)):
        yield _slice(
            STAGES,
            first_track + stage,
            name,
            start_s,
            seconds,
            tokens=step.tokens,
            decodes=step.decodes,
            chunks=[f"{each.request}: {each.tokens} at {each.prefix}" for each in step.chunks],
        )
    for chunk in step.chunks:
        yield _slice(
            REQUESTS,
            chunk.request,
            f"prefill {chunk.tokens}",
            step.starts_s[0],
            step.stage_s[0],
            step=step.step_id,
            prefix=chunk.prefix,
        )
    yield _counter(f"{place}running", step.starts_s[0], step.decodes + len(step.chunks))
    yield _counter(f"{place}KV pages", step.starts_s[0], step.kv_pages)


def _record_events(record: Record, begun_s: float | None) -> Iterator[Event]:
    """Name of the track, `queue` and `decode`; begun_s is when the first chunk started."""
    request = record.request
    name = f"{request.number}: {request.prompt_tokens} tokens"
    yield _name("thread_name", REQUESTS, request.number, name)
    if begun_s is not None:
        waited_s = begun_s - request.arrival_s
        yield _slice(REQUESTS, request.number, "queue", request.arrival_s, waited_s)
    if math.isfinite(record.first_token_s) and math.isfinite(record.finished_s):
        yield _slice(
            REQUESTS,
            request.number,
            "decode",
            record.first_token_s,
            record.finished_s - record.first_token_s,
            tokens=record.generated,
            ttft_s=record.ttft_s,
            deadline_s=record.deadline_s,
            reason=record.reason,
        )


def _queue_counters(
    records: list[Record], begun_s: dict[int, float], place: str
) -> Iterator[Event]:
    """Requests that arrived and had no chunk yet, at each change."""
    changes = [(record.request.arrival_s, 1) for record in records if record.reason != "refused"]
    changes += [(at_s, -1) for at_s in begun_s.values()]
    waiting = 0
    # Arrivals first where times are equal: a request that starts at once never makes it negative.
    for at_s, change in sorted(changes, key=lambda each: (each[0], -each[1])):
        waiting += change
        yield _counter(f"{place}waiting", at_s, waiting)

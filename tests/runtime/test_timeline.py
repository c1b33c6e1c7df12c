"""Timelines: what Perfetto needs of a file, and times that agree with the run."""

import json

import numpy as np
import pytest

from runtime.executor.base import Chunk, NewPages, Step, StepResult
from runtime.request import NEVER, Record, Request
from runtime.timeline import REQUESTS, STAGES, Recorder, trace_events, write_timeline

NONE = np.zeros(0, dtype=np.int64)


def chunk(tokens: int, prefix: int) -> Chunk:
    return Chunk(request=3, tokens=tokens, prefix=prefix, home=0, samples=False)


def step(step_id: int, *chunks: Chunk, **changes: object) -> Step:
    fields = {"decodes": NONE, "decode_prefix": NONE, "decode_home": NONE} | changes
    return Step(step_id=step_id, chunks=chunks, **fields)


def result(of: Step, *stage_s: float) -> StepResult:
    return StepResult(step=of, tokens={}, stage_s=stage_s, finished_s=0.0)


def recorded(*records: Record) -> Recorder:
    """Two steps of request 3: 1 s and 10 s in their stages; then, once evicted, 1 s and 2 s."""
    recorder = Recorder(stages=2)
    first = step(0, chunk(8, 0), pages=(NewPages(request=3, shard=0, pages=(4, 5)),))
    again = NewPages(request=3, shard=0, pages=(6,))
    second = step(1, chunk(4, 8), evicted=(3,), pages=(again,))
    recorder.submitted(first, 0.5)
    recorder.submitted(second, 1.5)
    recorder.collected(result(first, 1.0, 10.0))
    recorder.collected(result(second, 1.0, 2.0))
    for each in records:
        recorder.ended(each, 0.0)
    return recorder


def record(**changes: object) -> Record:
    request = Request(number=3, arrival_s=0.25, prompt_tokens=12, max_tokens=4)
    fields = {
        "deadline_s": 1.0,
        "work_s": 1.0,
        "first_chunk_s": 0.5,
        "first_token_s": 13.0,
        "finished_s": 15.0,
        "generated": 4,
        "evictions": 0,
        "recomputed_tokens": 0,
        "reason": "length",
    } | changes
    return Record(request=request, **fields)


def test_a_step_enters_a_stage_when_both_are_ready():
    first, second = recorded().steps
    assert first.starts_s == (0.5, 1.5)
    assert second.starts_s == (1.5, 11.5)  # stage 1 is busy with the first step until 11.5 s
    assert (first.tokens, second.tokens) == (8, 4)


def test_pages_are_counted_through_eviction():
    assert [each.kv_pages for each in recorded().steps] == [2, 1]


def test_the_file_is_chrome_trace_json(tmp_path):
    path = tmp_path / "timeline.json"
    write_timeline(path, [recorded(record())])
    events = json.loads(path.read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {"stages", "requests", "stage 0", "stage 1", "3: 12 tokens"} == names
    for event in events:
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event.get("dur", 0) >= 0


def test_a_request_queues_prefills_and_decodes_on_its_track():
    events = [each for each in trace_events([recorded(record())]) if each["ph"] == "X"]
    track = {each["name"]: each for each in events if each["pid"] == REQUESTS}
    assert set(track) == {"queue", "prefill 8", "prefill 4", "decode"}
    assert (track["queue"]["ts"], track["queue"]["dur"]) == (0.25e6, 0.25e6)
    assert (track["decode"]["ts"], track["decode"]["dur"]) == (13e6, 2e6)
    assert track["prefill 4"]["args"]["prefix"] == 8
    assert sum(each["pid"] == STAGES for each in events) == 4


@pytest.mark.parametrize("name", ["first_token_s", "finished_s"])
def test_what_never_happened_has_no_slice(name):
    events = list(trace_events([recorded(record(**{name: NEVER}, reason="unfinished"))]))
    assert all(event.get("ts", 0) == event.get("ts", 0) for event in events)  # no NaN
    assert "decode" not in {event["name"] for event in events}


def test_the_waiting_counter_ends_at_zero():
    events = trace_events([recorded(record())])
    assert [event["args"]["waiting"] for event in events if event["name"] == "waiting"] == [1, 0]


def test_replicas_have_tracks_of_their_own():
    second = Recorder(stages=2, replica=1)
    events = [*trace_events([recorded(record()), second])]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names[2] == "replica 1 stage 0"
    assert "replica 0 KV pages" in {event["name"] for event in events}

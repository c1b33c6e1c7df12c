"""A decision log that was edited is refused by line, field and nearest value, or decided again."""

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies_runtime import sim_plan

from plans.errors import InvalidFile, MedhaError
from plans.plan import Plan
from runtime.clock import VirtualClock
from runtime.decisions import DecisionLog, read_log, replay
from runtime.engine import Engine
from runtime.executor.simulated import SimulatedExecutor
from runtime.request import Request
from runtime.scheduler import load_policy

Lines = list[dict[str, Any]]
Edit = Callable[[Lines], object]

PLAN = sim_plan(spp=2)
CONTEXT = PLAN.limits.context_tokens


@cache
def written() -> tuple[bytes, ...]:
    """The log of three requests on two stages."""
    clock, file = VirtualClock(), io.BytesIO()
    engine = Engine(
        PLAN,
        SimulatedExecutor(PLAN, clock),
        clock,
        load_policy("lars", PLAN.scheduler),
        log=DecisionLog(file, PLAN, "lars"),
    )
    for number in range(3):
        engine.add(
            Request(number=number, arrival_s=0.003 * number, prompt_tokens=400, max_tokens=3)
        )
    engine.run()
    engine.close()
    return tuple(file.getvalue().splitlines())


def decided(path: Path, lines: Lines, plan: Plan = PLAN) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    replay(plan, read_log(path), str(path))


def log() -> Lines:
    return [json.loads(line) for line in written()]


def place(lines: Lines, kind: str, nth: int = 0) -> int:
    """Index of the nth line of a kind."""
    return [index for index, line in enumerate(lines) if line["type"] == kind][nth]


def put(kind: str, field: str, value: object, nth: int = 0) -> Edit:
    def edit(lines: Lines) -> None:
        inner, line = field.split("."), lines[place(lines, kind, nth)]
        for name in inner[:-1]:
            line = line[name]
        line[inner[-1]] = value

    return edit


EDITS = [
    ("arrived", lambda lines: lines.insert(2, lines[1]), "request.number: .* not ended", 1),
    ("arrived", put("arrived", "request.number", -1), "request.number: -1; .* nearest: 0", 0),
    ("arrived", put("arrived", "request.number", 2**70), "request.number: .* nearest: 9223", 0),
    ("arrived", put("arrived", "request.prompt_tokens", 10**9), f"nearest: {CONTEXT - 1}$", 0),
    (
        "arrived",
        put("arrived", "request.prompt_tokens", 0),
        "prompt_tokens: 0; must be at least 1; nearest: 1",
        0,
    ),
    (
        "arrived",
        put("arrived", "request.prompt_tokens", -5),
        "-5; must be at least 1; nearest: 1",
        0,
    ),
    ("arrived", put("arrived", "request.max_tokens", 0), "max_tokens: 0; .* nearest: 1", 0),
    ("arrived", put("arrived", "request.max_tokens", CONTEXT), f"nearest: {CONTEXT - 400}$", 0),
    ("arrived", put("arrived", "request.arrival_s", 1.0), r"arrival_s: 1.0 s; .* nearest: 0.0", 0),
    ("arrived", put("arrived", "request.tbt_target_s", 1.0), "tbt_target_s: .* nearest: null", 0),
    ("arrived", put("arrived", "at_s", -1.0), r"at_s: -1.0 s; .* nearest: 0.0", 0),
    ("packed", put("packed", "at_s", 1e308), r"at_s: 1e\+308 s; .* nearest: 1e\+18", 0),
    ("closed", put("closed", "at_s", 1e308), r"at_s: 1e\+308 s; .* nearest: 1e\+18", 0),
    ("closed", put("closed", "at_s", 0.0), "at_s: 0.0 s; .* no line is earlier", 0),
    ("closed", put("closed", "reason", "so what"), "must be one of failed, unfinished", 0),
    ("collected", put("collected", "stage_s", []), "stage_s: 0 times; the plan has 2 stages", 0),
    ("collected", put("collected", "stage_s", [0.1, -1.0]), r"stage_s\[1\]: -1.0 s; ", 0),
    ("collected", put("collected", "finished_s", -1.0), "the step was packed at 0.0 s", 0),
    ("collected", put("collected", "finished_s", 1e308), r"nearest: 1e\+18", 0),
    ("collected", put("collected", "step_id", 1), "step_id: 1; .* nearest: 0", 0),
    ("collected", put("collected", "stops", {"7": "stop"}), "stops: request 7; step 0 gave it", 0),
    ("header", put("header", "policy", "larz"), "policy: .*nearest: lars", 0),
]


@pytest.mark.parametrize(("kind", "edit", "problem", "nth"), EDITS)
def test_what_no_engine_writes_is_named_by_line_and_rule(tmp_path, kind, edit, problem, nth):
    lines = log()
    if "tbt_target_s" in problem:
        lines[place(lines, kind)]["infinite"] = ["tbt_target_s"]
    edit(lines)
    number = place(lines, kind, nth) + 1
    with pytest.raises(InvalidFile, match=f"line {number}, .*{problem}"):
        decided(tmp_path / "log.jsonl", lines)


def test_a_stop_has_the_one_reason_that_there_is(tmp_path):
    lines = log()
    last = [line for line in lines if line["type"] == "collected"][-1]
    number = next(
        line["step"]["decodes"][0]
        for line in lines
        if line["type"] == "packed" and line["step"] and line["step"]["step_id"] == last["step_id"]
    )
    last["stops"] = {str(number): "enough"}
    with pytest.raises(InvalidFile, match=f"stops.{number}: 'enough'; nearest: 'stop'"):
        decided(tmp_path / "log.jsonl", lines)


def test_a_line_of_endless_depth_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    deep = b'{"type":"packed","at_s":0.0,"step":{"a":' + b"[" * 100_000
    path.write_bytes(written()[0] + b"\n" + deep)
    with pytest.raises(InvalidFile, match="line 2"):
        replay(PLAN, read_log(path), str(path))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, -1, 2**31, 2**63, 2**64, 1e308, -1e308, 1e-308, 0.001]),
    st.just([]),
    st.just({}),
    st.just({"0": "stop"}),
    st.just("fcfs"),
    st.just(["ttft_target_s"]),
)


@given(data=st.data())
def test_any_edit_is_refused_or_decided_again(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Lines dropped, doubled, moved, and values of any kind: nothing ends in a traceback."""
    lines = log()
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(lines) - 1))
        match data.draw(st.sampled_from(["drop", "double", "move", "set", "set", "set"])):
            case "drop":
                del lines[index]
            case "double":
                lines.insert(index, json.loads(json.dumps(lines[index])))
            case "move":
                lines.insert(data.draw(st.integers(0, len(lines) - 1)), lines.pop(index))
            case _:
                line = lines[index]
                inner = line.get("request")
                line = inner if isinstance(inner, dict) and data.draw(st.booleans()) else line
                line[data.draw(st.sampled_from(sorted(line)))] = data.draw(VALUES)
        if not lines:
            return
    lines[-1].update({"lines": len(lines) - 1} if lines[-1].get("type") == "closed" else {})
    try:
        decided(tmp_path_factory.getbasetemp() / "edited.jsonl", lines)
    except MedhaError:
        return

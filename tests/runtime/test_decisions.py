"""A decision log gives the same schedule again, and says where another one comes out."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_runtime import SPECS, requests, sim_plan, sim_plans
from typer.testing import CliRunner

from plans.codec import dump_file
from plans.errors import BundleMismatch, InvalidFile, UsageError
from plans.plan import Plan
from runtime.cli_sim import app
from runtime.clock import VirtualClock
from runtime.decisions import (
    DecisionLog,
    Header,
    Packed,
    ReplayMismatch,
    decision_log,
    read_log,
    replay,
)
from runtime.engine import Engine
from runtime.executor.base import StepResult
from runtime.executor.simulated import SimulatedExecutor
from runtime.request import Record, Request
from runtime.scheduler import POLICIES, load_policy

runner = CliRunner()


class Talking(SimulatedExecutor):
    """Says a token for each request that samples: the number of the step."""

    def wait(self, *, until_s: float | None) -> list[StepResult]:
        return [_spoken(result) for result in super().wait(until_s=until_s)]


def _spoken(result: StepResult) -> StepResult:
    step = result.step
    numbers = [*step.decodes.tolist(), *(each.request for each in step.chunks if each.samples)]
    return msgspec.structs.replace(result, tokens=dict.fromkeys(numbers, step.step_id))


def logged(
    plan: Plan,
    work: list[Request],
    policy: str,
    path: Path,
    cancels: dict[int, int] | None = None,
    *,
    on_token: Callable[[Engine, int, int], str | None] | None = None,
    until_s: float | None = None,
    learn: bool = False,
) -> list[Record]:
    """Serves the work with a log at `path`; cancels[tick] is a request number."""
    clock = VirtualClock()
    file = io.BytesIO()
    engine = Engine(
        plan,
        SimulatedExecutor(plan, clock) if on_token is None else Talking(plan, clock),
        clock,
        load_policy(policy, plan.scheduler),
        on_token=None if on_token is None else lambda *token: on_token(engine, *token),
        log=DecisionLog(file, plan, policy, learn=learn),
        learn=learn,
    )
    for request in work:
        engine.add(request)
    tick = 0
    while engine.tick(until_s):
        if cancels and tick in cancels:
            engine.cancel(cancels[tick])
        tick += 1
    engine.close()
    path.write_bytes(file.getvalue())
    return list(engine.records)


@settings(max_examples=60)
@given(
    plan=sim_plans(),
    work=requests(),
    policy=SPECS,
    data=st.data(),
)
def test_a_log_replays_to_the_identical_schedule(
    tmp_path_factory: pytest.TempPathFactory,
    plan: Plan,
    work: list[Request],
    policy: str,
    data: st.DataObject,
) -> None:
    cancels = data.draw(st.dictionaries(st.integers(0, 60), st.integers(0, 12), max_size=3))
    until_s = data.draw(st.none() | st.floats(0, 0.3))
    learn = data.draw(st.booleans())
    path = tmp_path_factory.getbasetemp() / "log.jsonl"
    records = logged(plan, work, policy, path, cancels, until_s=until_s, learn=learn)
    again = replay(plan, read_log(path), str(path))
    assert msgspec.json.encode(again.records) == msgspec.json.encode(tuple(records))
    packed = [line for line in read_log(path) if isinstance(line, Packed)]
    assert again.steps == sum(line.step is not None for line in packed)


@settings(max_examples=60)
@given(plan=sim_plans(), work=requests(), policy=SPECS, data=st.data())
def test_stops_and_cancellations_from_inside_a_step_replay_too(
    tmp_path_factory: pytest.TempPathFactory,
    plan: Plan,
    work: list[Request],
    policy: str,
    data: st.DataObject,
) -> None:
    """Each token may stop its request, and cancel any request while the step is retired."""
    path = tmp_path_factory.getbasetemp() / "inside.jsonl"
    numbers = st.integers(0, len(work) - 1)
    stops = data.draw(st.sets(st.tuples(numbers, st.integers(0, 20)), max_size=4))
    cancels = data.draw(st.dictionaries(numbers, numbers, max_size=3))

    def on_token(engine: Engine, number: int, token: int) -> str | None:
        if number in cancels:
            engine.cancel(cancels[number])
        return "stop" if (number, token) in stops else None

    records = logged(plan, work, policy, path, on_token=on_token)
    again = replay(plan, read_log(path), str(path))
    assert msgspec.json.encode(again.records) == msgspec.json.encode(tuple(records))


def test_a_request_cancelled_while_a_step_is_retired_keeps_the_tokens_of_that_step(
    tmp_path: Path,
) -> None:
    """The first of two in one step cancels the second, whose token is there all the same."""
    work = [
        Request(number=each, arrival_s=0.0, prompt_tokens=10, max_tokens=9) for each in range(2)
    ]
    seen = []

    def on_token(engine: Engine, number: int, token: int) -> None:
        seen.append(number)
        if len(seen) == 3:  # the first token of the second step in which both sample
            engine.cancel(1 - number)
            assert len(engine.book.sequences) == 2

    records = logged(sim_plan(), work, "fcfs", tmp_path / "log.jsonl", on_token=on_token)
    cancelled, finished = records
    assert (cancelled.reason, cancelled.generated) == ("cancelled", 2)
    assert (finished.reason, finished.generated) == ("length", 9)


def test_infinite_targets_are_served_and_replayed(tmp_path: Path) -> None:
    plan, path = sim_plan(), tmp_path / "log.jsonl"
    patient = [
        Request(
            number=number,
            arrival_s=0.0,
            prompt_tokens=700,
            max_tokens=5,
            ttft_target_s=None if number % 2 else math.inf,
            tbt_target_s=math.inf if number % 3 else None,
        )
        for number in range(6)
    ]
    for policy in POLICIES:
        records = logged(plan, patient, policy, path)
        assert {each.reason for each in records} == {"length"}
        again = replay(plan, read_log(path), str(path))
        assert again.records == tuple(records)
        assert again.records[0].request in patient


def test_a_log_that_breaks_off_is_noticed_wherever_it_does(tmp_path: Path) -> None:
    plan, path = sim_plan(), tmp_path / "log.jsonl"
    logged(plan, WORK, "lars", path)
    lines = path.read_bytes().splitlines(keepends=True)
    for count in range(1, len(lines)):
        path.write_bytes(b"".join(lines[:count]))
        with pytest.raises(InvalidFile, match="breaks off"):
            replay(plan, read_log(path), str(path))
    path.write_bytes(b"".join(lines)[:-2])
    with pytest.raises(InvalidFile, match=f"line {len(lines)}"):
        replay(plan, read_log(path), str(path))
    path.write_bytes(b"".join([*lines, lines[1]]))
    with pytest.raises(InvalidFile, match=f"line {len(lines) + 1}.*behind the end"):
        replay(plan, read_log(path), str(path))
    idle = next(index for index, line in enumerate(lines) if b'"step":null' in line)
    path.write_bytes(b"".join(lines[:idle] + lines[idle + 1 :]))
    with pytest.raises(InvalidFile, match="ends a log of"):
        replay(plan, read_log(path), str(path))


def test_what_was_left_at_the_end_is_left_again(tmp_path: Path) -> None:
    plan, path = sim_plan(), tmp_path / "log.jsonl"
    records = logged(plan, WORK, "lars", path, until_s=0.004)
    assert {each.reason for each in records} == {"unfinished"}
    assert replay(plan, read_log(path)).records == tuple(records)


def test_the_header_says_whether_the_engine_learnt(tmp_path: Path) -> None:
    plan, path = sim_plan(), tmp_path / "log.jsonl"
    with decision_log(path, plan, "lars", learn=True) as log:
        assert log is not None
        log.closed("unfinished", 0.0)
    header = next(read_log(path))
    assert isinstance(header, Header)
    assert header.learn


WORK = [
    Request(number=0, arrival_s=0.0, prompt_tokens=700, max_tokens=5),
    Request(number=1, arrival_s=0.002, prompt_tokens=50, max_tokens=5),
]


def test_another_plan_is_refused_and_another_time_is_a_mismatch(tmp_path: Path) -> None:
    plan, path = sim_plan(), tmp_path / "log.jsonl"
    logged(plan, WORK, "lars", path)
    other = sim_plan(sequences=3)
    with pytest.raises(BundleMismatch, match="this one is"):
        replay(other, read_log(path))
    lines = list(read_log(path))
    early = [
        msgspec.structs.replace(line, request=msgspec.structs.replace(line.request, max_tokens=4))
        if hasattr(line, "request") and not isinstance(line.request, int)
        else line
        for line in lines
    ]
    with pytest.raises(ReplayMismatch, match="the log has"):
        replay(plan, early)


def test_damaged_logs_name_file_and_line(tmp_path: Path) -> None:
    plan, path = sim_plan(), tmp_path / "log.jsonl"
    logged(plan, WORK, "lars", path)
    text = path.read_text().splitlines()
    for damage, place in [
        (["{"], "line 1"),
        ([text[0], '{"type": "packed"}'], "line 2"),
        (text[1:], "line 1"),
        ([text[0], next(each for each in text if '"collected"' in each)], "step 0"),
        ([text[0], text[0]], "second header"),
    ]:
        path.write_text("\n".join(damage))
        with pytest.raises(InvalidFile, match=place):
            replay(plan, read_log(path), str(path))
    with pytest.raises(InvalidFile, match="cannot be read"):
        list(read_log(tmp_path / "absent.jsonl"))


def test_the_command_writes_a_log_and_decides_it_again(tmp_path: Path) -> None:
    plan, path = tmp_path / "plan.yaml", tmp_path / "log.jsonl"
    dump_file(plan, sim_plan(spp=2))
    served = runner.invoke(app, [str(plan), "--duration", "20", "--decisions", str(path)])
    assert served.exit_code == 0, served.output
    again = runner.invoke(app, [str(plan), "--replay", str(path)])
    assert again.exit_code == 0, again.output
    assert "decided alike" in again.output
    assert sorted(each.name for each in tmp_path.iterdir()) == ["log.jsonl", "plan.yaml"]
    both = runner.invoke(app, [str(plan), "--replay", str(path), "--qps", "3"])
    assert isinstance(both.exception, UsageError)
    two = runner.invoke(app, [str(plan), "--decisions", str(path), "--seeds", "2"])
    assert isinstance(two.exception, UsageError)

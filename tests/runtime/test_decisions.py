"""A decision log gives the same schedule again, and says where another one comes out."""

import io
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
from runtime.decisions import DecisionLog, Packed, ReplayMismatch, read_log, replay
from runtime.engine import Engine
from runtime.executor.simulated import SimulatedExecutor
from runtime.request import Record, Request
from runtime.scheduler import load_policy

runner = CliRunner()


def logged(
    plan: Plan, work: list[Request], policy: str, path: Path, cancels: dict[int, int] | None = None
) -> list[Record]:
    """Serves the work with a log at `path`; cancels[tick] is a request number."""
    clock = VirtualClock()
    file = io.BytesIO()
    engine = Engine(
        plan,
        SimulatedExecutor(plan, clock),
        clock,
        load_policy(policy, plan.scheduler),
        log=DecisionLog(file, plan, policy),
    )
    for request in work:
        engine.add(request)
    tick = 0
    while engine.tick():
        if cancels and tick in cancels:
            engine.cancel(cancels[tick])
        tick += 1
    path.write_bytes(file.getvalue())
    return engine.records


@settings(max_examples=60)
@given(
    plan=sim_plans(),
    work=requests(),
    policy=SPECS,
    cancels=st.dictionaries(st.integers(0, 60), st.integers(0, 12), max_size=3),
)
def test_a_log_replays_to_the_identical_schedule(
    tmp_path_factory: pytest.TempPathFactory,
    plan: Plan,
    work: list[Request],
    policy: str,
    cancels: dict[int, int],
) -> None:
    path = tmp_path_factory.getbasetemp() / "log.jsonl"
    records = logged(plan, work, policy, path, cancels)
    again = replay(plan, read_log(path), str(path))
    assert msgspec.json.encode(again.records) == msgspec.json.encode(tuple(records))
    packed = [line for line in read_log(path) if isinstance(line, Packed)]
    assert again.steps == sum(line.step is not None for line in packed)


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

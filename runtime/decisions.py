"""The decision log: every input of the scheduler in order, so that a run can be decided again.

JSON lines. The first is a header (plan hash, policy); then, in the order in which the engine did
them: arrivals with the time read, cancellations, packing attempts with the time read and the step
that came of them (None where nothing could run), and results with stage times, end and stops. The
last line says that the engine was closed, so that a log of which a part is missing is noticed.
`replay` feeds them to a fresh engine and compares every step: the same log gives the same schedule,
whether it was written by a live run or by a simulation.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import msgspec
import numpy as np
from msgspec import Struct

from plans.codec import content_hash
from plans.errors import BundleMismatch, InvalidFile, MedhaError, UsageError
from plans.plan import Plan
from runtime.decision_rules import Rules
from runtime.engine import Engine
from runtime.executor.base import Step, StepResult
from runtime.outputs import written_whole
from runtime.request import Record, Request
from runtime.scheduler import load_policy

Target = Literal["ttft_target_s", "tbt_target_s"]


class Header(Struct, frozen=True, kw_only=True, tag="header", forbid_unknown_fields=True):
    """What was decided for and by whom."""

    plan_hash: str
    policy: str
    learn: bool
    """Whether measured steps corrected the step-time formula."""
    ahead: bool = False
    """Whether decodes were packed before their last token was there."""


class Arrived(Struct, frozen=True, kw_only=True, tag="arrived", forbid_unknown_fields=True):
    """A request was admitted."""

    at_s: float
    request: Request
    infinite: tuple[Target, ...] = ()
    """Targets of the request that are infinite, which JSON cannot say."""


class Cancelled(Struct, frozen=True, kw_only=True, tag="cancelled", forbid_unknown_fields=True):
    """A request was cancelled from outside."""

    at_s: float
    request: int


class Packed(Struct, frozen=True, kw_only=True, tag="packed", forbid_unknown_fields=True):
    """The packer was asked for a step."""

    at_s: float
    step: dict[str, Any] | None
    """Fields of the step; None where nothing could run."""


class Collected(Struct, frozen=True, kw_only=True, tag="collected", forbid_unknown_fields=True):
    """A step ended."""

    step_id: int
    stage_s: tuple[float, ...]
    finished_s: float
    stops: dict[int, str]
    """Requests that ended by their text, with the reason."""


class Closed(Struct, frozen=True, kw_only=True, tag="closed", forbid_unknown_fields=True):
    """The run was over; the last line."""

    at_s: float
    reason: str
    """What the requests ended by that were left."""
    lines: int
    """Lines before this one."""


Line = Header | Arrived | Cancelled | Packed | Collected | Closed


class Replayed(Struct, frozen=True, kw_only=True):
    """What came of a replay."""

    steps: int
    records: tuple[Record, ...]


class ReplayMismatch(MedhaError):
    """The same inputs gave another step: the log, the plan or the code is not the same."""


class DecisionLog:
    """Writes lines as the engine works; give one to the engine."""

    def __init__(
        self,
        file: IO[bytes],
        plan: Plan,
        policy: str,
        *,
        learn: bool = False,
        ahead: bool = False,
    ) -> None:
        """Writes the header."""
        self._file = file
        self._encoder = msgspec.json.Encoder()
        self._lines = 0
        self._write(Header(plan_hash=content_hash(plan), policy=policy, learn=learn, ahead=ahead))

    def arrived(self, request: Request, now_s: float) -> None:
        """Notes an admission."""
        targets: tuple[Target, ...] = ("ttft_target_s", "tbt_target_s")
        infinite = tuple(each for each in targets if getattr(request, each) == math.inf)
        self._write(Arrived(at_s=now_s, request=request, infinite=infinite))

    def cancelled(self, number: int, now_s: float) -> None:
        """Notes a cancellation."""
        self._write(Cancelled(at_s=now_s, request=number))

    def packed(self, step: Step | None, now_s: float) -> None:
        """Notes an attempt to pack."""
        self._write(Packed(at_s=now_s, step=None if step is None else plain(step)))

    def collected(self, result: StepResult, stops: dict[int, str]) -> None:
        """Notes the end of a step."""
        self._write(
            Collected(
                step_id=result.step.step_id,
                stage_s=result.stage_s,
                finished_s=result.finished_s,
                stops=stops,
            )
        )

    def closed(self, reason: str, now_s: float) -> None:
        """Ends the log."""
        self._write(Closed(at_s=now_s, reason=reason, lines=self._lines))

    def _write(self, line: Line) -> None:
        self._file.write(self._encoder.encode(line) + b"\n")
        self._lines += 1


@contextmanager
def decision_log(
    path: Path | None, plan: Plan, policy: str, *, learn: bool = False, ahead: bool = False
) -> Iterator[DecisionLog | None]:
    """A log that appears under its name when the run is over; None where none is wanted.

    learn, ahead  what the engine was made with
    """
    if path is None:
        yield None
        return
    with written_whole(path) as partial, partial.open("wb") as file:
        yield DecisionLog(file, plan, policy, learn=learn, ahead=ahead)


def plain(step: Step) -> dict[str, Any]:
    """A step as JSON can hold it."""
    fields: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(step, enc_hook=_listed))
    return fields


def _listed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value)} has no place in a step")


def read_log(path: Path) -> Iterator[Line]:
    """Lines of a log; raises InvalidFile with the line number."""
    decoder = msgspec.json.Decoder(Line)
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                try:
                    yield decoder.decode(text)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                    raise InvalidFile(str(path), f"line {number}", str(error)) from None
    except OSError as error:
        raise InvalidFile(str(path), "", f"cannot be read: {error.strerror}") from None


class _Scripted:
    """Clock and executor of a replay: time is what the log says, steps go nowhere."""

    def __init__(self) -> None:
        self.at_s = 0.0

    def now_s(self) -> float:
        return self.at_s

    def sleep_until(self, at_s: float) -> None:
        self.at_s = at_s

    def can_submit(self) -> bool:
        return False

    def submit(self, step: Step) -> None:
        raise AssertionError("a replay submits nothing")

    def in_flight(self) -> int:
        return 0

    def wait(self, *, until_s: float | None) -> list[StepResult]:
        return []


def replay(plan: Plan, lines: Iterable[Line], where: str = "decision log") -> Replayed:
    """Decides a run again and compares step by step.

    errors  InvalidFile for a log without header or end, or with a line that no engine writes;
            BundleMismatch for another plan; ReplayMismatch at the first step that differs
    """
    rest = iter(lines)
    header = next(rest, None)
    if not isinstance(header, Header):
        raise InvalidFile(where, "line 1", "a decision log starts with its header")
    if header.plan_hash != content_hash(plan):
        raise BundleMismatch(
            f"{where} was written for the plan {header.plan_hash[:12]}, "
            f"this one is {content_hash(plan)[:12]}"
        )
    run = _Replay(plan, header, where)
    for line in rest:
        run.take(line)
    run.check_end()
    return Replayed(steps=run.engine.book.steps, records=tuple(run.engine.records))


class _Replay:
    """An engine that is led through a log."""

    def __init__(self, plan: Plan, header: Header, where: str) -> None:
        self._where = where
        self._closed = False
        self._script = _Scripted()
        self._stops: dict[int, str] = {}
        self._rules = Rules(plan, where)
        try:
            scheduling = load_policy(header.policy, plan.scheduler)
        except UsageError as error:
            self._rules.fail("policy", str(error))
        self.engine = Engine(
            plan,
            self._script,
            self._script,
            scheduling,
            on_token=lambda number, _: self._stops.get(number),
            learn=header.learn,
            ahead=header.ahead,
        )

    def take(self, line: Line) -> None:
        """Does what the line says."""
        rules = self._rules
        rules.line += 1
        if self._closed:
            rules.fail("", "stands behind the end")
        match line:
            case Arrived():
                rules.now(line.at_s)
                live = self.engine.book.sequences
                rules.arrived(line.request, line.infinite, line.at_s, live)
                infinite = dict.fromkeys(line.infinite, math.inf)
                request = msgspec.structs.replace(line.request, **infinite)
                self.engine.admit(request, line.at_s)
            case Cancelled():
                rules.now(line.at_s)
                rules.number("request", line.request)
                self.engine.forget(line.request, line.at_s)
            case Packed():
                rules.now(line.at_s)
                self._pack(line)
            case Collected():
                step = rules.collected(line.step_id, line.stage_s, line.finished_s, line.stops)
                self._stops = line.stops
                self.engine.collect(_result(step, line))
            case Closed():
                rules.now(line.at_s)
                rules.closed(line.reason, line.lines)
                self._script.at_s = line.at_s
                self.engine.close(line.reason)
                self._closed = True
            case Header():
                rules.fail("", "is a second header")

    def check_end(self) -> None:
        """Raises InvalidFile where the log breaks off."""
        if not self._closed:
            problem = "the log breaks off: its last line must say that the engine was closed"
            self._rules.fail("", problem)

    def _pack(self, line: Packed) -> None:
        step = self.engine.decide(line.at_s)
        found = None if step is None else plain(step)
        if found != line.step:
            raise ReplayMismatch(
                f"{self._where}: line {self._rules.line}: at {line.at_s} s the log has\n"
                f"  {line.step}\nand now it is\n  {found}"
            )
        if step is not None:
            self._rules.packed(step, line.at_s)


def _result(step: Step, line: Collected) -> StepResult:
    sampling = [chunk.request for chunk in step.chunks if chunk.samples]
    return StepResult(
        step=step,
        tokens=dict.fromkeys([*step.decodes.tolist(), *sampling], 0),
        stage_s=line.stage_s,
        finished_s=line.finished_s,
    )

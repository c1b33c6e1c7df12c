"""What each line of a decision log must keep to, so that only what an engine did is decided again.

The schema says what a line looks like; here is what it may say after the lines before it. A log is
written by one engine with one clock: its times never run backwards, its steps end in the order in
which they were packed, and its requests are such as an engine admits.
"""

import math
from collections import deque
from collections.abc import Container, Mapping, Sequence
from typing import NoReturn

from plans.errors import InvalidFile
from plans.plan import Plan
from runtime.executor.base import Step
from runtime.request import Request

LAST_S = 1e18
"""Above the latest time of any run: ten million requests, one in 1e9 seconds."""
NUMBER_MAX = 2**63 - 1
"""Of a request: the engine keeps numbers as int64."""
REASONS = ("failed", "unfinished")
"""What requests can be left by at the end."""
STOP = "stop"
"""What a request ends by on its text."""


class Rules:
    """Checks line after line; each check raises InvalidFile with line, field and nearest value."""

    def __init__(self, plan: Plan, where: str) -> None:
        """Before the second line of the log `where`."""
        self.line = 1
        """Number of the line that is checked."""
        self._where = where
        self._context = plan.limits.context_tokens
        self._stages = plan.parallelism.spp
        self._now_s = 0.0
        self._flying: deque[tuple[Step, float]] = deque()
        """Steps that have no result yet, with the times at which they were packed."""

    def fail(self, field: str, problem: str) -> NoReturn:
        """Raises InvalidFile for a field of the line, or for the line where that is empty."""
        place = f"line {self.line}, {field}" if field else f"line {self.line}"
        raise InvalidFile(self._where, place, problem)

    def now(self, at_s: float) -> None:
        """The time of the line."""
        self._time("at_s", at_s, self._now_s, "no line is earlier than the one before")
        self._now_s = at_s

    def arrived(
        self, request: Request, infinite: Sequence[str], at_s: float, live: Container[int]
    ) -> None:
        """An admission; `live` are the requests that have arrived and not ended."""
        self.number("request.number", request.number)
        if request.number in live:
            self.fail("request.number", f"request {request.number} has arrived and not ended")
        for field in ("prompt_tokens", "max_tokens"):
            found = getattr(request, field)
            if found < 1:
                self.fail(f"request.{field}", f"{found}; must be at least 1; nearest: 1")
        room = self._context - request.prompt_tokens
        if room < 1:
            problem = f"{request.prompt_tokens}; prompt and answer have {self._context} tokens"
            self.fail("request.prompt_tokens", f"{problem}; nearest: {self._context - 1}")
        if request.max_tokens > room:
            problem = f"{request.max_tokens}; prompt and answer have {self._context} tokens"
            self.fail("request.max_tokens", f"{problem}; nearest: {room}")
        arrival_s = request.arrival_s
        if not -LAST_S <= arrival_s <= at_s:
            nearest = min(max(arrival_s, -LAST_S), at_s)
            rule = f"an arrival is over when the request is admitted, at {at_s} s"
            self.fail("request.arrival_s", f"{arrival_s} s; {rule}; nearest: {nearest}")
        for field in infinite:
            if getattr(request, field) is not None:
                self.fail(f"request.{field}", "is said to be infinite; nearest: null")

    def number(self, field: str, number: int) -> None:
        """A request's number."""
        if not 0 <= number <= NUMBER_MAX:
            nearest = min(max(number, 0), NUMBER_MAX)
            self.fail(field, f"{number}; must be from 0 to {NUMBER_MAX}; nearest: {nearest}")

    def packed(self, step: Step, at_s: float) -> None:
        """Notes a step, which was found to be that of the log."""
        self._flying.append((step, at_s))

    def collected(
        self, step_id: int, stage_s: Sequence[float], finished_s: float, stops: Mapping[int, str]
    ) -> Step:
        """A result; the step that it is of."""
        if not self._flying:
            self.fail("step_id", f"step {step_id} has a result but was not packed")
        step, packed_s = self._flying.popleft()
        if step_id != step.step_id:
            rule = "steps end in the order in which they were packed, each once"
            self.fail("step_id", f"{step_id}; {rule}; nearest: {step.step_id}")
        if len(stage_s) != self._stages:
            self.fail("stage_s", f"{len(stage_s)} times; the plan has {self._stages} stages")
        for index, seconds in enumerate(stage_s):
            self._time(f"stage_s[{index}]", seconds, 0.0, "a stage takes time")
        rule = f"the step was packed at {packed_s} s"
        self._time("finished_s", finished_s, packed_s, rule)
        sampled = {*step.decodes.tolist(), *(each.request for each in step.chunks if each.samples)}
        for number, reason in stops.items():
            if number not in sampled:
                nearest = f"one of {sorted(sampled)}" if sampled else "no stops"
                rule = f"step {step_id} gave it no token"
                self.fail("stops", f"request {number}; {rule}; nearest: {nearest}")
            if reason != STOP:
                self.fail(f"stops.{number}", f"{reason!r}; nearest: {STOP!r}")
        return step

    def closed(self, reason: str, lines: int) -> None:
        """The end."""
        if reason not in REASONS:
            self.fail("reason", f"{reason!r}; must be one of {', '.join(REASONS)}")
        if lines != self.line - 1:
            problem = f"ends a log of {lines} lines before it, and here are {self.line - 1}"
            self.fail("", problem)

    def _time(self, field: str, seconds: float, least_s: float, rule: str) -> None:
        if not least_s <= seconds <= LAST_S:
            nearest = least_s if math.isnan(seconds) else min(max(seconds, least_s), LAST_S)
            span = f"must be from {least_s} to {LAST_S:g}: {rule}"
            self.fail(field, f"{seconds} s; {span}; nearest: {nearest}")

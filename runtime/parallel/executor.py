"""Executor over many ranks: steps go to all of them, the last stage's tokens come back.

Several steps are in flight: one a stage, and one more while none of them yields a token, since then
no request waits for a result. At most two stand before stage 0, the one that runs and the next, so
that stage 0 never waits for a round trip and a step is packed no earlier than that takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from plans.mesh import coordinates
from plans.plan import Plan
from runtime.clock import Clock
from runtime.executor.base import Step, StepResult
from runtime.parallel import wire
from runtime.parallel.control import LOOK_S, Workers
from runtime.parallel.table import RequestTable, step_groups
from runtime.sampling_params import SamplingParams

FIRST_STAGE_QUEUE = 2


@dataclass(kw_only=True)
class StageTimes:
    """Sums over what one stage's groups have told, a report for each step and group."""

    seconds: float = 0.0
    """At work, exchanges of the tp and kvp groups included."""
    merge_s: float = 0.0
    """Of these, in the exchange of the kvp groups."""
    waited_s: float = 0.0
    """Between steps: bubbles, and times without any request."""
    reports: int = 0


@dataclass(kw_only=True)
class _Flying:
    """A step that has been sent and not yet handed back."""

    step: Step
    samples: bool
    waiting: list[set[int]]
    """By stage, groups whose word is missing."""
    stage_s: list[float]
    """By stage, of the slowest group that has spoken."""
    tokens: dict[int, int] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether the last stage's groups have spoken."""
        return not self.waiting[-1]


class ParallelExecutor:
    """Executor of runtime/executor/base.py for all ranks of one replica."""

    feeds_back = False
    """Tokens travel to the first stage with the next step."""

    def __init__(self, plan: Plan, workers: Workers, clock: Clock, *, graphs: bool = True) -> None:
        """Starts from empty tables on all ranks.

        graphs  run decode steps by graph where the ranks have recorded them
        """
        self.stages = [StageTimes() for _ in range(plan.parallelism.spp)]
        """What the stages have spent so far."""
        self._plan = plan
        self._workers = workers
        self._clock = clock
        self._table = RequestTable()
        self._flying: dict[int, _Flying] = {}
        self._new: dict[int, tuple[Sequence[int], SamplingParams]] = {}
        """Requests that no step has named yet, so that no rank knows them."""
        self._sampled: list[tuple[int, int]] = []
        self._stage_s = [0.0 for _ in self.stages]
        """Newest time of each stage, for a step whose earlier stage has not yet spoken."""
        self._run = workers.start(graphs=graphs)

    def add_request(self, number: int, prompt: Sequence[int], sampling: SamplingParams) -> None:
        """Makes a request known, before the first step that holds a piece of it."""
        self._new[number] = (prompt, sampling)

    def known_requests(self) -> int:
        """Requests added and not ended."""
        return len(self._table) + len(self._new)

    def can_submit(self) -> bool:
        """Whether stage 0 takes another step, and none would have to wait for its tokens."""
        most = len(self.stages)
        if not any(flying.samples for flying in self._flying.values()):
            most += 1
        if len(self._flying) >= most:
            return False
        before = sum(bool(flying.waiting[0]) for flying in self._flying.values())
        return before < FIRST_STAGE_QUEUE

    def submit(self, step: Step) -> None:
        """Sends a step to all ranks."""
        added = self._named_first_by(step)
        self._table.apply(step)
        groups = step_groups(self._plan, step)
        message = wire.to_message(step, tuple(added), tuple(self._sampled), self._table.totals())
        self._sampled = []
        self._flying[step.step_id] = _Flying(
            step=step,
            samples=bool(len(step.decodes)) or any(chunk.samples for chunk in step.chunks),
            waiting=[set(groups) for _ in self.stages],
            stage_s=[0.0 for _ in self.stages],
        )
        self._workers.send_step(message)

    def _named_first_by(self, step: Step) -> list[wire.Added]:
        """The requests to make known with a step, now in the table: no prompt travels earlier."""
        added = []
        for number in dict.fromkeys((*step.decodes.tolist(), *(c.request for c in step.chunks))):
            if number in self._new:
                prompt, sampling = self._new.pop(number)
                self._table.add(number, prompt, sampling)
                added.append(wire.added(number, prompt, sampling))
        for number in step.ended:  # before it ever ran
            self._new.pop(number, None)
        return added

    def in_flight(self) -> int:
        """Steps submitted and not yet collected."""
        return len(self._flying)

    def wait(self, *, until_s: float | None) -> list[StepResult]:
        """Waits until a step ends, stage 0 takes another one, or until_s; results in order.

        Comes back after LOOK_S in any case, so that the caller may look for other reasons to stop.
        Raises MedhaError where a rank is gone, silent or stuck.
        """
        could_submit = self.can_submit()
        latest_s = self._clock.now_s() + LOOK_S
        until_s = latest_s if until_s is None else min(until_s, latest_s)
        while True:
            left_s = max(until_s - self._clock.now_s(), 0.0)
            for message in self._workers.poll(left_s, in_flight=bool(self._flying)):
                if isinstance(message, wire.StageDone) and message.run == self._run:
                    self._take(message)
            results = self._finished()
            frees = self.can_submit() and not could_submit
            if results or frees or left_s == 0.0:
                return results

    def _take(self, done: wire.StageDone) -> None:
        place = coordinates(self._plan.parallelism, done.rank)
        times = self.stages[place.stage]
        times.seconds += done.seconds
        times.merge_s += done.merge_s
        times.waited_s += done.waited_s
        times.reports += 1
        self._stage_s[place.stage] = done.seconds
        flying = self._flying.get(done.step_id)
        if flying is not None:  # an earlier stage's word may come after the last one's
            flying.waiting[place.stage].discard(place.group)
            flying.tokens.update(done.tokens)
            flying.stage_s[place.stage] = max(flying.stage_s[place.stage], done.seconds)

    def _finished(self) -> list[StepResult]:
        """Steps at the head of the line that have left the last stage."""
        results = []
        while self._flying:
            step_id = next(iter(self._flying))
            flying = self._flying[step_id]
            if not flying.done:
                break
            del self._flying[step_id]
            tokens = tuple(flying.tokens.items())
            self._table.append(tokens)
            self._sampled += tokens
            results.append(
                StepResult(
                    step=flying.step,
                    tokens=flying.tokens,
                    stage_s=tuple(
                        known or newest
                        for known, newest in zip(flying.stage_s, self._stage_s, strict=True)
                    ),
                    finished_s=self._clock.now_s(),
                )
            )
        return results

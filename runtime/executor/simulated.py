"""Runs steps in virtual time: each stage takes as long as the step-time formula says.

A step enters the first stage when it is submitted and that stage is free, and every later stage
when it left the one before and the step before it left this one. Nothing is computed.

One rank on a GPU keeps a step ahead when it runs live, so that an arrival waits for the step that
runs and perhaps for the next: AheadExecutor does so in virtual time.
"""

import math
from collections import deque

from msgspec import Struct

from plans.chunks import idle_queries, query_tile
from plans.plan import Plan
from runtime.clock import VirtualClock
from runtime.executor.ahead import Ahead
from runtime.executor.base import Step, StepResult
from runtime.scheduler.loads import GroupLoads

NEVER_S = float("inf")


class Host(Struct, frozen=True, kw_only=True):
    """What the host of one rank takes, seconds; nothing where a plan's formula is all there is."""

    decide_s: float = 0.0
    """Packing a step."""
    chunk_s: float = 0.0
    """Launching a step with chunks."""
    decode_s: float = 0.0
    """Launching a step of decodes alone."""
    poll_s: float = 0.0
    """Between two looks at what the device is at; 0 sees everything at once."""


NO_HOST = Host()


class SimulatedExecutor:
    """Executor over a virtual clock, for any number of stages and KVP groups."""

    feeds_back = False
    """Whether a step may name a decode whose last token is still in flight."""

    def __init__(self, plan: Plan, clock: VirtualClock) -> None:
        """The clock must be the engine's."""
        self._plan = plan
        self._clock = clock
        self._free_s = [0.0] * plan.parallelism.spp
        self._results: deque[StepResult] = deque()

    def can_submit(self) -> bool:
        """Whether the first stage is idle and no later stage has a queue before it.

        More steps than stages would only wait, and decodes in them with them.
        """
        return len(self._results) < len(self._free_s) and self._free_s[0] <= self._clock.now_s()

    def submit(self, step: Step) -> None:
        """Walks the step through the stages at once; wait() hands out the result in time."""
        stage_s = self.stages_s(step)
        leave_s = self._clock.now_s()
        for stage, seconds in enumerate(stage_s):
            leave_s = max(leave_s, self._free_s[stage]) + seconds
            self._free_s[stage] = leave_s
        self._results.append(StepResult(step=step, tokens={}, stage_s=stage_s, finished_s=leave_s))

    def stages_s(self, step: Step) -> tuple[float, ...]:
        """What a step takes in each stage, seconds."""
        loads = GroupLoads(
            self._plan.step_time,
            groups=self._plan.parallelism.kvp,
            shard_tokens=self._plan.kv.tokens_per_kvp_shard,
        )
        loads.add_step(step)
        return loads.stages_s()

    def in_flight(self) -> int:
        """Steps whose result was not handed out."""
        return len(self._results)

    def wait(self, *, until_s: float | None) -> list[StepResult]:
        """Moves the clock to the next event: a step ends, the first stage frees, or until_s."""
        clock, results = self._clock, self._results
        wake_s = results[0].finished_s if results else NEVER_S
        first_free_s = self._free_s[0]
        if clock.now_s() < first_free_s < wake_s:
            wake_s = first_free_s
        if until_s is not None and until_s < wake_s:
            wake_s = until_s
        if wake_s < NEVER_S:
            clock.sleep_until(wake_s)
        now_s = clock.now_s()
        done = []
        while results and results[0].finished_s <= now_s:
            done.append(results.popleft())
        return done


class AheadExecutor(SimulatedExecutor):
    """One rank that takes a step while one runs, by the rule and in the order of the live one.

    A launch holds up the host, and with it the virtual clock; a step runs from then on, when the
    one before it has ended, and does not end before its launch has.
    """

    feeds_back = True

    def __init__(self, plan: Plan, clock: VirtualClock, *, host: Host = NO_HOST) -> None:
        """The clock must be the engine's."""
        super().__init__(plan, clock)
        self._host = host
        self._ahead = Ahead(plan)
        self._tile = query_tile(plan.model.group)
        self._query_key_s = plan.step_time.pair_s * plan.model.layers

    def stages_s(self, step: Step) -> tuple[float, ...]:
        """The formula's, whose chunks fill their tiles of queries, and what these leave idle."""
        [seconds] = super().stages_s(step)
        idle = sum(
            idle_queries(self._tile, each.prefix, each.tokens) * (each.prefix + each.tokens)
            for each in step.chunks
        )
        return (seconds + idle * self._query_key_s,)

    def can_submit(self) -> bool:
        """Whether nothing is under way, or one step that may soon end."""
        return self._clock.now_s() >= self._ahead.takes_at_s()

    def submit(self, step: Step) -> None:
        """Launches the step, which takes the host its time."""
        clock, host = self._clock, self._host
        clock.sleep_until(clock.now_s() + host.decide_s)
        began_s = clock.now_s()
        clock.sleep_until(began_s + (host.chunk_s if step.chunks else host.decode_s))
        now_s = clock.now_s()
        starts_s = max(self._free_s[0], began_s)
        ends_s = max(starts_s + sum(self.stages_s(step)), now_s)
        self._free_s[0] = ends_s
        self._results.append(
            StepResult(step=step, tokens={}, stage_s=(ends_s - starts_s,), finished_s=ends_s)
        )
        self._ahead.launched(step, began_s=began_s, now_s=now_s)

    def wait(self, *, until_s: float | None) -> list[StepResult]:
        """Moves the clock until a step has ended, another is taken, or until_s."""
        clock, results = self._clock, self._results
        if not results:
            if until_s is not None:
                clock.sleep_until(until_s)
            return []
        wake_s = results[0].finished_s
        if not self.can_submit():
            wake_s = min(wake_s, self._ahead.takes_at_s())
        if until_s is not None:
            wake_s = min(wake_s, until_s)
        clock.sleep_until(self._seen_s(wake_s))
        now_s = clock.now_s()
        if results[0].finished_s > now_s:
            return []
        done = results.popleft()
        [seconds] = done.stage_s
        self._ahead.collected(seconds, now_s)
        return [
            StepResult(step=done.step, tokens={}, stage_s=done.stage_s, finished_s=now_s),
        ]

    def _seen_s(self, at_s: float) -> float:
        """When the host notices what happens at a time."""
        now_s, poll_s = self._clock.now_s(), self._host.poll_s
        if not poll_s or at_s <= now_s:
            return at_s
        return now_s + math.ceil((at_s - now_s) / poll_s) * poll_s

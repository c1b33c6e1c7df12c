"""Runs steps in virtual time: each stage takes as long as the step-time formula says.

A step enters the first stage when it is submitted and that stage is free, and every later stage
when it left the one before and the step before it left this one. Nothing is computed.
"""

from collections import deque

from plans.plan import Plan
from runtime.clock import VirtualClock
from runtime.executor.base import Step, StepResult
from runtime.scheduler.loads import GroupLoads


class SimulatedExecutor:
    """Executor over a virtual clock, for any number of stages and KVP groups."""

    def __init__(self, plan: Plan, clock: VirtualClock) -> None:
        """The clock must be the engine's."""
        self._plan = plan
        self._clock = clock
        self._free_s = [0.0] * plan.parallelism.spp
        self._results: deque[StepResult] = deque()

    def can_submit(self) -> bool:
        """Whether the first stage is idle."""
        return self._free_s[0] <= self._clock.now_s()

    def submit(self, step: Step) -> None:
        """Walks the step through the stages at once; wait() hands out the result in time."""
        leave_s = self._clock.now_s()
        stage_s = []
        for stage in range(len(self._free_s)):
            seconds = self._stage_s(stage, step)
            leave_s = max(leave_s, self._free_s[stage]) + seconds
            self._free_s[stage] = leave_s
            stage_s.append(seconds)
        self._results.append(
            StepResult(step=step, tokens={}, stage_s=tuple(stage_s), finished_s=leave_s)
        )

    def _stage_s(self, stage: int, step: Step) -> float:
        loads = GroupLoads(
            self._plan.step_time,
            groups=self._plan.parallelism.kvp,
            shard_tokens=self._plan.kv.tokens_per_kvp_shard,
            stage=stage,
        )
        loads.add_decodes(step.decode_prefix, step.decode_home)
        for chunk in step.chunks:
            loads.add_chunk(chunk.home, chunk.tokens, chunk.prefix)
        return loads.seconds()

    def in_flight(self) -> int:
        """Steps whose result was not handed out."""
        return len(self._results)

    def wait(self, *, until_s: float | None) -> list[StepResult]:
        """Moves the clock to the next event: a step ends, the first stage frees, or until_s."""
        now_s = self._clock.now_s()
        events = [self._results[0].finished_s] if self._results else []
        if self._free_s[0] > now_s:
            events.append(self._free_s[0])
        if until_s is not None:
            events.append(until_s)
        if events:
            self._clock.sleep_until(min(events))
        now_s = self._clock.now_s()
        done = []
        while self._results and self._results[0].finished_s <= now_s:
            done.append(self._results.popleft())
        return done

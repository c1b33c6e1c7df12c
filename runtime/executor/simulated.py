"""Runs steps in virtual time: each stage takes as long as the step-time formula says.

A step enters the first stage when it is submitted and that stage is free, and every later stage
when it left the one before and the step before it left this one. Nothing is computed.
"""

from collections import deque

from plans.plan import Plan
from runtime.clock import VirtualClock
from runtime.executor.base import Step, StepResult
from runtime.scheduler.loads import GroupLoads

NEVER_S = float("inf")


class SimulatedExecutor:
    """Executor over a virtual clock, for any number of stages and KVP groups."""

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

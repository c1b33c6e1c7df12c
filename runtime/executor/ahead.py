"""When a step is taken behind the one that runs, where tokens are fed back on the device.

Two steps are under way at most, the one that runs and the next, so that the device never waits for
the host. A step that is packed early is a step that an arrival has just missed: behind a long one
the next is therefore taken late, when what runs has most of its expected time behind it, less what
the host needs to launch. Decode steps alone are short, and the next is taken at once.

The rule is one for live runs (runtime/executor/live.py) and for virtual time (simulated.py).
"""

from collections import deque

from plans.plan import Plan
from runtime.executor.base import Step
from runtime.scheduler.loads import GroupLoads

SURE_SHARE = 0.85
"""Share of a step's expected time in which it certainly does not end."""
LEARNING_RATE = 0.2
"""Weight of the newest step in what is learnt."""
NEVER_S, AT_ONCE_S = float("inf"), float("-inf")


def keeps_ahead(plan: Plan) -> bool:
    """Whether whoever runs the plan keeps a step ahead: one rank alone, and on a GPU."""
    return plan.parallelism.ranks == 1 and not plan.topology.device.startswith("cpu")


class Ahead:
    """The steps under way on one device, and what was learnt of them."""

    def __init__(self, plan: Plan) -> None:
        """None is under way."""
        self._plan = plan
        self._flying: deque[float] = deque()
        """Predicted seconds of each step that was launched and not collected; 0 without chunks."""
        self._began_s = 0.0
        """When the oldest of them began to run."""
        self._ratio = 0.0
        """Measured over predicted time of steps with chunks, as learnt so far."""
        self._lead_s = 0.0
        """What launching such a step takes the host."""

    def takes_at_s(self) -> float:
        """From when on another step is taken; never before one of two has been collected."""
        if not self._flying:
            return AT_ONCE_S
        if len(self._flying) > 1:
            return NEVER_S
        expected_s = SURE_SHARE * min(self._ratio, 1.0) * self._flying[0]
        return self._began_s + expected_s - self._lead_s

    def launched(self, step: Step, *, began_s: float, now_s: float) -> None:
        """A step was launched: when the host began with it, and the time when it is done."""
        if not self._flying:
            self._began_s = began_s
        predicted_s = 0.0
        if step.chunks:
            kv = self._plan.kv
            loads = GroupLoads(
                self._plan.step_time,
                groups=self._plan.parallelism.kvp,
                shard_tokens=kv.tokens_per_kvp_shard,
            )
            loads.add_step(step)
            predicted_s = loads.seconds()
            self._lead_s += LEARNING_RATE * (now_s - began_s - self._lead_s)
        self._flying.append(predicted_s)

    def collected(self, seconds: float, now_s: float) -> None:
        """The oldest step ended after so many seconds on the device."""
        predicted_s = self._flying.popleft()
        if predicted_s:
            self._ratio += LEARNING_RATE * (seconds / predicted_s - self._ratio)
        self._began_s = now_s

    def forget(self) -> None:
        """Nothing was learnt: steps of a warm-up load and compile, which no other does."""
        self._ratio = self._lead_s = 0.0

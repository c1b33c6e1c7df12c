"""The simulated executor that keeps a step ahead decides as the live one, to the last byte.

Both engines write their decision log: every time read, every step packed, every end. The live
executor runs its program on a CPU, over a clock and a device that follow a script; all times of the
script are multiples of 2^-20 s, so that sums of them are exact and logs can be compared as bytes.
"""

import io
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bundles import TOY_FILES, TOY_VOCAB, toy_plan, write_bundle

from plans.plan import Plan
from runtime.clock import VirtualClock
from runtime.decisions import DecisionLog, read_log, replay
from runtime.engine import Engine
from runtime.executor.base import Step
from runtime.executor.live import LiveExecutor
from runtime.executor.simulated import AheadExecutor, Host, SimulatedExecutor
from runtime.program import StageProgram, load_bundle
from runtime.request import Request
from runtime.sampling_params import SamplingParams
from runtime.scheduler import load_policy

TICK_S = 2.0**-20
POLL_S = 2.0**-14
HOSTS = [
    Host(poll_s=POLL_S),
    Host(poll_s=POLL_S, chunk_s=2**-11, decode_s=2**-13, decide_s=2**-12),
    Host(poll_s=POLL_S, chunk_s=2**-6, decode_s=2**-9),  # launches take longer than the device
]


def scripted_s(plan: Plan, clock: VirtualClock, step: Step, slower: float) -> float:
    """What the device takes: the formula's time in ticks, more for steps with chunks."""
    seconds = sum(SimulatedExecutor(plan, clock).stages_s(step))
    return round(seconds / TICK_S) * TICK_S * (slower if step.chunks else 1.0)


class Script:
    """The device of the live executor: it stands in for the stopwatch, and holds up the host."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.free_s = 0.0
        self.step_s = self.launch_s = 0.0
        self.started_s: float | None = None

    def mark(self) -> float:
        """The first mark of a step is where it starts, the second is reached when it has ended."""
        if self.started_s is None:
            self.started_s = max(self.free_s, self.clock.now_s())
            return self.started_s
        self.clock.sleep_until(self.clock.now_s() + self.launch_s)
        self.free_s = max(self.started_s + self.step_s, self.clock.now_s())
        self.started_s = None
        return self.free_s

    def reached(self, mark: float) -> bool:
        return self.clock.now_s() >= mark

    def seconds(self, first: float, last: float) -> float:
        return last - first


class ScriptedLive(LiveExecutor):
    """The live executor on such a device."""

    def __init__(self, plan, program, clock, host, slower) -> None:  # type: ignore[no-untyped-def]
        super().__init__(plan, program, {}, clock=clock, ahead=True)
        self.script = self._watch = Script(clock)  # type: ignore[assignment]
        self.host, self.slower, self.deepest = host, slower, 0

    def submit(self, step: Step) -> None:
        script, clock = self.script, self.script.clock
        clock.sleep_until(clock.now_s() + self.host.decide_s)
        script.step_s = scripted_s(self._plan, clock, step, self.slower)
        script.launch_s = self.host.chunk_s if step.chunks else self.host.decode_s
        super().submit(step)
        self.deepest = max(self.deepest, self.in_flight())


class ScriptedAhead(AheadExecutor):
    """The simulated executor with the same times."""

    def __init__(self, plan: Plan, clock: VirtualClock, host: Host, slower: float) -> None:
        super().__init__(plan, clock, host=host)
        self._slower = slower

    def stages_s(self, step: Step) -> tuple[float, ...]:
        return (scripted_s(self._plan, self._clock, step, self._slower),)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> StageProgram:
    folder = write_bundle(tmp_path_factory.mktemp("toy"), toy_plan(), TOY_FILES)
    return load_bundle(folder).load_stage(0)


def crowded_plan(policy: str, pages: int) -> Plan:
    plan = toy_plan()
    return msgspec.structs.replace(
        plan,
        kv=msgspec.structs.replace(plan.kv, pages_per_rank=pages),
        scheduler=msgspec.structs.replace(
            plan.scheduler, policy=policy, long_tokens=100, min_chunk_tokens=4
        ),
    )


def log_of(plan: Plan, executor, clock: VirtualClock, asked: list[Request]) -> bytes:  # type: ignore[no-untyped-def]
    file = io.BytesIO()
    policy = plan.scheduler.policy
    engine = Engine(
        plan,
        executor,
        clock,
        load_policy(policy, plan.scheduler),
        log=DecisionLog(file, plan, policy, learn=True, ahead=True),
        learn=True,
        ahead=True,
    )
    for request in asked:
        engine.add(request)
    engine.run()
    engine.close()
    assert len(engine.records) == len(asked)
    return file.getvalue()


def live_log(
    plan: Plan, program: StageProgram, host: Host, slower: float, asked: list[Request]
) -> tuple[bytes, int]:
    """The log of a live run, and how many steps were in flight at most."""
    clock = VirtualClock()
    live = ScriptedLive(plan, program, clock, host, slower)
    for request in asked:
        places = range(request.prompt_tokens)
        prompt = [(7 * request.number + place) % TOY_VOCAB for place in places]
        live.add_request(request.number, prompt, SamplingParams())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.executor.live.POLL_S", POLL_S)
        sleeping = SimpleNamespace(sleep=lambda each: clock.sleep_until(clock.now_s() + each))
        patch.setattr("runtime.executor.live.time", sleeping)
        return log_of(plan, live, clock, asked), live.deepest


@st.composite
def asked_in_ticks(draw: st.DrawFn) -> list[Request]:
    arrivals = sorted(draw(st.lists(st.integers(0, 1 << 16), min_size=1, max_size=10)))
    found = []
    for number, ticks in enumerate(arrivals):
        prompt = draw(st.one_of(st.integers(1, 30), st.integers(1, 230)))
        found.append(
            Request(
                number=number,
                arrival_s=ticks * TICK_S,
                prompt_tokens=prompt,
                max_tokens=draw(st.integers(1, min(25, 256 - prompt))),
            )
        )
    return found


@settings(max_examples=40)
@given(
    asked=asked_in_ticks(),
    host=st.sampled_from(HOSTS),
    slower=st.sampled_from([0.75, 1.0, 1.5]),
    policy=st.sampled_from(["lars-lanes", "lars", "fcfs"]),
    pages=st.sampled_from([18, 90]),
)
def test_virtual_time_gives_the_live_engines_log(program, *, asked, host, slower, policy, pages):
    plan = crowded_plan(policy, pages)
    measured, _ = live_log(plan, program, host, slower, asked)
    clock = VirtualClock()
    predicted = log_of(plan, ScriptedAhead(plan, clock, host, slower), clock, asked)
    assert predicted == measured


def test_the_step_behind_a_long_one_is_packed_late_and_holds_who_came_meanwhile(program, tmp_path):
    """What logs are compared for does happen: two steps in flight, and a late second."""
    plan = crowded_plan("fcfs", 90)
    asked = [
        Request(number=0, arrival_s=0.0, prompt_tokens=230, max_tokens=8),
        Request(number=1, arrival_s=3000 * TICK_S, prompt_tokens=8, max_tokens=8),
    ]
    log, deepest = live_log(plan, program, HOSTS[0], 1.0, asked)
    assert deepest == 2
    path = tmp_path / "decisions.jsonl"
    path.write_bytes(log)
    assert replay(plan, read_log(path)).steps > 1
    packed = [each for each in read_log(path) if getattr(each, "step", None)]
    meets = [
        each for each in packed if {chunk["request"] for chunk in each.step["chunks"]} == {0, 1}
    ]
    assert meets, "the short prompt was meant to share a step with the long one"

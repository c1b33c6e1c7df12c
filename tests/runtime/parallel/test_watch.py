"""Who is gone, silent or stuck, from beats and a time that the test makes up."""

from dataclasses import dataclass

import msgspec
from builders import make_plan

from plans.mesh import Parallelism
from runtime.parallel import wire
from runtime.parallel.control import GRACE_S, LOOK_S
from runtime.parallel.inbox import BEAT_S
from runtime.parallel.progress import COMPILES, COMPUTES, IDLE, LOADS, WAITS
from runtime.parallel.watch import SILENT_S, STALL_S, Watch

PLAN = make_plan(parallelism=Parallelism(spp=3))


@dataclass
class Child:
    """A process that ends when told."""

    exitcode: int | None = None


def beats(watch: Watch, now_s: float, phases: dict[int, str], moves: int = 0) -> None:
    for rank, phase in phases.items():
        watch.beat(wire.Beat(rank, 7, moves, phase), now_s)


def run(
    watch: Watch,
    seconds: float,
    phases: dict[int, str],
    *,
    moving: bool = False,
    start_s: float = 0,
) -> str | None:
    """Beats twice a second and looks as often; the first problem."""
    for tick in range(int(seconds / BEAT_S)):
        now_s = start_s + tick * BEAT_S
        beats(watch, now_s, phases, moves=tick if moving else 0)
        problem = watch.check(now_s, in_flight=True)
        if problem is not None:
            return problem
    return None


def test_every_failure_is_known_within_five_seconds():
    assert SILENT_S + BEAT_S + LOOK_S + GRACE_S < 5
    assert STALL_S + BEAT_S / 2 + LOOK_S < 5  # what has not moved needs no further beat to show


def test_a_killed_process_is_named_with_its_signal_before_those_that_fail_because_of_it():
    children = {0: Child(), 1: Child(exitcode=-9), 2: Child(exitcode=1)}
    watch = Watch(PLAN, children, 0.0)
    watch.place(wire.Hello(1, "node-a", 42, 3, "", "", None))
    assert watch.check(0.1, in_flight=False) == "rank 1 (node-a, pid 42) was killed by signal 9"


def test_an_ended_process_is_named_with_its_status():
    watch = Watch(PLAN, {0: Child(exitcode=3)}, 0.0)
    assert watch.check(0.1, in_flight=False) == "rank 0 ended with status 3"


def test_a_rank_without_beats_is_silent():
    watch = Watch(PLAN, {}, 0.0)
    assert run(watch, 2.0, {0: IDLE, 1: IDLE, 2: IDLE}, moving=True) is None
    problem = run(watch, 5.0, {0: COMPUTES, 2: IDLE}, moving=True, start_s=2.0)
    assert problem is not None
    assert problem.startswith("rank 1 sent no sign of life")


def test_a_rank_that_loads_may_be_silent_for_longer():
    watch = Watch(PLAN, {}, 0.0)
    assert run(watch, 2.0, dict.fromkeys(range(3), LOADS), moving=True) is None
    assert run(watch, 30.0, {0: IDLE, 2: IDLE}, moving=True, start_s=2.0) is None
    problem = run(watch, 60.0, {0: IDLE, 2: IDLE}, moving=True, start_s=32.0)
    assert problem is not None
    assert problem.startswith("rank 1 sent no sign of life")


def test_a_rank_that_computes_without_getting_on_is_stuck_and_those_that_wait_for_it_are_not():
    watch = Watch(PLAN, {}, 0.0)
    problem = run(watch, 10.0, {0: IDLE, 1: COMPUTES, 2: f"{WAITS} for stage 1"})
    assert problem is not None
    assert problem.startswith("rank 1 got no further")
    assert "at step 7" in problem


def test_ranks_that_all_wait_for_each_other_are_named_together():
    watch = Watch(PLAN, {}, 0.0)
    problem = run(watch, 10.0, dict.fromkeys(range(3), f"{WAITS} for kvp groups 1"))
    assert problem is not None
    assert problem.startswith("no rank got further")


def test_a_rank_may_compile_a_kernel_while_the_others_wait_for_it():
    watch = Watch(PLAN, {}, 0.0)
    phases = {0: COMPILES, 1: f"{WAITS} for stage 0", 2: IDLE}
    assert run(watch, 60.0, phases) is None
    problem = run(watch, 100.0, phases, start_s=60.0)
    assert problem is not None
    assert problem.startswith("rank 0 got no further")


def test_work_that_moves_is_never_stuck():
    watch = Watch(PLAN, {}, 0.0)
    assert run(watch, 60.0, dict.fromkeys(range(3), COMPUTES), moving=True) is None


def test_waiting_for_work_is_no_failure():
    watch = Watch(PLAN, {}, 0.0)
    for tick in range(100):
        beats(watch, tick * BEAT_S, dict.fromkeys(range(3), IDLE))
        assert watch.check(tick * BEAT_S, in_flight=False) is None


def test_a_driver_that_did_not_look_for_a_minute_suspects_nobody():
    watch = Watch(PLAN, {}, 0.0)
    assert run(watch, 2.0, dict.fromkeys(range(3), IDLE)) is None
    assert watch.check(62.0, in_flight=False) is None


def test_a_slow_machine_is_given_the_time_of_many_steps():
    slow = msgspec.structs.replace(PLAN.scheduler, idle_budget_s=2.0)
    watch = Watch(msgspec.structs.replace(PLAN, scheduler=slow), {}, 0.0)
    assert run(watch, 30.0, {0: COMPUTES, 1: IDLE, 2: IDLE}) is None

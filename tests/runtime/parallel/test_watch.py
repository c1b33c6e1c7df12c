"""Who is gone, silent or stuck, from beats and a time that the test makes up."""

from dataclasses import dataclass

import msgspec
import pytest
from builders import make_plan

from plans.mesh import Parallelism
from runtime.parallel import wire
from runtime.parallel.control import GRACE_S, LOOK_S
from runtime.parallel.inbox import BEAT_S, phase_of
from runtime.parallel.progress import COMPILES, COMPUTES, DEVICE, IDLE, LOADS, WAITS, Progress
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


@pytest.mark.parametrize(
    ("steps", "named"),
    [
        ((9, 8, 8), "rank 1 got no further"),  # stage 0 is beyond the step, stage 2 waits for it
        ((8, 8, 8), "rank 0 got no further"),
        ((9, 9, 8), "rank 2 got no further"),
    ],
)
def test_of_several_devices_that_do_not_end_their_work_the_first_in_line_is_named(steps, named):
    watch, problem, tick = Watch(PLAN, {}, 0.0), None, 0
    while problem is None and tick < 20:
        for rank, step_id in enumerate(steps):
            watch.beat(wire.Beat(rank, step_id, 0, DEVICE), tick * BEAT_S)
        problem = watch.check(tick * BEAT_S, in_flight=True)
        tick += 1
    assert problem is not None
    assert problem.startswith(named)
    assert ", at step" in problem


def test_all_ranks_of_a_stage_that_exchange_what_one_of_them_lacks_are_named():
    watch = Watch(make_plan(parallelism=Parallelism(tp=2, spp=2)), {}, 0.0)
    phases = {0: DEVICE, 1: DEVICE, 2: DEVICE, 3: DEVICE}
    problem = run(watch, 10.0, phases)
    assert problem is not None
    assert problem.startswith("rank 0, rank 1 got no further")


def test_a_device_that_waits_for_one_that_gets_on_is_not_stuck():
    watch = Watch(PLAN, {}, 0.0)
    for tick in range(60):
        watch.beat(wire.Beat(0, 8, tick, DEVICE), tick * BEAT_S)
        for rank in (1, 2):
            watch.beat(wire.Beat(rank, 8, 0, DEVICE), tick * BEAT_S)
        assert watch.check(tick * BEAT_S, in_flight=True) is None


def test_a_device_has_all_its_time_from_when_what_it_waited_for_is_there():
    watch = Watch(PLAN, {}, 0.0)
    for tick in range(30):
        now_s = tick * BEAT_S
        stage, begun = divmod(tick, 7)  # a stage takes 3.5 s; all later ones have queued its step
        for rank in range(3):
            step_id, phase = (9, COMPUTES) if rank < stage else (8, DEVICE)
            watch.beat(wire.Beat(rank, step_id, rank < stage and begun, phase), now_s)
        assert watch.check(now_s, in_flight=stage < 3) is None


def test_a_device_is_not_blamed_for_a_neighbour_that_has_compiled():
    watch = Watch(make_plan(parallelism=Parallelism(tp=2)), {}, 0.0)
    assert run(watch, 60.0, {0: COMPILES, 1: DEVICE}) is None
    assert run(watch, 3.0, {0: COMPUTES, 1: DEVICE}, moving=True, start_s=60.0) is None
    problem = run(watch, 10.0, {0: DEVICE, 1: DEVICE}, start_s=63.0)
    assert problem is not None
    assert problem.startswith("rank 0, rank 1 got no further")


def test_a_rank_that_only_looks_whether_its_device_is_done_does_not_move():
    progress = Progress()
    progress.step_id, progress.unfinished = 5, 3
    progress.rest()
    moves = progress.moves
    for _ in range(3):
        progress.rest()
    assert (progress.phase, progress.oldest_step, progress.moves) == (DEVICE, 3, moves)
    progress.finished(4)
    assert (progress.oldest_step, progress.moves) == (4, moves + 1)
    progress.finished(None)
    progress.rest()
    assert (progress.phase, progress.oldest_step) == (IDLE, 5)


def test_waiting_for_others_is_work_of_the_device_where_it_has_some():
    progress = Progress()
    progress.loading = False
    progress.enter(f"{WAITS} for stage 0")
    assert phase_of(progress) == f"{WAITS} for stage 0"
    progress.unfinished = 3
    assert phase_of(progress) == DEVICE


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

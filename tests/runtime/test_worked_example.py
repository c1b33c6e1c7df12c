"""The worked example of arXiv 2409.17264v5, section 4.1, through the real engine in virtual time.

A long request of 10 s of prefill and a deadline of 16 s at 0; two shorts of 0.5 s, deadline 1 s, at
5 s; one serial server without overhead, work given out in quanta of q. The paper says that LARS
lets the shorts wait until their relative slack falls below the long's 0.6. It then misses their
deadlines, which other orders meet. The expected times are arithmetic, in the comments; seconds and
the quantum are binary fractions, so that every key is exact and ties are real ties.
"""

from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from strategies import make_plan, tiny_step_time

from plans.plan import Plan, Scheduler
from plans.steptime import Knot
from runtime.clock import VirtualClock
from runtime.engine import Engine
from runtime.executor.simulated import SimulatedExecutor
from runtime.request import Record, Request
from runtime.scheduler import Scheduling, load_policy
from runtime.scheduler.lars import HYSTERESIS, Lars
from runtime.scheduler.policy import Prefills, Ranked

Q = 2.0**-10
"""Seconds of a token; by `chunk=1` also the quantum."""
LONG, SHORT = round(10 / Q), round(0.5 / Q)


def serial_plan(*, tokens_a_quantum: int = 1) -> Plan:
    """One device on which n tokens take n x Q / tokens_a_quantum seconds, whatever the context."""
    layer_s = Q / 4 / tokens_a_quantum  # four layers
    time = tiny_step_time(
        overhead_s=0.0,
        matmul=(Knot(at=1, seconds=layer_s), Knot(at=2, seconds=2 * layer_s)),
        pair_s=0.0,
        key_s=0.0,
        decode_key_s=0.0,
        decode_sequence_s=0.0,
        head=(),
        margin=0.0,
    )
    context = 2 * LONG * tokens_a_quantum
    plan = make_plan(step_time=time, rows=((context, tokens_a_quantum),))
    scheduler = Scheduler(
        step_budget_s=Q,
        idle_budget_s=Q,
        long_tokens=LONG * tokens_a_quantum,
        min_chunk_tokens=1,
        max_step_tokens=LONG * tokens_a_quantum,
    )
    return msgspec.structs.replace(plan, scheduler=scheduler)


@dataclass(frozen=True)
class PaperLars:
    """The paper's key as printed: no hysteresis, no demotion, and a yield where max_yield > 0."""

    max_yield: float = 0.0

    def rank(self, waiting: Prefills, *, now_s: float) -> Ranked:
        slack_s = waiting.arrival_s + waiting.deadline_s - now_s - waiting.remaining_s
        rho = slack_s / waiting.work_s
        return Ranked(
            keys=rho,
            yields=np.clip(rho, 0.0, self.max_yield) * waiting.long,
            demoted=np.zeros(len(rho), dtype=np.bool_),
        )


def outcome(plan: Plan, scheduling: Scheduling, *, tokens_a_quantum: int = 1) -> list[Record]:
    """Records of long, first short, second short."""
    clock = VirtualClock()
    engine = Engine(plan, SimulatedExecutor(plan, clock), clock, scheduling)
    for number, (tokens, arrival_s, deadline_s) in enumerate(
        [(LONG, 0.0, 16.0), (SHORT, 5.0, 1.0), (SHORT, 5.0, 1.0)]
    ):
        engine.add(
            Request(
                number=number,
                arrival_s=arrival_s,
                prompt_tokens=tokens * tokens_a_quantum,
                max_tokens=1,
                ttft_target_s=deadline_s,
            )
        )
    engine.run()
    return sorted(engine.records, key=lambda record: record.request.number)


def finish_s(records: list[Record]) -> list[float]:
    return [record.first_token_s for record in records]


def missed(records: list[Record]) -> set[int]:
    """Requests whose first token came after the deadline; one on the dot is met."""
    return {each.request.number for each in records if each.ttft_s > each.deadline_s}


def by_name(spec: str) -> list[Record]:
    plan = serial_plan()
    return outcome(plan, load_policy(spec, plan.scheduler))


@pytest.mark.parametrize(
    ("spec", "expected_s", "late"),
    [
        # the long runs to its end, then the shorts in order
        ("fcfs,chunk=1", [10.0, 10.5, 11.0], {1, 2}),
        ("fcfs-whole", [10.0, 10.5, 11.0], {1, 2}),
        # due at 6 and 6 before 16; 0.5 s of work before 5: the shorts one after the other
        ("edf,chunk=1", [11.0, 5.5, 6.0], set()),
        ("srpt,chunk=1", [11.0, 5.5, 6.0], set()),
        # slack 0.5 and 0.5 against 6, by work 1 and 1 against 1.2: the shorts take turns
        ("slack,chunk=1", [11.0, 6.0 - Q, 6.0], set()),
        ("slack-remaining,chunk=1", [11.0, 6.0 - Q, 6.0], set()),
        # the shorts' (5.5 - t) / 1 falls to the long's 6 / 16 at 5.125, then they take turns
        ("lrs,chunk=1", [11.0, 6.125, 6.125 + Q], {1, 2}),
    ],
)
def test_finish_times_and_misses(spec: str, expected_s: list[float], late: set[int]) -> None:
    records = by_name(spec)
    assert finish_s(records) == pytest.approx(expected_s, abs=2 * Q)
    assert missed(records) == late


def paper(plan: Plan, *, chunk_tokens: int | None, max_yield: float = 0.0) -> Scheduling:
    return Scheduling(name="paper", policy=PaperLars(max_yield), chunk_tokens=chunk_tokens)


def test_the_key_of_the_paper_misses_both_shorts_when_chunks_alternate() -> None:
    """The shorts' (5.5 - t) / 0.5 falls to the long's 0.6 at 5.2: a second of work, 0.8 s left."""
    plan = serial_plan()
    records = outcome(plan, paper(plan, chunk_tokens=1))
    assert finish_s(records) == pytest.approx([11.0, 6.2, 6.2], abs=2 * Q)
    assert missed(records) == {1, 2}


def test_the_key_of_the_paper_misses_one_short_when_a_short_is_one_chunk() -> None:
    """With quanta of 0.5 s the shorts' keys are 1 at 5.0 and 0 at 5.5, where the first starts."""
    plan = serial_plan()
    records = outcome(plan, paper(plan, chunk_tokens=SHORT))
    assert finish_s(records) == [11.0, 6.0, 6.5]
    assert missed(records) == {2}


def test_demotion_saves_one_short_and_the_long() -> None:
    """Work of 1 s in less than 0.8 s: once one short cannot be met, the other has all of it.

    All but a millionth, the share of the demoted one here: the usual tenth would cost the other one
    its deadline too, since not a quantum is to spare.
    """
    plan = serial_plan()
    strictly = msgspec.structs.replace(plan.scheduler, best_effort_share=1e-6)
    plan = msgspec.structs.replace(plan, scheduler=strictly)
    strict = Scheduling(name="strict", policy=Lars(max_yield=0.0), chunk_tokens=1)
    records = outcome(plan, strict)
    long_s, *shorts_s = finish_s(records)
    # the survivor has all the time from the moment that the slack of the other has gone: it ends
    # when its own slack has, give or take the quanta of one swap
    assert sorted(shorts_s) == pytest.approx([6.0, 11.0], abs=HYSTERESIS * 0.5 + 2 * Q)
    assert long_s == pytest.approx(10.8, abs=HYSTERESIS + 2 * Q)
    assert len(missed(records)) == 1


def test_a_yield_alone_does_not_save_the_shorts() -> None:
    """From 5.0 on the shorts have 0.4 of each step, and all of it when they are the more urgent.

    t after 5.0 each has done 0.2 t, so rho is (0.5 - t + 0.2 t) / 0.5 = 1 - 1.6 t; the long has
    lost 0.4 t, so its rho is 0.6 - 0.04 t. They meet at t = 0.4 / 1.56, where 1 - 0.4 t of the
    shorts is left: they end at 6 + 0.6 t.
    """
    plan = serial_plan(tokens_a_quantum=10)
    yielding = paper(plan, chunk_tokens=None, max_yield=0.4)
    records = outcome(plan, yielding, tokens_a_quantum=10)
    late_s = 6.0 + 0.6 * (0.4 / 1.56)
    assert finish_s(records) == pytest.approx([11.0, late_s, late_s], abs=4 * Q)
    assert missed(records) == {1, 2}

"""The executor over many ranks, with ranks that the test speaks for."""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from builders import make_plan
from hypothesis import given
from hypothesis import strategies as st

from plans.mesh import Coordinates, Parallelism, rank_at
from plans.plan import Plan
from runtime.clock import WallClock
from runtime.executor.base import Chunk, Step
from runtime.parallel import wire
from runtime.parallel.executor import ParallelExecutor
from runtime.parallel.inbox import Inbox, start_beats
from runtime.parallel.progress import Progress
from runtime.parallel.table import RequestTable, step_groups
from runtime.parallel.worker import PENDING_POLL_S
from runtime.sampling_params import SamplingParams


@dataclass
class Spoken:
    """Workers whose words the test says."""

    words: list[Any] = field(default_factory=list)
    sent: list[wire.StepMessage] = field(default_factory=list)

    def start(self, *, graphs: bool = True) -> int:
        return 1

    def send_step(self, message: wire.StepMessage) -> None:
        self.sent.append(message)

    def poll(self, timeout_s: float, *, in_flight: bool = False) -> Iterator[Any]:
        words, self.words = self.words, []
        return iter(words)


def plan_of(**degrees: int) -> Plan:
    return make_plan(parallelism=Parallelism(**degrees), rows=((64, 32), (256, 16)))


def chunk_step(step_id: int, *, samples: bool = False, prefix: int = 0, home: int = 0) -> Step:
    none = np.array([], dtype=np.int64)
    chunk = Chunk(request=0, tokens=4, prefix=prefix, home=home, samples=samples)
    return Step(
        step_id=step_id, decodes=none, decode_prefix=none, decode_home=none, chunks=(chunk,)
    )


def done(
    plan: Plan,
    step_id: int,
    stage: int,
    *,
    group: int = 0,
    tokens: dict[int, int] | None = None,
    run: int = 1,
) -> wire.StageDone:
    place = Coordinates(replica=0, stage=stage, group=group, tp=0)
    rank = rank_at(plan.parallelism, place)
    return wire.StageDone(rank, run, step_id, 0.0, 0.5, 0.0, tokens or {})


def executor_of(plan: Plan) -> tuple[ParallelExecutor, Spoken]:
    workers = Spoken()
    return ParallelExecutor(plan, workers, WallClock()), workers  # type: ignore[arg-type]


def test_one_step_is_queued_ahead_of_stage_0_while_nothing_waits_for_a_token():
    executor, workers = executor_of(plan_of(spp=2))
    submitted = 0
    while executor.can_submit():
        executor.submit(chunk_step(submitted))
        submitted += 1
    assert submitted == 2  # one runs, the next is there when it ends
    workers.words = [done(plan_of(spp=2), 0, 0)]
    assert executor.wait(until_s=None) == []
    assert executor.can_submit(), "stage 0 took the second step; a third one waits for it"


def test_a_step_that_yields_tokens_is_not_followed_by_more_steps_than_stages():
    executor, workers = executor_of(plan_of(spp=2))
    executor.submit(chunk_step(0, samples=True))
    workers.words = [done(plan_of(spp=2), 0, 0)]
    executor.wait(until_s=0.0)
    executor.submit(chunk_step(1))
    workers.words = [done(plan_of(spp=2), 1, 0)]
    executor.wait(until_s=0.0)
    assert not executor.can_submit(), "a decode of step 0's token would wait for another step"


def test_a_group_without_work_is_not_waited_for():
    plan = plan_of(kvp=4)
    executor, workers = executor_of(plan)
    executor.submit(chunk_step(0, samples=True, home=2))
    workers.words = [done(plan, 0, 0, group=2, tokens={0: 9})]
    [result] = executor.wait(until_s=None)
    assert result.tokens == {0: 9}


def test_a_step_ends_when_all_its_groups_have_spoken():
    plan = plan_of(kvp=2)
    executor, workers = executor_of(plan)
    executor.submit(chunk_step(0, samples=True, prefix=plan.kv.tokens_per_kvp_shard, home=1))
    workers.words = [done(plan, 0, 0, group=0, tokens={0: 9})]
    assert executor.wait(until_s=0.0) == []
    workers.words = [done(plan, 0, 0, group=1)]
    [result] = executor.wait(until_s=None)
    assert result.tokens == {0: 9}


def test_late_words_of_a_run_before_mean_nothing():
    plan = plan_of(spp=1, kvp=2)
    executor, workers = executor_of(plan)
    executor.submit(chunk_step(0, samples=True))
    workers.words = [done(plan, 0, 0, tokens={0: 1}, run=0)]
    assert executor.wait(until_s=0.0) == []


def test_sampled_tokens_go_out_with_the_next_step_and_to_every_rank():
    plan = plan_of(spp=2)
    executor, workers = executor_of(plan)
    executor.add_request(0, [1, 2, 3, 4], SamplingParams())
    executor.submit(chunk_step(0, samples=True))
    workers.words = [done(plan, 0, 0), done(plan, 0, 1, tokens={0: 77})]
    executor.wait(until_s=None)
    step = Step(
        step_id=1,
        decodes=np.array([0]),
        decode_prefix=np.array([4]),
        decode_home=np.array([0]),
    )
    executor.submit(step)
    first, second = workers.sent
    assert [each.number for each in first.added] == [0]
    assert second.added == ()
    assert second.sampled == ((0, 77),)
    assert second.totals.tokens == 5


def test_a_prompt_travels_with_the_step_that_first_names_its_request():
    executor, workers = executor_of(plan_of(spp=3))
    for number in range(3):
        executor.add_request(number, [1, 2, 3, 4], SamplingParams())
    assert executor.known_requests() == 3
    executor.submit(chunk_step(0, samples=True))
    executor.submit(msgspec.structs.replace(chunk_step(1), ended=(2,)))  # it never ran
    [first, second] = workers.sent
    assert [each.number for each in first.added] == [0]
    assert (first.totals.requests, first.totals.tokens) == (1, 4)
    assert second.added == ()
    assert executor.known_requests() == 2
    step = msgspec.structs.replace(
        chunk_step(2), chunks=(Chunk(request=1, tokens=2, prefix=0, home=0, samples=False),)
    )
    workers.words = [done(plan_of(spp=3), 0, 0)]
    executor.wait(until_s=None)
    executor.submit(step)
    assert [each.number for each in workers.sent[-1].added] == [1]


def test_a_wait_without_any_word_comes_back_so_that_others_can_end_it():
    executor, _ = executor_of(plan_of(spp=2))
    far_s = WallClock().now_s() + 1e6
    assert executor.wait(until_s=far_s) == []
    executor.submit(chunk_step(0))
    assert executor.wait(until_s=None) == []
    assert executor.in_flight() == 1


@given(seed=st.integers(0, 2**31), spp=st.integers(1, 3), kvp=st.integers(1, 3))
def test_whatever_the_order_of_words_results_come_in_step_order_and_complete(seed, spp, kvp):
    plan, draw = plan_of(spp=spp, kvp=kvp), random.Random(seed)
    executor, workers = executor_of(plan)
    shard = plan.kv.tokens_per_kvp_shard
    said: list[wire.StageDone] = []
    expected, results, submitted = [], [], 0
    while submitted < 8 or executor.in_flight():
        while submitted < 8 and executor.can_submit():
            prefix = shard * draw.randrange(kvp)
            step = chunk_step(submitted, samples=True, prefix=prefix, home=draw.randrange(kvp))
            executor.submit(step)
            groups = sorted(step_groups(plan, step))
            owner = (step.chunks[0].home + prefix // shard) % kvp
            expected.append((submitted, {0: submitted}))
            said += [
                done(
                    plan,
                    submitted,
                    stage,
                    group=group,
                    tokens={0: submitted} if stage == spp - 1 and group == owner else None,
                )
                for stage in range(spp)
                for group in groups
            ]
            submitted += 1
        word = said.pop(draw.randrange(len(said)))
        workers.words = [word]
        results += [(r.step.step_id, r.tokens) for r in executor.wait(until_s=0.0)]
    assert results == expected


# --- the wire -------------------------------------------------------------------------------------


def test_a_step_survives_the_wire():
    step = Step(
        step_id=5,
        decodes=np.array([3, 1 << 40]),
        decode_prefix=np.array([7, 8]),
        decode_home=np.array([0, 2]),
        chunks=(Chunk(request=9, tokens=4, prefix=16, home=1, samples=True),),
        pages=(),
        evicted=(4,),
        ended=(6, 2),
    )
    table = RequestTable()
    new = (wire.added(3, [1, 2, 300_000], SamplingParams(temperature=0.5, seed=7)),)
    data = wire.encode(wire.to_message(step, new, ((3, 5),), table.totals()))
    message = wire.decode_from_driver(data)
    assert isinstance(message, wire.StepMessage)
    found = wire.to_step(message)
    for name in ("decodes", "decode_prefix", "decode_home"):
        np.testing.assert_array_equal(getattr(found, name), getattr(step, name))
    for name in ("step_id", "chunks", "pages", "evicted", "ended"):
        assert getattr(found, name) == getattr(step, name)
    assert wire.prompt_of(message.added[0]) == [1, 2, 300_000]
    assert message.added[0].sampling == SamplingParams(temperature=0.5, seed=7)
    assert message.sampled == ((3, 5),)


@pytest.mark.parametrize("seed", range(5))
def test_steps_are_taken_in_their_order_whatever_order_they_arrive_in(seed):
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    inbox = Inbox(f"tcp://127.0.0.1:{port}", 0)
    inbox.send(wire.Ready(0, 0, ""))  # lets the router know the peer
    router.recv_multipart()
    order = list(range(6))
    random.Random(seed).shuffle(order)
    totals = RequestTable().totals()
    for step_id in order:
        message = wire.to_message(chunk_step(step_id), (), (), totals)
        router.send_multipart([b"rank-0", wire.encode(message)])
    taken = [inbox.receive(timeout_s=5.0) for _ in order]
    assert [each.step_id for each in taken] == sorted(order)
    assert inbox.receive(timeout_s=0.0) is None
    inbox.close()
    context.destroy(linger=0)


def test_a_wait_of_less_than_a_millisecond_is_no_busy_loop(monkeypatch: pytest.MonkeyPatch):
    waits: list[int | None] = []

    def poll(self: Any, timeout: int | None = None) -> int:
        waits.append(timeout)
        return 0

    inbox = Inbox("tcp://127.0.0.1:9", 0)
    monkeypatch.setattr(zmq.Socket, "poll", poll)
    for timeout_s in (0.0005, PENDING_POLL_S, 0.0, None):
        assert inbox.receive(timeout_s=timeout_s) is None
    assert waits == [1, 1, 0, None]
    inbox.close()


def test_closing_waits_for_the_thread_that_beats_and_loses_no_word():
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    address = f"tcp://127.0.0.1:{port}"
    inbox = Inbox(address, 0)
    start_beats(inbox, address, 0, Progress(), os.getppid())
    while router.recv_multipart()[0] != b"beat-0":
        pass
    inbox.send(wire.Failure(0, 3, "last word"))
    inbox.close()
    assert inbox.context.closed
    said = []
    while router.poll(1000):
        said.append(wire.decode_from_worker(router.recv_multipart()[1]))
    assert wire.Failure(0, 3, "last word") in said
    context.destroy(linger=0)

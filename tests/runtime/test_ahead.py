"""Steps packed before the last one's tokens are there: the engine over an executor that feeds back.

The audit allows one token of a request in flight, and checks everything else as it always does.
"""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_audit import Audit, FeedingExecutor, Run
from strategies_runtime import QUANTUM_S, linear_plan, requests, sim_plan

from plans.chunks import query_tile
from plans.plan import Plan
from runtime.clock import VirtualClock
from runtime.decisions import DecisionLog, read_log, replay
from runtime.engine import Engine
from runtime.executor.simulated import AheadExecutor, Host
from runtime.request import Request
from runtime.scheduler import load_policy
from runtime.scheduler.pack import TILE_TOKENS, _whole_queries, _whole_tiles
from runtime.simulate import packs_ahead, simulate

POLICIES = st.sampled_from(["lars", "fcfs", "fcfs,chunk=40", "lars,chunk=7", "fcfs@vllm,chunk=50"])


@st.composite
def crowded_plans(draw: st.DrawFn) -> Plan:
    return sim_plan(
        spare_pages=draw(st.sampled_from([0, 1, 3, 64])),
        sequences=draw(st.sampled_from([1, 2, 5, 16])),
    )


@settings(max_examples=60)
@given(crowded_plans(), POLICIES, requests())
def test_every_request_ends_and_no_step_breaks_an_invariant(plan, policy, asked):
    run = Run(plan, policy, ahead=True)
    for each in asked:
        run.engine.add(each)
    run.drain()
    assert {record.reason for record in run.engine.records} == {"length"}
    assert all(record.generated == record.request.max_tokens for record in run.engine.records)


@given(others=st.integers(0, 4000), tokens=st.integers(1, 4000))
def test_a_chunk_loses_only_the_few_tokens_that_would_begin_a_tile(others, tokens):
    kept = _whole_tiles(others, tokens)
    tiles = -(-(others + tokens) // TILE_TOKENS)
    assert tokens - kept <= tokens / 8
    assert tokens - kept <= TILE_TOKENS / 2
    if kept < tokens:
        assert not (others + kept) % TILE_TOKENS
        assert (others + kept) // TILE_TOKENS == tiles - 1
    elif others + tokens > TILE_TOKENS:  # a whole number of tiles, or too much of a chunk to lose
        over = (others + tokens) % TILE_TOKENS
        assert not over or over > min(tokens / 8, TILE_TOKENS / 2)


@given(
    tile=st.sampled_from([1, 2, 8, 16, 32, 64, 128]),
    prefix=st.integers(0, 1000),
    tokens=st.integers(1, 500),
)
def test_a_chunk_ends_with_a_tile_of_queries_unless_that_takes_most_of_it(tile, prefix, tokens):
    kept = _whole_queries(tile, prefix, tokens)
    assert tokens / 2 <= kept <= tokens
    if (prefix + kept) % tile:
        assert kept == tokens
        assert 2 * ((prefix + tokens) % tile) > tokens


def test_chunks_beside_decodes_end_with_a_tile_of_queries():
    """Where a step leaves a prompt more than one."""
    small = linear_plan(max_step_tokens=4096)
    tile = query_tile(small.model.group)
    plan = linear_plan(max_step_tokens=4096, step_budget_s=(1 + 4 * tile) * QUANTUM_S)
    run = Run(plan, "fcfs", ahead=True)
    run.engine.add(Request(number=0, arrival_s=0.0, prompt_tokens=1, max_tokens=50))
    run.engine.add(Request(number=1, arrival_s=0.0, prompt_tokens=900, max_tokens=1))
    run.drain()
    beside = [
        (chunk.prefix + chunk.tokens, chunk.tokens)
        for step in run.audit.steps
        for chunk in step.chunks
        if chunk.request == 1 and len(step.decodes) and chunk.prefix
    ]
    assert len(beside) > 2, beside
    assert {end % tile for end, _ in beside[:-1]} == {0}, beside


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("policy", ["fcfs", "lars", "lars-lanes"])
@pytest.mark.parametrize("waiting", [1, 2, 5])
def test_a_step_that_the_budget_ends_ends_with_a_tile_where_it_is_launched_ahead(
    ahead, policy, waiting
):
    """However many wait for what it leaves out."""
    tokens = 3 * TILE_TOKENS + 40
    plan = linear_plan(idle_budget_s=tokens * QUANTUM_S, max_step_tokens=4096, long_tokens=65536)
    run = Run(plan, policy, ahead=ahead)
    for number in range(waiting):
        run.engine.admit(
            Request(number=number, arrival_s=0.0, prompt_tokens=900, max_tokens=1), 0.0
        )
    step = run.engine.decide(0.0)
    assert sum(chunk.tokens for chunk in step.chunks) == (3 * TILE_TOKENS if ahead else tokens)


def test_what_a_request_ends_leaves_room_for_the_next_one():
    plan = linear_plan(idle_budget_s=900 * QUANTUM_S, max_step_tokens=4096)
    run = Run(plan, "fcfs", ahead=True)
    for number, prompt in enumerate((130, 900)):
        run.engine.admit(
            Request(number=number, arrival_s=0.0, prompt_tokens=prompt, max_tokens=1), 0.0
        )
    step = run.engine.decide(0.0)
    assert [chunk.tokens for chunk in step.chunks] == [130, 512]  # the schedule's largest chunk


HOSTS = st.builds(
    Host,
    decide_s=st.sampled_from([0.0, 0.001]),
    chunk_s=st.sampled_from([0.0, 0.003, 0.05]),
    decode_s=st.sampled_from([0.0, 0.001]),
    poll_s=st.sampled_from([0.0, 0.0001]),
)


@settings(max_examples=40)
@given(crowded_plans(), POLICIES, requests(), HOSTS)
def test_neither_does_one_taken_late_behind_a_host_of_any_speed(plan, policy, asked, host):
    scheduling = load_policy(policy, plan.scheduler)
    audit = Audit(plan, chunk_tokens=scheduling.chunk_tokens, ahead=True)
    clock = VirtualClock()
    executor = AheadExecutor(plan, clock, host=host)
    engine = Engine(plan, executor, clock, scheduling, observer=audit, learn=True, ahead=True)
    for each in asked:
        engine.add(each)
    engine.run()
    assert {record.reason for record in engine.records} == {"length"}
    assert len(engine.records) == len(asked)
    engine.book.check_integrity()


def test_a_plan_of_one_gpu_is_simulated_as_it_runs_and_others_as_they_do():
    plan = sim_plan()
    cpu = msgspec.structs.replace(
        plan, topology=msgspec.structs.replace(plan.topology, device="cpu")
    )
    gpu = msgspec.structs.replace(
        plan, topology=msgspec.structs.replace(plan.topology, device="h100-sxm-80gb")
    )
    assert packs_ahead(gpu, "lars")
    assert not packs_ahead(gpu, "fcfs@vllm")  # held against vLLM without a step ahead of ours
    assert not packs_ahead(cpu, "lars")
    assert not packs_ahead(sim_plan(spp=2), "lars")
    asked = [Request(number=0, arrival_s=0.0, prompt_tokens=700, max_tokens=2)]
    asked.append(Request(number=1, arrival_s=0.0001, prompt_tokens=20, max_tokens=2))
    ahead, behind = (simulate(each, asked, "srpt").records for each in (gpu, cpu))
    # the second step was packed before the short prompt had come, else after
    assert {each.request.number: each.first_token_s for each in ahead}[1] > {
        each.request.number: each.first_token_s for each in behind
    }[1]


@settings(max_examples=30)
@given(requests(), st.data())
def test_what_was_computed_behind_a_cancellation_is_dropped(asked, data):
    run = Run(sim_plan(spare_pages=3), ahead=True)
    for each in asked:
        run.engine.add(each)
    going = True
    while going:
        going = run.engine.tick()
        number = data.draw(st.integers(0, 3 * len(asked)))
        if going and number < len(asked):
            run.engine.cancel(number)
    run.engine.book.check_integrity()
    assert run.engine.book.pools.used_share() == 0.0


def test_the_next_decode_stands_behind_the_step_that_yields_its_token():
    run = Run(sim_plan(), ahead=True)
    run.engine.add(Request(number=0, arrival_s=0.0, prompt_tokens=20, max_tokens=12))
    most = 0
    while run.engine.tick():
        most = max([most, *(each.in_flight for each in run.engine.book.running)])
    assert most == 1  # after a tick: of two steps one has been collected
    starts = [int(step.decode_prefix[0]) for step in run.audit.steps if len(step.decodes)]
    assert starts == list(range(20, 31))


def test_the_first_decode_stands_behind_the_chunk_that_yields_its_token():
    """Else the first of a request's gaps is two steps long whenever others run."""
    run = Run(sim_plan(), ahead=True)
    run.engine.add(Request(number=0, arrival_s=0.0, prompt_tokens=20, max_tokens=60))
    run.engine.add(Request(number=1, arrival_s=0.01, prompt_tokens=20, max_tokens=3))
    run.drain()
    [ending] = [
        step.step_id
        for step in run.audit.steps
        for chunk in step.chunks
        if chunk.request == 1 and chunk.samples
    ]
    decodes = [step.step_id for step in run.audit.steps if 1 in step.decodes.tolist()]
    assert decodes == [ending + 1, ending + 2]


def test_a_step_in_flight_does_not_count_as_waiting_for_a_token():
    """Else each step behind a long one would get half of the budget."""
    plan = sim_plan()
    chunks = {}
    for ahead in (False, True):
        run = Run(plan, "fcfs", ahead=ahead)
        run.engine.add(Request(number=0, arrival_s=0.0, prompt_tokens=8, max_tokens=900))
        run.engine.add(Request(number=1, arrival_s=0.01, prompt_tokens=1000, max_tokens=1))
        run.drain()
        chunks[ahead] = sum(bool(step.chunks) for step in run.audit.steps)
    assert chunks[True] <= chunks[False] + 1


@pytest.mark.parametrize("spare_pages", [0, 64])
def test_a_log_of_steps_packed_ahead_replays_to_the_same_schedule(tmp_path: Path, spare_pages: int):
    plan, clock = sim_plan(spare_pages=spare_pages), VirtualClock()
    path = tmp_path / "decisions.jsonl"
    with path.open("wb") as file:
        engine = Engine(
            plan,
            FeedingExecutor(plan, clock),
            clock,
            load_policy("lars", plan.scheduler),
            observer=Audit(plan, ahead=True),
            log=DecisionLog(file, plan, "lars", ahead=True),
            ahead=True,
        )
        for number in range(6):
            engine.add(Request(number=number, arrival_s=0.0, prompt_tokens=200, max_tokens=100))
        engine.run()
        engine.close()
    assert replay(plan, read_log(path)).steps == engine.book.steps

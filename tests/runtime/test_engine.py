"""The engine loop over the simulated executor: every policy, stages, groups, memory pressure."""

import itertools
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runtime_audit import Audit, Run
from strategies_runtime import SPECS, requests, sim_plan, sim_plans

from plans.check import check_plan
from plans.errors import Refused
from plans.plan import Plan
from runtime.clock import VirtualClock
from runtime.engine import Engine
from runtime.executor.base import Step
from runtime.executor.simulated import SimulatedExecutor
from runtime.request import Request
from runtime.scheduler import POLICIES, load_policy


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(plan=sim_plans(), work=requests(), policy=SPECS, data=st.data())
def test_every_request_ends_and_no_step_breaks_an_invariant(
    plan: Plan, work: list[Request], policy: str, data: st.DataObject
) -> None:
    check_plan(plan)
    run = Run(plan, policy)
    for request in work:
        run.engine.add(request)
    cancels = data.draw(st.dictionaries(st.integers(0, 60), st.integers(0, len(work)), max_size=4))
    tick = 0
    while run.engine.tick():
        run.engine.book.check_integrity()
        if tick in cancels:
            run.engine.cancel(cancels[tick])
            run.engine.book.check_integrity()
        tick += 1
        assert tick < 100_000, "does not drain"
    run.drain()
    ended = {record.request.number for record in run.engine.records}
    never_arrived = set(cancels.values())
    assert ended | never_arrived >= set(range(len(work)))
    finished = [record for record in run.engine.records if record.reason == "length"]
    assert {each.request.number for each in finished} >= set(range(len(work))) - never_arrived


@settings(max_examples=25)
@given(plan=sim_plans(), work=requests(), policy=SPECS)
def test_the_same_input_gives_the_same_schedule(
    plan: Plan, work: list[Request], policy: str
) -> None:
    seen = []
    for _ in range(2):
        run = Run(plan, policy)
        for request in work:
            run.engine.add(request)
        run.drain()
        seen.append(
            [
                (step.decodes.tolist(), step.chunks, step.pages, step.evicted, step.ended)
                for step in run.audit.steps
            ]
        )
    assert seen[0] == seen[1]


@pytest.mark.parametrize("policy", sorted({*POLICIES} - {"fcfs-whole"}))
@pytest.mark.parametrize(("spp", "kvp"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 4)])
def test_a_lone_request_takes_its_predicted_time(policy: str, spp: int, kvp: int) -> None:
    plan = sim_plan(spp=spp, kvp=kvp)
    run = Run(plan, policy)
    run.engine.add(Request(number=0, arrival_s=0.25, prompt_tokens=1000, max_tokens=3))
    run.drain()
    (record,) = run.engine.records
    assert record.ttft_s == pytest.approx(record.work_s, rel=1e-9)
    assert record.work_s == pytest.approx(run.engine.book.work.solo_s(1000), rel=1e-12)


def test_short_requests_overtake_a_long_prefill_under_lars_but_not_under_fcfs() -> None:
    first_token_s = {}
    for policy in ("lars", "fcfs"):
        run = Run(sim_plan(), policy)
        run.engine.add(Request(number=0, arrival_s=0.0, prompt_tokens=1000, max_tokens=2))
        for number in range(1, 9):
            run.engine.add(
                Request(
                    number=number,
                    arrival_s=0.001,
                    prompt_tokens=120,
                    max_tokens=1,
                    ttft_target_s=0.015,
                )
            )
        run.drain()
        first_token_s[policy] = {
            record.request.number: record.first_token_s for record in run.engine.records
        }
    lars, fcfs = first_token_s["lars"], first_token_s["fcfs"]
    shorts = range(1, 9)
    assert max(lars[each] for each in shorts) < lars[0]
    assert max(lars[each] for each in shorts) < max(fcfs[each] for each in shorts)
    assert lars[0] > fcfs[0]


def test_requests_over_the_context_limit_or_without_tokens_are_refused() -> None:
    engine = Run(sim_plan()).engine
    for prompt, new, text in [(1024, 1, "context limit of 1024"), (0, 1, "at least 1")]:
        with pytest.raises(Refused, match=text):
            engine.add(Request(number=0, arrival_s=0, prompt_tokens=prompt, max_tokens=new))


def test_an_evicted_request_is_recomputed_and_never_exceeds_max_tokens() -> None:
    run = Run(sim_plan(spare_pages=0))
    for number in range(4):
        run.engine.add(Request(number=number, arrival_s=0.0, prompt_tokens=250, max_tokens=300))
    run.drain()
    records = run.engine.records
    assert sum(record.evictions for record in records) > 0, "the pool was meant to be too small"
    assert all(record.generated == 300 for record in records)
    assert sum(record.recomputed_tokens for record in records) > 0


class SlowHost(SimulatedExecutor):
    """Every step takes a constant time beyond the formula, as launches from Python do."""

    host_s = 0.05

    def stages_s(self, step: Step) -> tuple[float, ...]:
        return tuple(seconds + self.host_s for seconds in super().stages_s(step))


def test_host_time_learnt_from_decodes_does_not_shrink_the_chunks_of_later_prompts() -> None:
    plan, clock = sim_plan(), VirtualClock()
    audit = Audit(plan)
    engine = Engine(
        plan,
        SlowHost(plan, clock),
        clock,
        load_policy("lars", plan.scheduler),
        observer=audit,
        learn=True,
    )
    for number in range(2):
        engine.add(
            Request(number=number, arrival_s=100.0 * number, prompt_tokens=1000, max_tokens=24)
        )
    engine.run()
    chunks = [
        sum(chunk.request == number for step in audit.steps for chunk in step.chunks)
        for number in range(2)
    ]
    assert chunks[1] <= 2 * chunks[0] + 1  # half of the budget is always left for work


@pytest.mark.parametrize("policy", ["lars", "fcfs", "srpt"])
def test_a_long_prompt_starts_although_short_ones_keep_taking_the_pages(policy: str) -> None:
    run = Run(sim_plan(spare_pages=0), policy)
    run.engine.add(Request(number=0, arrival_s=0.0, prompt_tokens=500, max_tokens=60))
    run.engine.add(Request(number=1, arrival_s=0.02, prompt_tokens=1000, max_tokens=2))
    for number in range(2, 400):  # a short one holds its pages longer than the next one waits
        run.engine.add(
            Request(number=number, arrival_s=0.01 * number, prompt_tokens=100, max_tokens=60)
        )
    run.drain()
    first = {each.request.number: each.first_token_s for each in run.engine.records}
    if policy != "srpt":  # shortest first lets it wait for compute; pages are not the reason
        assert first[1] < first[200], "starts only when the stream ends"


def test_many_prompts_that_cannot_have_pages_do_not_hide_the_one_that_can_run() -> None:
    run = Run(sim_plan(spare_pages=0, sequences=512), "lars")
    run.engine.add(
        Request(number=0, arrival_s=0.0, prompt_tokens=1000, max_tokens=2, ttft_target_s=50.0)
    )
    for number in range(1, 300):
        run.engine.add(
            Request(
                number=number, arrival_s=0.015, prompt_tokens=100, max_tokens=3, ttft_target_s=3.0
            )
        )
    run.drain()
    assert len(run.engine.records) == 300


NOT_ARRIVALS = [("arrival_s", value) for value in (math.nan, -math.inf, math.inf)]
NOT_TARGETS = itertools.product(["ttft_target_s", "tbt_target_s"], [math.nan, -math.inf])


@pytest.mark.parametrize(("field", "value"), [*NOT_ARRIVALS, *NOT_TARGETS])
def test_times_that_are_no_numbers_are_refused(field: str, value: float) -> None:
    times = {"arrival_s": 0.0, field: value}
    with pytest.raises(Refused, match="finite"):
        Run(sim_plan()).engine.add(Request(number=0, prompt_tokens=1, max_tokens=1, **times))


def test_a_number_that_is_in_use_is_refused() -> None:
    run = Run(sim_plan())
    request = Request(number=7, arrival_s=0.5, prompt_tokens=20, max_tokens=2)
    run.engine.add(request)
    with pytest.raises(Refused, match="request 7: another request has this number"):
        run.engine.add(request)  # not there yet
    while not run.engine.book.sequences:
        run.engine.tick()
    with pytest.raises(Refused, match="request 7"):
        run.engine.add(request)  # there
    run.drain()
    assert len(run.engine.records) == 1


def test_a_server_keeps_the_newest_records_and_gaps_and_tells_of_all() -> None:
    plan = sim_plan()
    work = [
        Request(number=number, arrival_s=0.01 * number, prompt_tokens=40, max_tokens=6)
        for number in range(30)
    ]
    engines = []
    for keep in (None, 7):
        audit, clock = Audit(plan), VirtualClock()
        engine = Engine(
            plan,
            SimulatedExecutor(plan, clock),
            clock,
            load_policy("lars", plan.scheduler),
            observer=audit,
            keep=keep,
        )
        for request in work:
            engine.add(request)
        engine.run()
        assert len(audit.records) == 30
        engines.append(engine)
    everything, newest = engines
    assert list(newest.records) == list(everything.records)[-7:]
    assert len(everything.gaps["short"]) == 30 * 5  # between 6 tokens each
    assert list(newest.gaps["short"]) == list(everything.gaps["short"])[-7:]

"""The share of best-effort prefills: what they get at least, and what they cost others at most."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import structs
from strategies_runtime import QUANTUM_S, linear_plan

from plans.plan import Plan
from runtime.clock import VirtualClock
from runtime.engine import Engine
from runtime.executor.base import Step
from runtime.executor.simulated import SimulatedExecutor
from runtime.request import Request
from runtime.scheduler import load_policy
from runtime.scheduler.loads import GroupLoads
from runtime.scheduler.share import BestEffortShare

LATE_S, EASY_S = 1e-9, 1e6
"""Targets of the first token: missed at arrival, and never missed."""


class Debts:
    """Most that best effort lacked, and most that it had too much, over any run of steps."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.lacks: list[float] = [0.0]
        self.step_s = 0.0

    def add(self, used_s: float, prefill_s: float) -> None:
        self.lacks.append(self.lacks[-1] + self.share * prefill_s - used_s)
        self.step_s = max(self.step_s, prefill_s)

    @property
    def lacked_s(self) -> float:
        lowest = accumulate(self.lacks, min)
        return max(lack - low for lack, low in zip(self.lacks, lowest, strict=True))

    @property
    def surplus_s(self) -> float:
        highest = accumulate(self.lacks, max)
        return max(high - lack for lack, high in zip(self.lacks, highest, strict=True))

    @property
    def bound_s(self) -> float:
        """The credit moves between one step's worth below 0 and its share above; and rounding."""
        return (1 + self.share) * self.step_s + 1e-9


def added(plan: Plan, step: Step, best_effort: set[int]) -> tuple[list[float], list[float]]:
    """Seconds that best-effort chunks, and all chunks, added to a step, by group."""
    groups = plan.parallelism.kvp
    loads = GroupLoads(plan.step_time, groups=groups, shard_tokens=plan.kv.tokens_per_kvp_shard)
    loads.add_step(structs.replace(step, chunks=()))
    used, prefill = [0.0] * groups, [0.0] * groups
    for chunk in step.chunks:  # in the order in which they were placed
        before = loads.groups_s()
        loads.add_chunk(chunk.home, chunk.tokens, chunk.prefix)
        for group, (old, new) in enumerate(zip(before, loads.groups_s(), strict=True)):
            prefill[group] += new - old
            used[group] += (new - old) * (chunk.request in best_effort)
    return used, prefill


class Kept(SimulatedExecutor):
    """Keeps the steps that it runs."""

    def __init__(self, plan: Plan, clock: VirtualClock) -> None:
        super().__init__(plan, clock)
        self.steps: list[Step] = []

    def submit(self, step: Step) -> None:
        self.steps.append(step)
        super().submit(step)


def served(plan: Plan, policy: str, work: Sequence[Request]) -> Iterator[Step]:
    """Steps as they are packed, as long as somebody is there."""
    clock = VirtualClock()
    executor = Kept(plan, clock)
    engine = Engine(plan, executor, clock, load_policy(policy, plan.scheduler))
    for request in work:
        engine.add(request)
    while engine.tick():
        yield from executor.steps
        executor.steps.clear()


def crowd(prompts: list[int], *, late: int, new_tokens: int) -> list[Request]:
    """All there at once; the first `late` have 1000 tokens and a target that is missed already."""
    return [
        Request(
            number=number,
            arrival_s=0.0,
            prompt_tokens=1000 if number < late else prompts[number % len(prompts)],
            max_tokens=new_tokens,
            ttft_target_s=LATE_S if number < late else EASY_S,
        )
        for number in range(late + 250)
    ]


@pytest.mark.parametrize("policy", ["lars", "lars-lanes", "lars,chunk=64", "lars-lanes,chunk=7"])
@settings(max_examples=6)
@example(share=0.1, budget=3, spp=1, prompts=[40], new_tokens=5)
@given(
    share=st.sampled_from([1 / 3, 0.1, 0.02]),
    budget=st.sampled_from([3, 20, 64]),
    spp=st.integers(1, 2),
    prompts=st.lists(st.integers(20, 90), min_size=1, max_size=8),
    new_tokens=st.sampled_from([1, 5]),
)
def test_best_effort_gets_its_share_and_no_more(  # noqa: PLR0917 (hypothesis gives them by name)
    policy: str, share: float, budget: int, spp: int, prompts: list[int], new_tokens: int
) -> None:
    """With a budget of 3 tokens and many decodes there is never room for more than a least chunk.

    Beyond what the credit allows, best effort may have what does not make a least chunk for
    anybody else: less than one of 4 tokens a step.
    """
    plan = linear_plan(
        spp=spp, spare_pages=4000, step_budget_s=budget * QUANTUM_S, best_effort_share=share
    )
    work = crowd(prompts, late=3, new_tokens=new_tokens)
    left = {request.number: request.prompt_tokens for request in work}
    debts = Debts(share)
    for step in served(plan, policy, work):
        if step.chunks:
            (used,), (prefill,) = added(plan, step, {0, 1, 2})
            debts.add(used, prefill)
        for chunk in step.chunks:
            left[chunk.request] -= chunk.tokens
            if left[chunk.request] <= 0:
                del left[chunk.request]
        if not left.keys() & {0, 1, 2} or len(left) < 50:
            break
    assert len(debts.lacks) > 20, "both kinds waited for some time"
    assert debts.lacked_s <= debts.bound_s
    assert debts.surplus_s <= debts.bound_s


@settings(max_examples=10)
@given(policy=st.sampled_from(["lars", "lars-lanes"]), kvp=st.integers(2, 3))
def test_every_group_keeps_the_share_of_those_that_wait_in_it(policy: str, kvp: int) -> None:
    share = 0.1
    plan = linear_plan(kvp=kvp, best_effort_share=share)
    late = set(range(4))
    work = crowd([50, 70], late=4, new_tokens=1)
    shard = plan.kv.tokens_per_kvp_shard
    debts = {group: Debts(share) for group in range(kvp)}
    place: dict[int, int] = {}
    """Group in which each started best-effort prompt goes on."""
    left = len(work)
    checked = 0
    for step in served(plan, policy, work):
        used, prefill = added(plan, step, late)
        for group in range(kvp):
            if group in place.values():
                debts[group].add(used[group], prefill[group])
                checked += 1
            else:  # a new run of steps begins; what was before is still held against the bound
                assert debts[group].lacked_s <= debts[group].bound_s
                debts[group] = Debts(share)
        for chunk in step.chunks:
            left -= chunk.samples
            if chunk.request in late:
                place[chunk.request] = (chunk.home + (chunk.prefix + chunk.tokens) // shard) % kvp
                if chunk.samples:
                    del place[chunk.request]
        if left < 50:
            break
    assert checked > 50
    for each in debts.values():
        assert each.lacked_s <= each.bound_s


@given(
    share=st.floats(0.01, 0.9),
    steps=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.booleans()), max_size=60),
)
def test_the_credit_stays_within_one_step(
    share: float, steps: list[tuple[float, float, bool]]
) -> None:
    """Steps of up to a second in which best effort takes any part, when it goes first or not."""
    ledger = BestEffortShare(share, groups=1)
    for prefill, part, idle in steps:
        due = ledger.due()
        used = 0.0 if idle else part * prefill
        ledger.debit(due, used_s=[used], others_s=[prefill - used])
        (credit,) = ledger.credit_s
        assert -1 - 1e-12 <= credit <= share


def test_time_that_nobody_wanted_is_no_debt() -> None:
    """After a thousand steps alone it waits as long for its turn as after one."""
    waits = []
    for alone in (1, 1000):
        ledger = BestEffortShare(0.125, groups=1)
        for _ in range(alone):
            ledger.debit(ledger.due(), used_s=[1.0], others_s=[0.0])
        waits.append(0)
        while not ledger.due():
            ledger.debit(frozenset(), used_s=[0.0], others_s=[1.0])
            waits[-1] += 1
    assert waits == [8, 8]  # -7/8, then an eighth a step: 7 to nothing, one to more


def test_what_it_could_not_use_is_forfeited() -> None:
    ledger = BestEffortShare(0.125, groups=1)
    for _ in range(1000):
        ledger.debit(ledger.due(), used_s=[0.0], others_s=[1.0])
    assert ledger.credit_s == (0.125,)

"""How long one decision takes: 10,000 requests wait and 256 decode, on the plan of bench/paper.py.

With room in the KV pools, and (`full`) with six pages left, where decodes too lose theirs.

    pytest bench/bench_scheduler.py --benchmark-json=OUT.json -q

The queue is the 5 % mix. A round packs one step; retiring it is outside the time that is measured.
"""

import pytest
from msgspec import structs
from pytest_benchmark.fixture import BenchmarkFixture

from bench.paper_setup import paper_plan
from plans.plan import Plan
from plans.workload import length_at
from runtime.arrivals import child_rng
from runtime.book import Book
from runtime.request import Request
from runtime.scheduler import POLICIES, load_policy
from runtime.scheduler.compose import composer_of

WAITING, RUNNING = 10_000, 256
ROUNDS = 200
STEP_S = 0.03


@pytest.fixture(scope="module")
def plan() -> Plan:
    """8B on 16 A100 at TP8 x SPP2."""
    return paper_plan()


def crowded_book(plan: Plan) -> Book:
    """RUNNING requests decode, WAITING ones arrived over the last minute."""
    book = Book(plan)
    classes = {each.name: each for each in plan.workload.classes}
    rng = child_rng(0, "bench_scheduler")
    draws = rng.random((RUNNING + WAITING, 3))
    for number, (kind, prompt, answer) in enumerate(draws.tolist()):
        running = number < RUNNING
        lengths = classes["long" if kind < classes["long"].share and not running else "short"]
        request = Request(
            number=number,
            arrival_s=0.0 if running else 60.0 * (number - RUNNING) / WAITING,
            prompt_tokens=length_at(lengths.input_tokens, prompt),
            max_tokens=length_at(lengths.output_tokens, answer),
        )
        sequence = book.arrive(request)
        if running:
            book.grow(sequence, sequence.length)
            book.submit_chunk(sequence, sequence.length)
            sequence.in_flight = 0
            sequence.generated = 1
            book.decode(sequence, 60.0)
    return book


def almost_full(plan: Plan) -> Plan:
    """The plan with six pages more than the running requests hold."""
    free = crowded_book(plan).pools.free_pages(0)
    pages = plan.kv.pages_per_rank - free + 6
    return structs.replace(plan, kv=structs.replace(plan.kv, pages_per_rank=pages))


@pytest.mark.parametrize("pool", ["room", "full"])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_decision(benchmark: BenchmarkFixture, plan: Plan, policy: str, pool: str) -> None:
    """One decision; between two of them the step before is retired and time moves on."""
    plan = almost_full(plan) if pool == "full" else plan
    book = crowded_book(plan)
    packer = composer_of(book, load_policy(policy, plan.scheduler))
    clock = [60.0]
    taken: list[float] = []

    def retire() -> tuple[tuple[float], dict[str, float]]:
        clock[0] += STEP_S
        for sequence in list(book.sequences.values()):
            if sequence.in_flight:
                sequence.in_flight = 0
                sequence.computed = sequence.scheduled
                if sequence.number in book.running:
                    sequence.generated += 1
                    sequence.last_token_s = clock[0] - STEP_S
                elif sequence.missing == 0:
                    book.end(sequence)  # 256 go on decoding, not ever more
        return (clock[0],), {}

    def decide(now_s: float) -> None:
        step = packer.pack(now_s)
        assert step is not None
        taken.append(float(len(step.decodes)))

    benchmark.pedantic(  # type: ignore[no-untyped-call]
        decide, setup=retire, rounds=ROUNDS, warmup_rounds=5
    )
    assert min(taken) == RUNNING or pool == "full"
    benchmark.extra_info["waiting"] = len(book.waiting)

"""Any mesh gives the tokens of one process, whatever the scheduler does.

The suite runs a mesh for each axis, and some of all; `pytest -m sweep` runs every mesh of up to
eight ranks whose degrees divide the tiny models, with more examples.
"""

import io
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bundles import with_pages
from parallel_worlds import (
    CONTEXT,
    FAMILIES,
    GREEDY,
    Pool,
    RandomScheduler,
    assert_greedy,
    mesh_name,
    pool_of,
    prompt_of,
)

from plans.errors import Refused
from plans.mesh import Parallelism
from plans.plan import Plan
from runtime.clock import WallClock
from runtime.decisions import DecisionLog, read_log, replay
from runtime.engine import Engine
from runtime.executor.base import Step, StepResult
from runtime.parallel.table import step_groups
from runtime.request import Record, Request
from runtime.request import Sequence as Live
from runtime.scheduler import load_policy

MESHES = (
    Parallelism(tp=2),
    Parallelism(spp=2),
    Parallelism(kvp=2),
    Parallelism(spp=3, kvp=2),
    Parallelism(spp=2, kvp=4),
    Parallelism(tp=4),
    Parallelism(tp=2, spp=2, kvp=2),
)
SWEEP = tuple(
    Parallelism(tp=tp, spp=spp, kvp=kvp)
    for tp, spp, kvp in itertools.product((1, 2, 4), (1, 2, 3, 4), range(1, 9))
    if 1 < tp * spp * kvp <= 8
)
FEW, MANY = 2, 12
"""Schedules of a mesh and family, in the suite and in the sweep."""
WORKS = st.lists(
    st.tuples(st.integers(1, CONTEXT - 24), st.integers(1, 24)), min_size=1, max_size=6
)
"""(prompt tokens, new tokens) of each request."""


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param((mesh, FEW), id=mesh_name(mesh)) for mesh in MESHES),
        *(
            pytest.param((mesh, MANY), id=f"sweep-{mesh_name(mesh)}", marks=pytest.mark.sweep)
            for mesh in SWEEP
        ),
    ],
)
def pool_and_examples(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Pool, int]]:
    """A mesh's workers, and how many schedules are tried on them for each family."""
    mesh, examples = request.param
    with pool_of(mesh, tmp_path_factory.mktemp("pool")) as started:
        yield started, examples


@pytest.fixture
def pool(pool_and_examples: tuple[Pool, int]) -> Pool:
    return pool_and_examples[0]


def any_schedule(pool: Pool, family: str, seed: int, works: list[tuple[int, int]]) -> None:
    """Runs one schedule without rules and compares every answer."""
    plan, draw = pool.plans[family], random.Random(seed)
    scheduler = RandomScheduler(plan, pool.executor(family), draw)
    for number, (tokens, new) in enumerate(works):
        scheduler.add(number, prompt_of(tokens, seed + number), new)
    scheduler.run()
    assert len(scheduler.done) == len(works)
    for known in scheduler.done.values():
        assert_greedy(FAMILIES[family], known.prompt, known.answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_legal_schedule_gives_the_tokens_of_one_process(pool_and_examples, family):
    pool, examples = pool_and_examples

    @settings(max_examples=examples)
    @given(seed=st.integers(0, 2**31), works=WORKS)
    def check(seed: int, works: list[tuple[int, int]]) -> None:
        any_schedule(pool, family, seed, works)

    check()


def test_a_run_may_start_while_ranks_that_had_nothing_to_do_are_still_behind(pool):
    """The driver waits for tokens alone; a group without work learns of the end later."""
    for seed in range(8):
        any_schedule(pool, "llama", seed, [(1, 1)])


class Watcher:
    """Observer that cancels and counts."""

    def __init__(self, plan: Plan, cancels: dict[int, int]) -> None:
        self.to_cancel: int | None = None
        self.most_in_flight = 0
        self.groups: set[frozenset[int]] = set()
        self.plan = plan
        self._cancels = cancels
        self._flying: set[int] = set()

    def arrived(self, sequence: Live, now_s: float) -> None:
        pass

    def submitted(self, step: Step, now_s: float) -> None:
        self._flying.add(step.step_id)
        self.most_in_flight = max(self.most_in_flight, len(self._flying))
        self.groups.add(step_groups(self.plan, step))
        if step.step_id in self._cancels:
            self.to_cancel = self._cancels[step.step_id]

    def collected(self, result: StepResult) -> None:
        self._flying.discard(result.step.step_id)

    def ended(self, record: Record, now_s: float) -> None:
        pass


def serve(
    pool: Pool,
    family: str,
    works: list[tuple[int, int]],
    *,
    spare_pages: int = 64,
    cancels: dict[int, int] | None = None,
    policy: str = "lars",
    log: Path | None = None,
) -> tuple[list[list[int]], list[Record], Watcher]:
    """Serves greedy requests by the engine; answers by request, and what happened.

    log  file for the decision log
    """
    plan = pool.plans[family]
    pages = plan.kv.tokens_per_kvp_shard // plan.kv.page_tokens + spare_pages
    plan = with_pages(plan, pages)
    executor = pool.executor(family, plan)
    watcher = Watcher(plan, cancels or {})
    answers: list[list[int]] = [[] for _ in works]
    decisions = io.BytesIO()
    engine = Engine(
        plan,
        executor,
        WallClock(),
        load_policy(policy, plan.scheduler),
        on_token=lambda number, token: answers[number].append(token),
        observer=watcher,
        log=DecisionLog(decisions, plan, policy, learn=True),
        learn=True,
    )
    for number, (tokens, new) in enumerate(works):
        executor.add_request(number, prompt_of(tokens, number), GREEDY)
        engine.add(Request(number=number, arrival_s=0.0, prompt_tokens=tokens, max_tokens=new))
    while engine.tick():
        if watcher.to_cancel is not None:
            engine.cancel(watcher.to_cancel)
            watcher.to_cancel = None
    engine.book.check_integrity()
    engine.close()
    if log is not None:
        log.write_bytes(decisions.getvalue())
    return answers, engine.records, watcher


def assert_all_greedy(family: str, works: list[tuple[int, int]], answers: list[list[int]]) -> None:
    for number, ((tokens, _), answer) in enumerate(zip(works, answers, strict=True)):
        assert_greedy(FAMILIES[family], prompt_of(tokens, number), answer)


MIXED = [(20, 60), (200, 12), (9, 55), (90, 10), (30, 60), (160, 15), (12, 58), (25, 50), (14, 60)]
"""Short prompts whose answers outgrow any pool that holds one long request, and long prompts."""


def test_the_engine_preempts_recomputes_and_cancels_without_changing_a_token(
    pool_and_examples, tmp_path
):
    """A pool of little more than one request: the rest is taken from each other.

    What was decided in real time is then decided again from the log, without a rank.
    """
    pool, examples = pool_and_examples
    if examples == FEW and pool.workers.plan.parallelism.tp == 4:
        pytest.skip("four ranks that add up after each product are slow here; the sweep runs them")
    family, log = "qwen3", tmp_path / "decisions.jsonl"
    answers, records, watcher = serve(
        pool, family, MIXED, spare_pages=1, cancels={9: 2, 17: 5}, log=log
    )
    assert len(records) == len(MIXED)
    assert sum(record.evictions for record in records) > 0
    reasons = {record.request.number: record.reason for record in records}
    assert set(reasons.values()) <= {"length", "cancelled"}
    for number, (_, new) in enumerate(MIXED):
        if reasons[number] == "length":
            assert len(answers[number]) == new
    assert_all_greedy(family, MIXED, answers)
    replayed = replay(watcher.plan, read_log(log))
    assert [(each.request.number, each.reason) for each in replayed.records] == [
        (each.request.number, each.reason) for each in records
    ]
    mesh = pool.workers.plan.parallelism
    if mesh.kvp > 1:
        assert any(len(groups) > 1 for groups in watcher.groups), "no request grew over groups"
    if mesh.spp > 1:
        assert watcher.most_in_flight > 1, "the stages were never busy at once"


def test_decodes_grow_over_every_shard_edge_and_up_to_the_context_limit(pool):
    plan = pool.workers.plan
    if plan.parallelism.kvp == 1:
        pytest.skip("one group holds everything")
    shard = plan.kv.tokens_per_kvp_shard
    for edge in range(shard, CONTEXT, shard):
        works = [(edge - 3, 7)]
        answers, _, watcher = serve(pool, "llama", works)
        assert_all_greedy("llama", works, answers)
        shards = edge // shard
        assert {shards, shards + 1} <= {len(groups) for groups in watcher.groups}
    works = [(CONTEXT - 6, 6)]
    answers, records, _ = serve(pool, "llama", works)
    assert records[0].reason == "length"
    assert_all_greedy("llama", works, answers)


def test_a_request_longer_than_the_context_is_refused_before_a_rank_hears_of_it(pool):
    with pytest.raises(Refused, match="context limit"):
        serve(pool, "llama", [(CONTEXT, 1)])

"""The re-created engines compose the steps that their rules say, step by step on small loads."""

from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_audit import Audit
from strategies import make_plan, tiny_step_time

from plans.mesh import Parallelism
from plans.plan import Plan
from runtime.clock import VirtualClock
from runtime.engine import Engine
from runtime.executor.base import Step
from runtime.executor.simulated import SimulatedExecutor
from runtime.request import Request
from runtime.scheduler import ENGINES, load_policy

SECOND = 1.0
"""Every step takes about this long: see plan_of."""


def plan_of(*, pages: int = 128, sequences: int = 16, kvp: int = 1) -> Plan:
    """Steps of one second, 16 tokens a page, at most 1024 tokens a request: 64 pages over kvp."""
    plan = make_plan(
        parallelism=Parallelism(kvp=kvp),
        step_time=tiny_step_time(overhead_s=SECOND, margin=0.0),
        spare_pages=pages - 64 // kvp,
    )
    return msgspec.structs.replace(
        plan, limits=msgspec.structs.replace(plan.limits, sequences=sequences)
    )


@dataclass
class Served:
    """A finished run."""

    engine: Engine
    audit: Audit

    @property
    def steps(self) -> list[tuple[list[int], dict[int, int]]]:
        """(decodes, tokens of each chunk by request) of every step."""
        return [shape(step) for step in self.audit.steps]


def shape(step: Step) -> tuple[list[int], dict[int, int]]:
    return step.decodes.tolist(), {chunk.request: chunk.tokens for chunk in step.chunks}


def serve(
    spec: str,
    requests: list[tuple[float, int, int]],
    *,
    pages: int = 128,
    sequences: int = 16,
    kvp: int = 1,
) -> Served:
    """Runs (arrival, prompt, new tokens) to the end, audited."""
    plan = plan_of(pages=pages, sequences=sequences, kvp=kvp)
    scheduling = load_policy(spec, plan.scheduler)
    audit = Audit(plan, chunk_tokens=scheduling.chunk_tokens)
    clock = VirtualClock()
    executor = SimulatedExecutor(plan, clock)
    engine = Engine(plan, executor, clock, scheduling, observer=audit)
    for number, (arrival_s, prompt, new) in enumerate(requests):
        engine.add(
            Request(number=number, arrival_s=arrival_s, prompt_tokens=prompt, max_tokens=new)
        )
    engine.run()
    engine.book.check_integrity()
    assert engine.book.pools.used_share() == 0.0
    return Served(engine=engine, audit=audit)


# --- vLLM ---------------------------------------------------------------------------------------


def test_vllm_fills_the_budget_in_the_order_of_admission() -> None:
    """The older decode first, the prefill next, what is left to who waits."""
    run = serve("fcfs@vllm,chunk=100", [(0, 40, 5), (0.5, 250, 1), (0.6, 30, 2)])
    assert run.steps == [
        ([], {0: 40}),
        ([0], {1: 99}),
        ([0], {1: 99}),
        ([0], {1: 52, 2: 30}),
        ([0, 2], {}),
    ]


def test_vllm_leaves_nothing_to_decodes_behind_a_prefill_that_takes_all() -> None:
    """It is not decode-first by rule: a prefill that was admitted earlier goes before them."""
    run = serve("fcfs@vllm,chunk=100", [(0, 70, 1), (0, 180, 2), (0, 10, 3), (0.1, 5, 3)])
    first, second, third = run.steps[:3]
    assert first == ([], {0: 70, 1: 30})
    assert second == ([], {1: 100})
    assert third == ([], {1: 50, 2: 10, 3: 5})


def test_the_threshold_caps_each_request_and_not_a_lone_one() -> None:
    spec = "threshold@vllm,chunk=60,threshold=20"
    crowd = serve(spec, [(0, 90, 1), (0, 30, 1), (0, 90, 1)])
    assert crowd.steps[:2] == [([], {0: 20, 1: 20, 2: 20}), ([], {0: 20, 1: 10, 2: 20})]
    assert serve(spec, [(0, 90, 1)]).steps == [([], {0: 60}), ([], {0: 30})]
    always = serve(f"{spec},always", [(0, 50, 1)])
    assert always.steps == [([], {0: 20}), ([], {0: 20}), ([], {0: 10})]
    adaptive = serve(f"{spec},adaptive", [(0, 90, 1), (0, 90, 1)])
    assert adaptive.steps[0] == ([], {0: 30, 1: 30})


def test_the_first_prompt_that_does_not_fit_stops_the_scan() -> None:
    """Of 64 pages, 40 are taken; 30 more do not fit, and the prompt of one page waits behind."""
    run = serve("fcfs@vllm,chunk=192", [(0, 640, 2), (0, 480, 1), (0, 16, 1)], pages=64)
    together = [chunks for _, chunks in run.steps if len(chunks) > 1]
    assert together == [{1: 96, 2: 16}]
    assert all(record.evictions == 0 for record in run.engine.records)


def test_on_shortage_the_last_admitted_is_recomputed() -> None:
    """Both fill their pages; the older one's next token takes the page of the younger one."""
    run = serve("fcfs@vllm", [(0, 512, 40), (0, 512, 40)], pages=64)
    records = {each.request.number: each for each in run.engine.records}
    assert (records[0].evictions, records[1].evictions) == (0, 1)
    assert records[0].finished_s < records[1].finished_s


def test_deciding_ahead_delays_an_arrival_by_one_step() -> None:
    requests = [(0.0, 16, 6), (1.5, 16, 1)]
    now = serve("fcfs@vllm", requests)
    ahead = serve("fcfs@vllm,ahead", requests)
    where = [[1 in chunks for _, chunks in run.steps].index(True) for run in (now, ahead)]
    assert where == [2, 3]
    idle = serve("fcfs@vllm,ahead", [(0.0, 16, 1), (0.5, 16, 1), (9.0, 16, 1)])
    assert [record.first_token_s for record in idle.engine.records] == pytest.approx(
        [1, 2, 10],
        abs=0.01,  # three steps of 1 s and of 16 tokens, which cost below 2 ms
    )


# --- SGLang -------------------------------------------------------------------------------------


def test_sglang_prefills_before_it_decodes() -> None:
    run = serve("hrrn@sglang,chunk=96", [(0, 32, 3), (0.5, 200, 2)])
    assert run.steps == [
        ([], {0: 32}),
        ([], {1: 96}),
        ([], {1: 96}),
        ([], {1: 8}),
        ([0, 1], {}),
        ([0], {}),
    ]


def test_sglang_with_mixed_chunk_lets_decodes_ride_along() -> None:
    run = serve("hrrn@sglang,chunk=96,mixed", [(0, 32, 5), (0.5, 200, 2)])
    assert run.steps[:4] == [([], {0: 32}), ([0], {1: 80}), ([0], {1: 95}), ([0], {1: 25})]


def test_nothing_displaces_the_unfinished_prompt_of_sglang() -> None:
    """The short one has by far the highest ratio; it fits in only beside the last piece."""
    run = serve("hrrn@sglang,chunk=96", [(0, 250, 1), (0.5, 8, 1), (0.6, 300, 1)])
    assert run.steps[:3] == [([], {0: 96}), ([], {0: 96}), ([], {0: 58, 1: 8, 2: 16})]


def test_a_shard_edge_does_not_let_sglang_start_a_second_unfinished_prompt() -> None:
    """The first prompt ends a step at its shard's 256 tokens: only whole prompts join it there."""
    run = serve("hrrn@sglang,chunk=192", [(0, 300, 1), (0.5, 200, 1)], kvp=4)
    assert run.steps == [([], {0: 192}), ([], {0: 64}), ([], {0: 44, 1: 144}), ([], {1: 56})]


def test_sglang_retracts_the_decode_with_the_fewest_tokens() -> None:
    run = serve("hrrn@sglang", [(0, 512, 40), (3.5, 480, 40)], pages=64)
    records = {each.request.number: each for each in run.engine.records}
    assert records[0].evictions == 0
    assert records[1].evictions >= 1


# --- LMDeploy -----------------------------------------------------------------------------------


def test_lmdeploy_takes_three_short_turns_and_then_a_long_one() -> None:
    """Shorts of 40 tokens fill a step each; between the turns nothing decodes (one token each)."""
    shorts = [(0.0, 40, 1)] * 7
    run = serve("turns@lmdeploy,chunk=40", [(0.0, 120, 1), *shorts])
    assert [list(chunks) for _, chunks in run.steps] == [
        *([1], [2], [3], [0]),
        *([4], [5], [6], [0]),
        *([0], [7]),  # the last piece of the long is a short of 40 tokens, and came first
    ]


def test_lmdeploy_decodes_after_each_chunk_of_a_long_prompt() -> None:
    run = serve("turns@lmdeploy,chunk=40", [(0.0, 20, 6), (0.5, 110, 1)])
    assert run.steps[:6] == [
        ([], {0: 20}),
        ([], {1: 40}),
        ([0], {}),
        ([], {1: 40}),
        ([0], {}),
        ([], {1: 30}),
    ]


def test_lmdeploy_prefills_late_while_half_the_batch_runs() -> None:
    """With two of two running, 10 waiting tokens are no reason: 16 decode steps are."""
    run = serve(
        "turns@lmdeploy,chunk=40",
        [(0.0, 10, 30), (0.0, 10, 30), (2.5, 10, 1)],
        sequences=4,
    )
    first = [2 in chunks for _, chunks in run.steps].index(True)
    assert first == 1 + 16


# --- all ----------------------------------------------------------------------------------------

LOADS = st.lists(
    st.tuples(st.floats(0, 20), st.integers(1, 400), st.integers(1, 30)), min_size=1, max_size=8
).map(sorted)


@pytest.mark.parametrize("spec", [*ENGINES, "hrrn@sglang,chunk=48", "turns@lmdeploy,chunk=48"])
@settings(max_examples=15)
@given(load=LOADS, pages=st.sampled_from([64, 80, 128]))
def test_steps_keep_the_shape_of_their_engine(
    spec: str, load: list[tuple[float, int, int]], pages: int
) -> None:
    run = serve(spec, load, pages=pages)
    budget = load_policy(spec, plan_of().scheduler).chunk_tokens
    assert budget is not None
    partial: set[int] = set()
    for step in run.audit.steps:
        assert step.tokens <= budget
        partial -= set(step.evicted)
        if "@vllm" not in spec:
            assert not len(step.decodes) or not step.chunks, "prefill and decode share a step"
        for chunk in step.chunks:
            (partial.discard if chunk.samples else partial.add)(chunk.request)
        if "@sglang" in spec:
            assert len(partial) <= 1, "two unfinished prompts"
    assert len(run.engine.records) == len(load)

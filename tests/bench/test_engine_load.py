"""Loads of the engine's bench: served again in virtual time, and held against their prediction."""

import math
from functools import cache, partial
from pathlib import Path

import pytest

from bench.engine_load import (
    NEW_TOKENS,
    PREDICTED,
    SHORT,
    Ask,
    Outcome,
    burst_load,
    burst_row,
    host_of,
    mixed_load,
    mixed_row,
    predicted,
    predictions,
    shares_of,
    with_budget,
    write_steps,
)
from bench.engine_predicted import FIGURES, chunks_of, load_rows, step_rows
from bench.prediction_error import plans_for
from planner import measured
from plans.chunks import WorkTable
from plans.plan import Plan
from runtime.executor.ahead import keeps_ahead
from runtime.executor.simulated import AheadExecutor, Host, SimulatedExecutor

LONG = 20_000
HOST = Host(decide_s=0.001, chunk_s=0.004, decode_s=0.002)


@cache
def one_gpu() -> Plan:
    plan, _ = plans_for("llama3-8b", "h100", 32_768)
    return plan


@cache
def mixed() -> Outcome:
    executor = partial(AheadExecutor, host=HOST)
    return predicted(one_gpu(), mixed_load(0, LONG, 3.0), "lars-lanes", executor)


def noted(outcome: Outcome) -> Outcome:
    """The outcome as a live run writes it: with what the host took."""
    host = {"decide_ms": 1.0, "submit_ms": 3.0}
    steps = [each | host for each in outcome.steps]
    return Outcome(load=outcome.load, times=outcome.times, steps=steps)


def test_every_token_of_a_load_has_its_time_in_order():
    assert all(len(times) == NEW_TOKENS for times in mixed().times)
    assert all(list(times) == sorted(times) for times in mixed().times)
    assert min(mixed().ttft_s()) > 0


def test_a_lone_prompt_takes_what_the_plan_says_and_its_first_launch():
    plan = one_gpu()
    assert keeps_ahead(plan)
    [ttft_s] = predicted(plan, [Ask(0.0, LONG, 0)], "fcfs").ttft_s()
    work = WorkTable(plan.prefill.chunks, plan.step_time, plan.kv.tokens_per_kvp_shard)
    assert ttft_s == pytest.approx(work.solo_s(LONG), rel=1e-9)
    executor = partial(AheadExecutor, host=HOST)
    [behind_s] = predicted(plan, [Ask(0.0, LONG, 0)], "fcfs", executor).ttft_s()
    # the first step's launch runs beside it, the others' behind the step before
    assert behind_s == pytest.approx(ttft_s + HOST.decide_s, rel=1e-9)


def test_a_step_ahead_costs_an_arrival_time_and_no_work():
    plan, load = one_gpu(), mixed_load(0, LONG, 3.0)
    runs = [
        predicted(plan, load, "lars-lanes", *executor) for executor in ((), (SimulatedExecutor,))
    ]
    ahead, behind = (mixed_row(run) for run in runs)
    assert ahead["short_ttft_p90_s"] >= behind["short_ttft_p90_s"]
    # both run every token once, in other steps
    for kind in ("chunk_tokens", "decodes"):
        done, expected = (sum(each[kind] for each in run.steps) for run in runs)
        assert done == expected > 0
    # a request meets one step that was packed without it at most: then its prompt takes one more
    assert abs(ahead["steps"] - behind["steps"]) <= len(load)


def test_a_load_that_was_predicted_has_no_error():
    """The rows of a result file, where the measurement is the prediction itself."""
    plan = one_gpu()
    about = {"kind": "measured", "policy": "lars-lanes", "step_budget_s": 0.06}
    chosen = with_budget(plan, 0.06)
    rows = [
        {"part": "burst", **about} | burst_row(predicted(chosen, burst_load(9), "lars-lanes")),
        {"part": "mixed", "seed": 0, "load_s": 3.0, **about}
        | mixed_row(predicted(chosen, mixed_load(0, LONG, 3.0), "lars-lanes")),
    ]
    text = [{name: str(value) for name, value in row.items()} for row in rows]
    found = list(load_rows(text, [plan, plan], LONG))
    assert len(found) == len(FIGURES["burst"]) + len(FIGURES["mixed"])
    assert all(row["error"] == row["plan_alone"] == row["roofline"] == 0.0 for row in found)


def test_what_a_run_showed_can_be_put_in():
    plan, run = one_gpu(), noted(mixed())
    assert host_of(run.steps).chunk_s == 0.003
    kinds = dict(predictions(plan, run.load, run, "lars-lanes", HOST))
    assert mixed_row(kinds.pop(PREDICTED)) == mixed_row(
        predicted(plan, run.load, "lars-lanes", partial(AheadExecutor, host=HOST))
    )
    assert len(kinds) == 3
    slow = [each | {"device_ms": 2 * each["plan_ms"]} for each in run.steps]
    assert shares_of(slow) == pytest.approx((2.0, 2.0))


def test_other_steps_move_the_target_between_tokens_too():
    """Else steps of 0.1 s would be cut to the 50 ms that the plan aims at."""
    plan = with_budget(one_gpu(), 0.1)
    chunks = [each["plan_ms"] for each in predicted(plan, burst_load(12), "lars-lanes").steps]
    assert max(chunks) > 60


def test_steps_are_read_back_beside_the_formula_and_their_ops(tmp_path: Path):
    plan, run = one_gpu(), noted(mixed())
    place = {"part": "mixed", "step_budget_s": 0.03, "seed": 0}
    write_steps(tmp_path / "steps.csv", [place | each for each in run.steps])
    ready = measured.prepared("h100-sxm-80gb")
    assert ready is not None
    rows = step_rows(tmp_path / "steps.csv", plan, ready)
    *kinds, whole = rows
    assert whole["steps"] == len(run.steps) == sum(row["steps"] for row in kinds)
    assert math.isclose(sum(row["share"] for row in kinds), 1.0)
    # these steps took what the formula says, or their launch where that is longer, in six digits
    assert abs(whole["formula_median"]) < 1e-5
    # ops are what the formula is fitted to: its band bounds how far they are from it
    assert abs(whole["ops_sum"]) < one_gpu().predicted.error_band


def test_chunks_of_a_step_are_read_as_they_are_written():
    assert chunks_of("1000@0 24@976") == [(1000, 0), (24, 976)]
    assert chunks_of("") == []
    assert {ask.tokens for ask in burst_load(3)} == {SHORT}

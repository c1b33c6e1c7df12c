"""Summaries against hand-made runs: nobody who was offered disappears, and JSON stays JSON."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.workload import ClassTargets, Targets
from runtime.metrics import nearest_rank, spread, summarise, to_json
from runtime.request import NEVER, Record, Request

LONG = 1000
TARGETS = Targets(tbt_s=0.1, classes={"slow": ClassTargets(tbt_s=1.0)})


def request(number: int, **changes: object) -> Request:
    fields = {"arrival_s": float(number), "prompt_tokens": 10, "max_tokens": 11} | changes
    return Request(number=number, **fields)


def record(of: Request, **changes: object) -> Record:
    """Finished 1 s after a first token that came 0.2 s after arrival: TPOT 0.09 s."""
    fields = {
        "deadline_s": 0.5,
        "work_s": 0.1,
        "first_chunk_s": of.arrival_s + 0.1,
        "first_token_s": of.arrival_s + 0.2,
        "finished_s": of.arrival_s + 0.2 + 0.09 * (of.max_tokens - 1),
        "generated": of.max_tokens,
        "evictions": 0,
        "recomputed_tokens": 0,
        "reason": "length",
    } | changes
    return Record(request=of, **fields)


def summary_of(records, offered=None, **changes):
    offered = [each.request for each in records] if offered is None else offered
    fields = {"policy": "fcfs", "targets": TARGETS, "long_tokens": LONG} | changes
    return summarise(records, offered=offered, **fields)


@given(
    samples=st.lists(st.floats(0, 1e6), min_size=1, max_size=300),
    percent=st.sampled_from([50, 90, 99]),
)
def test_nearest_rank_is_the_smallest_sample_that_enough_do_not_exceed(samples, percent):
    ordered = np.sort(np.array(samples))
    needed = percent * len(samples)  # of 100 x samples: whole numbers, so no rounding
    brute = min(
        value for value in samples if 100 * sum(each <= value for each in samples) >= needed
    )
    assert nearest_rank(ordered, percent) == brute


def test_an_empty_class_has_no_figures():
    empty = spread(np.zeros(0))
    assert (empty.p50, empty.max, empty.mean, empty.missing) == (None, None, None, 0)
    run = summary_of([record(request(0))])
    assert run.classes["long"].requests == 0
    assert run.classes["long"].slo_attainment is None


def test_a_run_in_time_meets_every_slo():
    run = summary_of([record(request(number)) for number in range(4)])
    everyone = run.classes["all"]
    assert (everyone.requests, everyone.finished, everyone.slo_attainment) == (4, 4, 1.0)
    assert everyone.ttft_s.p99 == pytest.approx(0.2)
    assert everyone.e2e_s.max == pytest.approx(1.1)
    assert run.makespan_s == pytest.approx(4.1)
    assert run.goodput_rps == pytest.approx(4 / 4.1)
    assert run.output_tokens_per_s == pytest.approx(44 / 4.1)


def test_classes_split_at_the_length_of_long_prompts():
    lengths = [LONG - 1, LONG, LONG + 1]
    run = summary_of(
        [record(request(number, prompt_tokens=each)) for number, each in enumerate(lengths)],
        short_gaps_s=np.array([0.1]),
        long_gaps_s=np.array([0.3, 0.2]),
    )
    assert {name: each.requests for name, each in run.classes.items()} == {
        "all": 3,
        "short": 1,
        "long": 2,
    }
    assert run.classes["all"].tbt_s.max == 0.3
    assert run.classes["all"].tbt_s.p50 == 0.2
    assert run.classes["short"].tbt_s.max == 0.1


@pytest.mark.parametrize(
    ("changes", "met"),
    [
        ({}, True),
        ({"first_token_s": 0.5}, True),  # exactly at the deadline
        ({"first_token_s": 0.51}, False),
        ({"finished_s": 0.2 + 10 * 0.11}, False),  # tokens come too slowly
        ({"generated": 1, "finished_s": 0.2}, True),  # one token: no gap to be late in
        ({"reason": "unfinished"}, False),
        ({"reason": "cancelled"}, False),
    ],
)
def test_an_slo_needs_the_end_the_first_token_and_the_pace(changes, met):
    run = summary_of([record(request(0), **changes)])
    assert run.classes["all"].slo_attainment == float(met)
    assert (run.goodput_rps > 0) == met


def test_own_and_class_targets_come_before_the_plan():
    slow = {"finished_s": 0.2 + 10 * 0.5}
    own = summary_of([record(request(0, tbt_target_s=0.6), **slow)])
    named = summary_of([record(request(0, class_name="slow"), **slow)])
    unknown = summary_of([record(request(0, class_name="other"), **slow)])
    assert [run.classes["all"].slo_attainment for run in (own, named, unknown)] == [1.0, 1.0, 0.0]


def test_refused_unfinished_and_forgotten_requests_count_as_late():
    offered = [request(number) for number in range(4)]
    nothing = {"first_chunk_s": NEVER, "first_token_s": NEVER, "finished_s": NEVER, "generated": 0}
    run = summary_of(
        [
            record(offered[0]),
            record(offered[1], **nothing, reason="refused"),
            record(offered[2], **nothing, reason="unfinished", evictions=2, recomputed_tokens=70),
        ],
        offered,
    )
    everyone = run.classes["all"]
    assert (everyone.requests, everyone.finished, everyone.refused, everyone.unfinished) == (
        *(4, 1, 1, 2),
    )
    assert everyone.ttft_s.missing == everyone.e2e_s.missing == 3
    assert everyone.ttft_s.p90 == math.inf
    assert everyone.slo_attainment == 0.25
    assert (run.refused, run.evictions, run.recomputed_tokens) == (1, 2, 70)


def test_json_has_the_promised_keys_and_null_for_infinity():
    offered = [request(0), request(1)]
    text = to_json(summary_of([record(offered[0])], offered))

    def forbidden(token):
        raise AssertionError(token)

    found = json.loads(text, parse_constant=forbidden)
    assert {
        "policy",
        "classes",
        "goodput_rps",
        "output_tokens_per_s",
        "makespan_s",
        "wall_s",
    } <= set(found)
    assert set(found["classes"]) == {"all", "short", "long"}
    for name in ("all", "short", "long"):
        one = found["classes"][name]
        assert {"requests", "finished", "ttft_s", "tbt_s", "e2e_s", "slo_attainment"} <= set(one)
        for quantity in ("ttft_s", "tbt_s", "e2e_s"):
            assert {"p50", "p90", "p99", "max", "mean"} <= set(one[quantity])
    assert found["classes"]["all"]["ttft_s"] == {
        "p50": 0.2,
        "p90": None,
        "p99": None,
        "max": None,
        "mean": None,
        "missing": 1,
    }


def test_nothing_offered_gives_zeros_and_no_division():
    run = summary_of([], [])
    assert (run.makespan_s, run.goodput_rps, run.output_tokens_per_s) == (0.0, 0.0, 0.0)

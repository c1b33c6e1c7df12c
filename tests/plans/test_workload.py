"""Length tables: an inverse CDF, its mean and its mean square."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import quantile_tables, workloads

from plans.workload import length_at, mean_length, mean_square_length

QUANTILES = st.floats(0, 1)


@given(table=quantile_tables(), one=QUANTILES, two=QUANTILES)
def test_length_rises_from_the_first_row_to_the_last(table, one, two):
    assert length_at(table, min(one, two)) <= length_at(table, max(one, two))
    assert length_at(table, 0.0) == table[0][1]
    assert length_at(table, 1.0) == table[-1][1]


@given(table=quantile_tables())
def test_length_goes_through_every_row(table):
    assert [length_at(table, quantile) for quantile, _ in table] == [tokens for _, tokens in table]


def integral(table, power: int) -> float:
    """Of tokens ** power over the quantiles, by Simpson's rule: exact for cubics on each piece."""
    total = 0.0
    for (low_q, low), (high_q, high) in pairwise(table):
        middle = (low + high) / 2
        total += (high_q - low_q) / 6 * (low**power + 4 * middle**power + high**power)
    return total


@given(table=quantile_tables())
def test_means_equal_numeric_integration(table):
    assert mean_length(table) == pytest.approx(integral(table, 1), rel=1e-12)
    assert mean_square_length(table) == pytest.approx(integral(table, 2), rel=1e-12)


@given(table=quantile_tables())
def test_mean_equals_the_average_over_evenly_spread_quantiles(table):
    steps = 2000
    sampled = sum(length_at(table, (step + 0.5) / steps) for step in range(steps)) / steps
    # a monotone function's midpoint sum is off by at most its rise a step; rounding adds 0.5
    rise = table[-1][1] - table[0][1]
    assert abs(sampled - mean_length(table)) <= rise / steps + 0.5


@given(workload=workloads())
def test_longest_context_holds_the_longest_prompt(workload):
    longest = max(each.input_tokens[-1][1] for each in workload.classes)
    assert workload.max_input_tokens == longest < workload.max_context_tokens

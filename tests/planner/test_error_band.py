"""The band of a step time: between the errors of its terms, wider the further they were carried."""

import pytest
from builders import tiny_step_time
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from planner.error_band import doubted, weighted
from planner.estimates import MEASURED, Origin
from plans.steptime import table_s

TERMS = ("matmul", "attention", "collectives", "hop", "head", "overhead")
ERRORS = st.fixed_dictionaries({term: st.floats(0.0, 0.5) for term in TERMS})


@given(errors=ERRORS)
def test_a_band_lies_between_the_errors_of_its_terms(errors):
    band = weighted(tiny_step_time(), dict.fromkeys(TERMS, MEASURED), errors, 0.3)
    slack = 1e-9
    assert min(errors.values()) - slack <= band <= max(errors.values()) + slack


@given(errors=ERRORS, merge=st.floats(0.0, 0.5), groups=st.integers(2, 8))
def test_a_merge_of_groups_has_its_share(errors, merge, groups):
    """Its error moves the band where groups merge and not where one is alone."""
    time = structs.replace(tiny_step_time(), merge_latency_s=1e-3, merge_token_s=1e-6)
    origins = dict.fromkeys((*TERMS, "merge"), MEASURED)
    found = [
        weighted(time, origins, errors | {"merge": each}, 0.3, groups=groups)
        for each in (merge, merge + 0.5)
    ]
    alone = [
        weighted(time, origins, errors | {"merge": each}, 0.3) for each in (merge, merge + 0.5)
    ]
    assert found[0] < found[1]
    assert alone[0] == alone[1]
    slack = 1e-9
    assert found[0] <= max(*errors.values(), merge) + slack


@given(share=st.floats(0.0, 2.0))
def test_sums_in_the_table_have_the_doubt_of_collectives_up_to_all_of_it(share):
    time, origins = tiny_step_time(), dict.fromkeys(TERMS, MEASURED)
    errors = dict.fromkeys(TERMS, 0.0) | {"collectives": 0.5}

    def band(part):
        return weighted(
            time, origins, errors, 0.3, summed=lambda tokens: part * table_s(time.matmul, tokens)
        )

    assert band(0.0) <= band(share) <= band(1.0)
    if share > 0.01:
        assert band(0.0) < band(share)


def test_what_was_not_measured_has_the_error_of_a_formula():
    assert weighted(tiny_step_time(), {}, dict.fromkeys(TERMS, 0.01), 0.3) == pytest.approx(0.3)


@given(error=st.floats(0.0, 0.5), one=st.floats(1, 16), other=st.floats(1, 16))
def test_doubt_grows_with_the_distance_up_to_that_of_a_formula(error, one, other):
    near, far = sorted((one, other))
    assert doubted(error, near, 0.3) <= doubted(error, far, 0.3) <= max(error, 0.3)
    assert doubted(error, 1.0, 0.3) == error


def test_an_error_above_that_of_a_formula_stays_however_far():
    """It was seen: nothing makes it smaller, and distance adds nothing to it."""
    assert doubted(0.4, 1.0, 0.3) == doubted(0.4, 16.0, 0.3) == 0.4


def test_a_term_carried_further_widens_the_band():
    errors = dict.fromkeys(TERMS, 0.02)
    origins = dict.fromkeys(TERMS, MEASURED)
    far = origins | {"matmul": Origin(4.0, interpolated=True)}
    assert weighted(tiny_step_time(), far, errors, 0.3) > weighted(
        tiny_step_time(), origins, errors, 0.3
    )

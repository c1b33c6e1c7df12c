"""The band of a step time: between the errors of its terms, wider the further they were carried."""

import pytest
from builders import tiny_step_time
from hypothesis import given
from hypothesis import strategies as st

from planner.error_band import doubted, weighted
from planner.estimates import MEASURED, Origin

TERMS = ("matmul", "attention", "collectives", "hop", "head", "overhead")
ERRORS = st.fixed_dictionaries({term: st.floats(0.0, 0.5) for term in TERMS})


@given(errors=ERRORS)
def test_a_band_lies_between_the_errors_of_its_terms(errors):
    band = weighted(tiny_step_time(), dict.fromkeys(TERMS, MEASURED), errors, 0.3)
    slack = 1e-9
    assert min(errors.values()) - slack <= band <= max(errors.values()) + slack


def test_what_was_not_measured_has_the_error_of_a_formula():
    assert weighted(tiny_step_time(), {}, dict.fromkeys(TERMS, 0.01), 0.3) == pytest.approx(0.3)


@given(error=st.floats(0.0, 0.5), one=st.floats(1, 16), other=st.floats(1, 16))
def test_doubt_grows_with_the_distance_up_to_that_of_a_formula(error, one, other):
    near, far = sorted((one, other))
    assert doubted(error, near, 0.3) <= doubted(error, far, 0.3) <= max(error, 0.3)
    assert doubted(error, 1.0, 0.3) == error


def test_a_term_carried_further_widens_the_band():
    errors = dict.fromkeys(TERMS, 0.02)
    origins = dict.fromkeys(TERMS, MEASURED)
    far = origins | {"matmul": Origin(4.0, interpolated=True)}
    assert weighted(tiny_step_time(), far, errors, 0.3) > weighted(
        tiny_step_time(), origins, errors, 0.3
    )

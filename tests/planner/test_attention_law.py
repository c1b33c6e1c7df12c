"""The law of attention: found again from its own rows, and sane on rows of no law at all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.attention_law import (
    CHUNK_START,
    DECODE_START,
    chunk_features,
    chunk_us,
    decode_features,
    decode_us,
    fitted,
)
from planner.profiles import Row

CHUNKS = (chunk_us, chunk_features, CHUNK_START)
DECODES = (decode_us, decode_features, DECODE_START)
HEADS = ((8, 1, 128), (32, 8, 128), (32, 8, 64))
SIZES = {
    CHUNKS: [(t, p) for t in (32, 512, 2048) for p in (0, 2048, 32768, 524288)],
    DECODES: [(b, k) for b in (1, 4, 64) for k in (256, 4096, 65536)],
}
BETWEEN = {CHUNKS: [(90, 5000), (1000, 0), (1500, 100000)], DECODES: [(3, 700), (20, 30000)]}
KINDS = pytest.mark.parametrize("kind", [CHUNKS, DECODES], ids=["chunks", "decodes"])


def rows_of(kind, us):
    return [
        Row(key=(*heads, *size), role="fit", us=us(heads, size), spread_us=0.0)
        for heads in HEADS
        for size in SIZES[kind]
    ]


def law_of(kind, constants):
    law, features, _ = kind

    def us(heads, size):
        return float(law(np.log(constants), np.array([features(heads, *size)]))[0])

    return us


@KINDS
@settings(max_examples=20)
@given(data=st.data())
def test_a_device_of_this_very_law_is_predicted_between_its_rows(kind, data):
    """Constants within a factor of 1.5 of an H100's; rows show them without noise."""
    law, features, start = kind
    factors = [data.draw(st.floats(0.67, 1.5)) for _ in start]
    true = law_of(kind, np.array(start) * factors)
    found = fitted(rows_of(kind, true), law, features, start)
    for heads in HEADS:
        seen = found.us(heads, BETWEEN[kind], heads)
        # twelve rows a set of heads do not show how sharply two limits meet
        expected = [true(heads, size) for size in BETWEEN[kind]]
        assert seen == pytest.approx(expected, rel=0.05)


@KINDS
@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_rows_of_no_law_give_times_within_what_was_measured(kind, seed):
    law, features, start = kind
    draw = np.random.default_rng(seed)
    true = law_of(kind, start)
    found = fitted(
        rows_of(kind, lambda heads, size: true(heads, size) * draw.uniform(1, 3)),
        law,
        features,
        start,
    )
    for heads in HEADS:
        us = found.us(heads, BETWEEN[kind], heads)
        least = np.array([true(heads, size) for size in BETWEEN[kind]])
        assert (us > least / 3).all()
        assert (us < least * 9).all()


@KINDS
def test_what_the_law_leaves_is_kept_for_calls_near_a_row(kind):
    """One set of heads runs a third slower than the constants of all say."""
    law, features, start = kind
    true = law_of(kind, start)
    odd = HEADS[1]
    found = fitted(
        rows_of(kind, lambda heads, size: true(heads, size) * (1.33 if heads == odd else 1.0)),
        law,
        features,
        start,
    )
    for heads in HEADS:
        size = SIZES[kind][4]
        expected = true(heads, size) * (1.33 if heads == odd else 1.0)
        assert found.us(heads, [size], heads)[0] == pytest.approx(expected, rel=0.02)


def test_a_row_that_contradicts_itself_counts_less():
    law, features, start = DECODES
    true = law_of(DECODES, start)
    at = ((32, 8, 128), (4, 4096))
    sharp, loose = (
        fitted(
            [
                Row(
                    key=(*heads, *size),
                    role="fit",
                    us=true(heads, size) * (1.3 if (heads, size) == at else 1.0),
                    spread_us=spread if (heads, size) == at else 0.0,
                )
                for heads in HEADS
                for size in SIZES[DECODES]
            ],
            law,
            features,
            start,
        )
        for spread in (0.0, 10.0)
    )
    near = [(5, 5000)]
    expected = true(at[0], near[0])
    off = [abs(each.us(at[0], near, at[0])[0] / expected - 1) for each in (sharp, loose)]
    assert off[1] < off[0] / 2

"""Fits: exact where measured, rising, right on data of a known law, and silent about nothing."""

import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.estimates import MOST_FACTOR, MOST_LINEAR_FACTOR, OutOfRange, nonnegative
from planner.fit_attention import (
    Attention,
    chunk_sizes_of,
    decode_sizes_of,
    fit_chunk,
    fit_decode,
)
from planner.fits import Products, RowWise, curve, fit_links, heated, ring_share
from planner.profiles import Row

TIMES = st.floats(0.5, 1e6, allow_nan=False)


def row(*key, us):
    return Row(key=key, role="fit", us=us, spread_us=0.0)


@given(
    points=st.dictionaries(st.integers(1, 10**5), TIMES, min_size=1, max_size=8),
    at=st.floats(1, 10**5),
    more=st.floats(1, 2),
)
def test_a_curve_rises_and_keeps_its_points_where_they_rise(points, at, more):
    found = curve("test", points.items())
    at = min(at, max(points))
    assert found.read(at).seconds <= found.read(at * more).seconds * (1 + 1e-12)
    highest = 0.0
    for x, us in sorted(points.items()):
        highest = max(highest, us)
        estimate = found.read(x)
        assert estimate.seconds == pytest.approx(highest * 1e-6)
        assert str(estimate.origin) == "measured"


def test_a_curve_names_what_it_extrapolates_and_refuses_what_is_too_far():
    found = curve("a product, tokens", [(1, 10.0), (100, 20.0)])
    assert found.read(200).seconds == pytest.approx(40e-6)
    assert str(found.read(200).origin) == "extrapolated by 2"
    assert str(found.read(50).origin) == "interpolated"
    with pytest.raises(
        OutOfRange, match=r"a product, tokens: 401 .* \(1 to 100\) by a factor of 4"
    ):
        found.read(100 * MOST_FACTOR + 1)


RATE, BANDWIDTH = 5e8, 3e6  # operations and bytes in a microsecond


def product_us(n, k, tokens):
    return 1.5 + max(2 * n * k * tokens / RATE, 2 * (n * k + tokens * (n + k)) / BANDWIDTH)


SHAPES = [(n, k) for n in (1024, 4096, 16384) for k in (1024, 4096)]


def products():
    return Products(
        [
            row("linear", n, k, tokens, us=product_us(n, k, tokens))
            for n, k in SHAPES
            for tokens in (1 << power for power in range(14))
        ]
    )


@pytest.mark.parametrize("tokens", [1, 20, 300, 5000])
def test_an_unknown_shape_follows_the_law_of_its_neighbours(tokens):
    found = products().read("linear", 6000, 2500, tokens)
    # the law is that of the floor but for a constant that is taken into the efficiency
    assert found.seconds * 1e6 == pytest.approx(product_us(6000, 2500, tokens), rel=0.1)
    assert str(found.origin) == "interpolated"


def test_a_shape_far_from_all_others_is_marked_and_then_refused():
    assert str(products().read("linear", 16384, 12288, 64).origin) == "extrapolated by 3"
    with pytest.raises(OutOfRange, match="linear: 64 x 1024"):
        products().read("linear", 64, 1024, 1)
    with pytest.raises(OutOfRange, match="nothing"):
        products().read("gate_up_silu", 1024, 1024, 1)


def test_a_shape_measured_for_few_tokens_says_nothing_of_many():
    rows = [row("linear", 1000, 1000, 1, us=2.0), row("linear", 4000, 1000, 4096, us=90.0)]
    near = Products(rows).read("linear", 1100, 1000, 2048)
    assert near.seconds > 20e-6  # the other's rate, not 2048 times the first


def test_a_hot_chip_slows_what_products_bind_and_nothing_else():
    few, many = row("linear", 4096, 4096, 8, us=10.0), row("linear", 4096, 4096, 4096, us=200.0)
    assert heated([few, many], 1.1) == [few, row("linear", 4096, 4096, 4096, us=200.0 * 1.1)]


def test_rows_of_another_width_count_by_elements():
    fits = RowWise([row("norm", 1000, t, us=1 + t / 100) for t in (1, 100, 1000)])
    found = fits.read("norm", 2000, 100)
    assert found.seconds == pytest.approx(3e-6)
    assert str(found.origin) == "interpolated"
    with pytest.raises(OutOfRange, match="rope"):
        fits.read("rope", 1000, 1)


@given(
    start=st.floats(1, 100),
    pair=st.floats(1e-6, 1e-4),
    key=st.floats(1e-4, 1e-2),
)
def test_a_chunk_of_this_very_law_is_found_again(start, pair, key):
    sizes = [(t, p) for t in (32, 512, 4096) for p in (0, 2048, 32768, 524288)]
    tokens, prefix = np.array(sizes, dtype=float).T
    pairs = tokens * prefix + tokens * (tokens + 1) / 2
    us = start + np.maximum(pair * pairs, key * (tokens + prefix))
    found = fit_chunk(tokens, prefix, us * 1e-6)
    again = [found.seconds(int(t), int(p)) * 1e6 for t, p in sizes]
    # turns between starts and rates settle, they do not end: a per cent is left of them
    assert np.abs(np.array(again) / us - 1).max() < 0.05


@given(
    start=st.floats(0, 50), sequence=st.floats(0, 1), key=st.floats(1e-5, 1e-2), noise=st.randoms()
)
def test_decodes_of_this_very_law_are_found_again(start, sequence, key, noise):
    sizes = [(b, k) for b in (1, 8, 64) for k in (256, 4096, 65536)]
    batch, keys = np.array(sizes, dtype=float).T
    us = start + sequence * batch + key * batch * keys
    found = fit_decode(batch, keys, us * 1e-6)
    assert min(found) >= 0
    for (b, k), expected in zip(sizes, us, strict=True):
        assert found.seconds(b, k) * 1e6 == pytest.approx(expected, rel=1e-6)


@given(data=st.lists(st.tuples(TIMES, TIMES, TIMES), min_size=3, max_size=10))
def test_coefficients_are_never_negative_and_no_worse_than_one_column(data):
    a, b, seconds = np.array(data).T
    columns = np.stack([a, b], axis=1)
    found, _ = nonnegative(columns, seconds)
    assert (found >= 0).all()

    def loss(coefficients):
        return np.sum((columns @ coefficients / seconds - 1) ** 2)

    for at in range(2):
        alone = np.zeros(2)
        x = columns[:, at] / seconds
        alone[at] = x.sum() / (x @ x)
        assert loss(found) <= loss(alone) * (1 + 1e-9) + 1e-12


@functools.cache
def attention():
    """Of a device that takes a microsecond for 2e8 pairs' numbers and for 3 MB, and 5 to start."""
    chunks = [
        row(8, 2, 128, t, p, us=5 + t * (p + t) * 8 * 128 / 2e8)
        for t in (32, 512, 2048)
        for p in (0, 8192, 65536)
    ]
    decodes = [
        row(8, 2, 128, b, k, us=5 + b * k * 4 * 2 * 128 / 3e6)
        for b in (1, 16, 128)
        for k in (256, 1024, 8192)
    ]
    return Attention(chunks, decodes)


def test_attention_of_other_heads_follows_its_own_tiles_and_says_so():
    own, origin = attention().chunk((8, 2, 128), 65536)
    double, other = attention().chunk((16, 4, 128), 65536)
    # twice the work; how many tiles a processor gets in the last wave differs by up to one in six
    assert double.pair_s == pytest.approx(2 * own.pair_s, rel=1 / 6)
    assert str(origin) == "interpolated"
    assert str(other) == "extrapolated by 4"
    with pytest.raises(OutOfRange, match="64/16 heads of 128"):
        attention().chunk((64, 16, 128), 8192)


@pytest.mark.parametrize(("tokens", "prefix"), [(32, 8192), (512, 0), (2048, 65536)])
def test_a_measured_call_of_attention_is_met(tokens, prefix):
    found = attention().chunk_s((8, 2, 128), tokens, prefix).seconds * 1e6
    assert found == pytest.approx(5 + tokens * (prefix + tokens) * 8 * 128 / 2e8, rel=0.03)


def test_coefficients_of_a_plan_are_those_of_its_own_range():
    """Decodes of up to 8192 keys: within a layer's 20 us, the law is met as the formula can."""
    found, _ = attention().decode((8, 2, 128), 8192)
    for batch, keys in ((1, 1024), (16, 8192), (128, 1024)):
        law_s = attention().decode_s((8, 2, 128), batch, keys).seconds
        assert abs(found.seconds(batch, keys) - law_s) < 0.15 * (law_s + 20e-6)


@given(heads=st.sampled_from([(8, 2, 128), (16, 4, 128), (6, 2, 128)]), most=st.integers(1, 8192))
def test_coefficients_exist_for_every_context(heads, most):
    chunk, _ = attention().chunk(heads, most, 512)
    decode, _ = attention().decode(heads, most)
    assert min(chunk.pair_s, chunk.key_s, *chunk.start_s, *decode) >= 0
    assert max(chunk.pair_s, chunk.key_s, *chunk.start_s, *decode) < 1


def test_attention_beyond_the_measured_context_is_marked_and_then_refused():
    assert str(attention().decode((8, 2, 128), 65536)[1]) == "extrapolated by 8"
    too_far = int(8192 * MOST_LINEAR_FACTOR) + 1
    with pytest.raises(OutOfRange, match=f"attention_decode: {too_far} keys .*up to 8192"):
        attention().decode((8, 2, 128), too_far)


def test_rows_of_another_width_lie_between_their_neighbours_where_a_program_takes_a_row():
    us = {1000: 2.0, 3000: 4.0}
    fits = RowWise([row("rms_norm", w, t, us=us[w] * t) for w in us for t in (1, 100)])
    assert fits.read("rms_norm", 2000, 50).seconds == pytest.approx(3.0 * 50 * 1e-6)
    assert str(fits.read("rms_norm", 2000, 50).origin) == "interpolated"


def test_a_collective_is_scaled_as_the_bytes_of_a_ring():
    rows = [row("all_reduce", 2, size, us=20 + size / 1e3) for size in (1024, 65536, 1 << 20)]
    two, eight = (fit_links(rows, "all_reduce", devices) for devices in (2, 8))
    assert two.latency_s == pytest.approx(20e-6)
    assert two.byte_s == pytest.approx(1e-9)
    assert eight.byte_s == pytest.approx(1e-9 * 2 * 7 / 8)
    assert str(eight.origin) == "extrapolated by 4"
    assert fit_links(rows, "all_gather", 2) is None
    assert ring_share("all_gather", 4) == 3
    assert math.isclose(ring_share("send_recv", 4), 1)


@pytest.mark.parametrize(
    ("most_keys", "most_tokens"), [(1, 8192), (33, 64), (4096, 8192), (1 << 20, 2048)]
)
def test_coefficients_are_fitted_to_calls_that_a_plan_can_make(most_keys, most_tokens):
    chunks = chunk_sizes_of(most_keys, most_tokens)
    assert all(tokens + prefix <= most_keys for tokens, prefix in chunks)
    assert all(1 <= tokens <= most_tokens and prefix >= 0 for tokens, prefix in chunks)
    assert max(tokens + prefix for tokens, prefix in chunks) > 0.9 * most_keys
    decodes = decode_sizes_of(most_keys)
    assert all(1 <= batch <= 256 and 1 <= keys <= most_keys for batch, keys in decodes)
    assert max(keys for _, keys in decodes) > 0.9 * most_keys

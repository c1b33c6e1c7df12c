"""Sums over tp ranks: one launch for few tokens, NCCL for many, a line below both."""

import importlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.estimates import MEASURED, OutOfRange
from planner.fits import LinkTime, RowWise
from planner.profiles import PROFILES, Row, read_profile
from planner.reduce_time import OP, Fused, Reduce, fused_of, fused_tokens

WIDTH = 4096
NCCL = LinkTime(latency_s=10e-6, byte_s=4e-12, origin=MEASURED)


def rows(op, us, *, ranks=None):
    devices = () if ranks is None else (ranks,)
    return [
        Row(key=(op, *devices, WIDTH, tokens), role="fit", us=us(tokens), spread_us=0.0)
        for tokens in (1, 8, 64, 256, 1024)
    ]


def reduce(ranks=2, *, fused=True):
    return Reduce(
        ranks=ranks,
        width=WIDTH,
        link=NCCL,
        fused=Fused(rows(OP, lambda tokens: 5 + 0.03 * tokens, ranks=2)) if fused else None,
        norms=RowWise(rows("add_rms_norm", lambda tokens: 1.5 + 0.01 * tokens)),
    )


@pytest.mark.parametrize(("ranks", "width"), [(2, 4096), (2, 16384), (4, 8192), (8, 4096)])
def test_one_launch_serves_the_steps_that_the_kernel_takes(ranks, width):
    params = importlib.import_module("codegen.kernels.all_reduce_add_rms_norm.spec").PARAMS
    kib = params["PAIR_READ_KIB_MAX"] if ranks == 2 else params["READ_KIB_MAX"]
    most = fused_tokens(ranks, 2 * width)
    taken = [
        tokens <= params["TOKENS_MAX"] and (ranks - 1) * tokens * 2 * width <= kib << 10
        for tokens in (most, most + 1)
    ]
    assert taken == [True, False]


def test_few_tokens_take_the_launch_less_the_norm_and_many_take_nccl():
    found = reduce()
    assert found.seconds(64) == pytest.approx(1e-6 * (5 + 0.03 * 64 - (1.5 + 0.01 * 64)))
    assert str(found.origin) == "measured"
    assert found.seconds(512) == pytest.approx(10e-6 + 512 * 2 * WIDTH * 4e-12)
    assert reduce(fused=False).seconds(1) == pytest.approx(10e-6 + 2 * WIDTH * 4e-12)


def test_more_ranks_read_in_proportion_and_are_called_extrapolated():
    found = reduce(ranks=4)
    # 8 tokens of three peers are read as 24 of one are
    launch_us = 5 + 0.03 * 24
    assert found.seconds(8) == pytest.approx(1e-6 * (launch_us - (1.5 + 0.01 * 8)))
    assert str(found.origin) == "extrapolated by 2"


@given(ranks=st.sampled_from([2, 4, 8]), fused=st.booleans())
def test_the_line_is_nowhere_above_the_sum_and_meets_one_token(ranks, fused):
    found = reduce(ranks, fused=fused)
    sizes = [1, 2, 3, 8, 16, 24, 64, 96, 128, 256, 257, 2048, 8192]
    line = found.line(sizes)
    assert line.latency_s >= 0
    assert line.token_s >= 0
    for size in sizes:
        seconds = found.seconds(size)
        # 1e-12: one rounding of sums of microseconds
        assert line.latency_s + size * line.token_s <= seconds + 1e-12
        whole_s = line.latency_s + size * line.token_s + line.beyond(size, seconds)
        assert whole_s == pytest.approx(seconds)
    assert line.beyond(1, found.seconds(1)) == pytest.approx(0.0, abs=1e-12)


def test_a_width_far_outside_is_refused():
    found = Fused(rows(OP, lambda tokens: 5 + 0.03 * tokens, ranks=2))
    with pytest.raises(OutOfRange, match=OP):
        found.read(2, 64 * WIDTH, 256)


def test_shipped_launches_are_read_back_as_they_were_measured():
    """Whatever a profile says: no row of it is assumed to be short."""
    profile = read_profile(PROFILES / "h100-sxm-80gb")
    fused, rows = fused_of(profile), [row for row in profile.rows("fused") if row.key[0] == OP]
    assert fused is not None
    assert rows
    for row in rows:
        _, ranks, width, tokens = row.key
        # in microseconds and back: two roundings
        assert fused.read(ranks, width, tokens).seconds * 1e6 == pytest.approx(row.us, rel=1e-12)

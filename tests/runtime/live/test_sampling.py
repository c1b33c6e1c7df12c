"""Sampling against a brute-force float64 implementation of the filtered distribution."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from plans.errors import MedhaError, UsageError
from runtime.sampling import probabilities, sample, uniform
from runtime.sampling_params import SEED_MAX, SamplingParams

# a coarse grid, so that ties are common
LOGITS = st.lists(st.integers(-12, 12).map(lambda each: each / 4), min_size=1, max_size=12)
SEEDS = st.integers(0, SEED_MAX)
EDGE = 1e-9  # sums of a dozen float64 terms differ by some 1e-15 between orders of summation


@st.composite
def sampling_params(draw: st.DrawFn, *, greedy: bool = True) -> SamplingParams:
    temperatures = [0.3, 1.0, 1.7, 1e-300, 1e300] + [0.0] * greedy
    return SamplingParams(
        temperature=draw(st.sampled_from(temperatures)),
        top_k=draw(st.integers(0, 14)),
        top_p=draw(st.sampled_from([1.0, 0.999, 0.8, 0.5, 0.1, 1e-6])),
        min_p=draw(st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0])),
        seed=draw(SEEDS),
    )


def filtered(logits: list[float], params: SamplingParams) -> list[float]:
    """The distribution by the rules of runtime/sampling.py, one token at a time.

    Cases where rounding decides a filter are not examples of anything, so they are assumed away.
    """
    best = max(logits)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if params.temperature == 0:
        return [float(token == order[0]) for token in range(len(logits))]
    weight = [math.exp((each - best) / params.temperature) for each in logits]
    last = logits[order[(params.top_k or len(logits)) - 1]] if params.top_k < len(logits) else None
    kept = [token for token in order if last is None or logits[token] >= last]
    total = math.fsum(weight[token] for token in kept)
    before, nucleus = 0.0, []
    for token in kept:
        assume(params.top_p == 1 or abs(before - params.top_p) > EDGE)
        if params.top_p == 1 or before < params.top_p:
            nucleus.append(token)
        before += weight[token] / total
    chosen = set()
    for token in nucleus:
        assume(weight[token] == 1 or abs(weight[token] - params.min_p) > EDGE)
        if weight[token] >= params.min_p:
            chosen.add(token)
    total = math.fsum(weight[token] for token in chosen)
    return [weight[token] / total if token in chosen else 0.0 for token in range(len(logits))]


@given(LOGITS, sampling_params())
def test_the_filtered_distribution_is_the_brute_force_one(logits, params):
    expected = filtered(logits, params)
    found = probabilities(torch.tensor([logits]), [params])[0].tolist()
    assert [each > 0 for each in found] == [each > 0 for each in expected]
    assert found == pytest.approx(expected, abs=1e-12)


@given(LOGITS, sampling_params(greedy=False), st.integers(0, 1 << 20))
def test_a_draw_is_the_inverse_cdf_at_the_number_of_seed_and_position(logits, params, position):
    at = uniform(params.seed, position)
    reached, expected = 0.0, None
    for token, chance in enumerate(filtered(logits, params)):
        reached += chance
        assume(abs(reached - at) > EDGE)
        if expected is None and reached > at:
            expected = token
    assert sample(torch.tensor([logits]), [params], [position]) == [expected]


@given(
    st.integers(1, 9).flatmap(
        lambda vocab: st.lists(
            st.tuples(
                st.lists(st.floats(-30, 30, width=32), min_size=vocab, max_size=vocab),
                sampling_params(),
                st.integers(0, 1000),
            ),
            min_size=1,
            max_size=5,
        )
    )
)
def test_a_row_draws_the_same_alone_as_in_a_batch(rows):
    together = sample(
        torch.tensor([logits for logits, _, _ in rows]),
        [params for _, params, _ in rows],
        [position for _, _, position in rows],
    )
    alone = [
        sample(torch.tensor([logits]), [params], [position]) for logits, params, position in rows
    ]
    assert [[token] for token in together] == alone


@given(LOGITS, SEEDS)
def test_temperature_0_takes_the_first_of_the_best(logits, seed):
    assert sample(torch.tensor([logits]), [SamplingParams(seed=seed)], [0]) == [
        logits.index(max(logits))
    ]


def test_draws_follow_the_distribution():
    """By Hoeffding, 20000 draws stray by 0.03 with probability below 2 exp(-36) a token."""
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.0]])
    params = SamplingParams(temperature=0.8, seed=11)
    draws = 20_000
    tokens = sample(logits.expand(draws, -1), [params] * draws, range(draws))
    weights = [math.exp(each / params.temperature) for each in logits[0].tolist()]
    expected = [weight / sum(weights) for weight in weights]
    shares = [tokens.count(token) / draws for token in range(4)]
    assert shares == pytest.approx(expected, abs=0.03)


def test_a_stream_does_not_repeat_itself_or_its_neighbour():
    stream = [uniform(seed, position) for seed in (0, 1) for position in range(1000)]
    assert all(0 <= each < 1 for each in stream)
    assert all(left != right for left, right in pairwise(sorted(stream)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_end_with_an_error(value):
    logits = torch.tensor([[0.0, 1.0], [value, 0.0]])
    with pytest.raises(MedhaError, match="row 1 are not finite"):
        sample(logits, [SamplingParams(), SamplingParams(temperature=1.0)], [0, 0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.5},
        {"seed": -1},
        {"seed": SEED_MAX + 1},
    ],
)
def test_a_parameter_outside_its_range_is_refused_by_name(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SamplingParams(**wrong)

"""The sampling kernel draws the runtime's tokens, given the same numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels.sample import tiles
from codegen.kernels.sample.reference import sample as reference
from codegen.kernels.sample.triton import sample
from runtime.sampling import controls as table_of
from runtime.sampling import draw, probabilities
from runtime.sampling_params import SamplingParams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poison")


def close(vocab: int) -> float:
    """What double precision makes at most of a sum of shares in another order: half a unit in the
    last place a term, on either side; some for the exponentials, where there are few terms."""
    return max(vocab, 4096) * 2.0**-52


def controls(params: list[SamplingParams], positions: list[int]) -> torch.Tensor:
    return torch.from_numpy(table_of(params, positions)).to(DEVICE)


@st.composite
def requests(draw_: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        temperature=draw_(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
        top_k=draw_(st.sampled_from([0, 0, 1, 2, 17, 50, 64, 500])),
        top_p=draw_(st.sampled_from([1.0, 1.0, 0.05, 0.531, 0.9])),
        min_p=draw_(st.sampled_from([0.0, 0.0, 0.013, 0.3])),
        seed=draw_(st.integers(0, 1000)),
    )


def logits_of(kind: str, rows: int, vocab: int, seed: int) -> torch.Tensor:
    """Spread, nearly equal, tied as those of a bf16 head, tied in large numbers, or mostly -inf."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, vocab, generator=generator) * 3
    if kind == "flat":
        x *= 1e-3
    elif kind == "bf16":
        x = (x + 20).bfloat16().float()
    elif kind == "tied":
        x = x.round()
    elif kind == "masked":
        x[:, 1:] = torch.where(x[:, 1:] > 1, x[:, 1:], -torch.inf)
    return x.to(DEVICE)


def near_a_threshold(logits: torch.Tensor, params: SamplingParams) -> bool:
    """Whether double precision in another order may decide otherwise than the runtime."""
    scaled = logits.double() - logits.double().max()
    scaled = scaled / params.temperature
    ordered = scaled.sort(descending=True, stable=True).values
    if 0 < params.top_k < len(ordered):
        ordered = ordered.masked_fill(ordered < ordered[params.top_k - 1], -torch.inf)
    chance = ordered.softmax(-1)
    before = chance.cumsum(-1) - chance
    near = close(len(logits))
    nucleus = ((before - params.top_p).abs() < near).any() if params.top_p < 1 else False
    floor = params.min_p * chance[0]
    unlikely = ((chance - floor).abs() < near * floor).any() if params.min_p else False
    return bool(nucleus or unlikely)


def picks_an_edge(logits: torch.Tensor, params: SamplingParams, number: float) -> bool:
    """Whether the number lies on the border of two tokens."""
    reached = probabilities(logits[None], [params])[0].cumsum(-1)
    return bool(((reached - number * reached[-1]).abs() < close(len(logits))).any())


@settings(max_examples=30)
@given(
    params=st.lists(requests(), min_size=1, max_size=4),
    kind=st.sampled_from(["spread", "flat", "bf16", "tied", "masked"]),
    vocab=st.sampled_from([1, 5, 64, 130, 1000, 3000]),
    position=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_kernel_and_reference_draw_what_the_runtime_draws(params, kind, vocab, position, seed):
    logits = logits_of(kind, len(params), vocab, seed)
    positions = [position] * len(params)
    table = controls(params, positions)
    expected = draw(logits, params, positions)
    for found in (reference(logits, table), sample(logits, table)):
        assert found.dtype == torch.int64
        assert torch.equal(found[1], expected[1])
        for row, each in enumerate(params):
            if each.greedy or not (
                near_a_threshold(logits[row], each)
                or picks_an_edge(logits[row], each, table[row, 4].item())
            ):
                assert found[0, row] == expected[0, row], (each, row)


def test_ties_that_fill_more_than_the_list_are_drawn_over_the_whole_row():
    """2000 tokens tie for the second place: the k-th best is one of them, and all of them stay."""
    logits = torch.zeros(1, 2001, device=DEVICE)
    logits[0, 777] = 1.0
    assert tiles.LIST.value < 2000
    drawn = set()
    for seed in range(12):
        params = [SamplingParams(temperature=1.0, top_k=2, seed=seed)]
        expected = draw(logits, params, [0])
        found = sample(logits, controls(params, [0]))
        assert torch.equal(found, expected)
        drawn.add(int(found[0, 0]))
    assert len(drawn) > 6


def test_the_nucleus_of_a_flat_row_reaches_beyond_the_best_groups():
    logits = logits_of("flat", 3, 5000, 0)
    params = [SamplingParams(temperature=1.0, top_p=0.97, seed=seed) for seed in range(3)]
    assert torch.equal(sample(logits, controls(params, [0] * 3)), draw(logits, params, [0] * 3))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize(
    "bad", [torch.nan, -torch.nan, torch.inf], ids=["nan", "negative nan", "inf"]
)
def test_a_row_that_is_not_finite_is_reported_and_the_others_are_drawn(bad):
    logits = logits_of("spread", 3, 200, 1)
    logits[1, 150] = bad
    params = [SamplingParams(), SamplingParams(temperature=0.7), SamplingParams(temperature=0.7)]
    found = sample(logits, controls(params, [0, 0, 0]))
    assert found[1].tolist() == [1, 0, 1]
    expected = draw(logits, params, [0, 0, 0])
    assert found[0, 0] == expected[0, 0]
    assert found[0, 2] == expected[0, 2]


def test_a_row_is_drawn_alike_in_any_batch():
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.8, seed=1),
        SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=2),
        SamplingParams(temperature=0.8, top_p=0.9, seed=3),
        SamplingParams(temperature=1.5, min_p=0.02, seed=4),
    ]
    logits = logits_of("spread", 5, 900, 7)
    table = controls(params, list(range(5)))
    together = sample(logits, table)
    assert torch.equal(together, sample(logits, table))
    for row in range(5):
        assert torch.equal(
            sample(logits[row : row + 1], table[row : row + 1])[:, 0], together[:, row]
        )
    order = torch.tensor([3, 0, 4, 2], device=DEVICE)
    assert torch.equal(sample(logits[order], table[order]), together[:, order])


def test_zeros_of_both_signs_tie():
    logits = torch.tensor([[-1.0, -0.0, 0.0, -2.0]], device=DEVICE)
    params = [SamplingParams()]
    assert sample(logits, controls(params, [0]))[0].tolist() == [1]


def test_rows_of_a_wider_tensor_and_of_16_bits_are_read_as_they_lie():
    wide = logits_of("bf16", 2, 300, 3)
    params = [SamplingParams(temperature=0.9, top_k=20, seed=5)] * 2
    table = controls(params, [1, 1])
    expected = draw(wide[:, :200], params, [1, 1])
    assert torch.equal(sample(wide[:, :200], table), expected)
    assert torch.equal(sample(wide.bfloat16()[:, :200], table), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["spread", "flat", "bf16", "tied"])
def test_a_vocabulary_of_128k_is_drawn_on_the_device(kind, fresh_seed):
    params = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        for seed, (temperature, top_k, top_p, min_p) in enumerate(
            [
                (0.0, 0, 1.0, 0.0),
                (1.0, 0, 1.0, 0.0),
                (0.7, 50, 1.0, 0.0),
                (0.8, 64, 0.9, 0.0),
                (0.6, 0, 0.9, 0.0),
                (1.0, 0, 1.0, 0.05),
                (2.0, 40, 0.97, 0.013),
            ]
        )
    ]
    for position in range(8):
        logits = logits_of(kind, len(params), 128_256, fresh_seed + position)
        positions = [position] * len(params)
        table = controls(params, positions)
        found, expected = sample(logits, table), draw(logits, params, positions)
        for row, each in enumerate(params):
            if each.greedy or not (
                near_a_threshold(logits[row], each)
                or picks_an_edge(logits[row], each, table[row, 4].item())
            ):
                assert found[:, row].tolist() == expected[:, row].tolist(), (each, position)

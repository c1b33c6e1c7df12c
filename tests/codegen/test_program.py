"""Emitted programs, run as the runtime runs them, equal the unchunked model file."""

from collections.abc import Iterator

import pytest
import torch
from builders import make_plan, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_codegen import Machine, Sequence, loaded, logit_tolerance, reference, small_models

from codegen.emit import emit_program
from plans.mesh import Parallelism
from plans.model import Model
from plans.plan import Plan

LAYOUTS = {
    "tp1": {},
    "tp2": {"parallelism": Parallelism(tp=2)},
    "tp4-more-ranks-than-kv-heads": {"parallelism": Parallelism(tp=4)},
    "spp2": {"parallelism": Parallelism(spp=2)},
    "spp3-uneven": {"parallelism": Parallelism(spp=3), "stage_layers": (2, 1, 1)},
    "kvp2": {"parallelism": Parallelism(kvp=2)},
    "kvp3": {"parallelism": Parallelism(kvp=3)},
    "tp2-spp2-kvp2": {"parallelism": Parallelism(tp=2, spp=2, kvp=2)},
}
ROWS = ((64, 32), (96, 32))
"""A context of 96 tokens, so that short tests reach the second and third KVP shard."""


@pytest.fixture(scope="module", params=LAYOUTS)
def machine(request, tmp_path_factory) -> Iterator[Machine]:
    plan = make_plan(rows=ROWS, **LAYOUTS[request.param])
    with loaded(emit_program(plan), tmp_path_factory.mktemp("program")) as load:
        yield Machine(plan, load)


@st.composite
def works(draw: st.DrawFn) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Prompts, and steps of (sequence, tokens at most)."""
    lengths = draw(st.lists(st.integers(1, 96), min_size=1, max_size=3))
    prompts = [
        draw(st.lists(st.integers(0, 255), min_size=length, max_size=length)) for length in lengths
    ]
    sequences = st.integers(0, len(lengths) - 1)
    rows = st.lists(
        st.tuples(sequences, st.sampled_from([1, 1, 2, 7, 16, 40])),
        min_size=1,
        max_size=3,
        unique_by=lambda row: row[0],
    )
    return prompts, draw(st.lists(rows, max_size=6))


def run_all(
    machine: Machine, sequences: list[Sequence], steps: list[list[tuple[int, int]]]
) -> None:
    """The steps, and then what is left of each sequence at once; chunks end at shards."""
    shard = machine.plan.kv.tokens_per_kvp_shard

    def chunk(sequence: Sequence, most: int) -> int:
        to_edge = shard - sequence.done % shard
        return min(most, to_edge, len(sequence.tokens) - sequence.done)

    for step in steps:
        work = [(sequences[at], chunk(sequences[at], most)) for at, most in step]
        if any(count for _, count in work):
            machine.step([(sequence, count) for sequence, count in work if count])
    while unfinished := [each for each in sequences if each.done < len(each.tokens)]:
        machine.step([(each, chunk(each, len(each.tokens))) for each in unfinished])


def give_back(machine: Machine, sequences: list[Sequence]) -> None:
    for sequence in sequences:
        for group, pages in sequence.pages.items():
            machine.free[group] += pages


def check_equal(model: Model, sequences: list[Sequence]) -> None:
    whole = reference(model)
    for sequence in sequences:
        ids = torch.tensor(sequence.tokens)
        expected = whole(ids, torch.arange(len(ids)))
        found = torch.cat(sequence.logits)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=logit_tolerance(expected))


@settings(max_examples=8)
@given(work=works())
def test_packed_chunks_on_shuffled_pages_equal_the_whole_prompt(machine, work):
    prompts, steps = work
    sequences = [Sequence(tokens=prompt) for prompt in prompts]
    run_all(machine, sequences, steps)
    check_equal(machine.plan.model, sequences)
    give_back(machine, sequences)


@settings(max_examples=12)
@given(model=small_models(), tokens=st.lists(st.integers(0, 49), min_size=1, max_size=30))
def test_every_shape_of_model_compiles_to_itself(model, tokens, tmp_path_factory):
    plan = make_plan(model=model, rows=ROWS)
    with loaded(emit_program(plan), tmp_path_factory.mktemp("program")) as load:
        machine = Machine(plan, load)
        sequence = Sequence(tokens=tokens)
        run_all(machine, [sequence], [[(0, 5)], [(0, 1)]])
    check_equal(model, [sequence])


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": True, "tie_embeddings": True},
        {"qk_norm": True, "head_dim": 32},
        {"vocab": 255},
    ],
    ids=["biases-and-tied-head", "head-norms", "vocabulary-that-tp-does-not-divide"],
)
def test_tensor_parallel_variants_equal_the_whole_model(changes, tmp_path):
    plan = make_plan(model=tiny_model(**changes), rows=ROWS, parallelism=Parallelism(tp=2, spp=2))
    with loaded(emit_program(plan), tmp_path) as load:
        machine = Machine(plan, load)
        sequence = Sequence(tokens=list(range(3, 90, 2)))
        run_all(machine, [sequence], [[(0, 20)], [(0, 1)]])
    check_equal(plan.model, [sequence])


def sixteen_bit_plan() -> Plan:
    return make_plan(model=tiny_model(weight_dtype="bf16"), kv_dtype="bf16", rows=ROWS)


def test_bf16_programs_equal_the_bf16_model(tmp_path):
    """Chunking changes where bf16 values round, not what they are.

    Each of the 4 layers rounds some ten values in a row to 8 bits; errors of 2^-9 each, in random
    directions, over 40 roundings are sqrt(40) x 2^-9 = 1.2 % of the values' size, and the largest
    of some 10^4 logits is four standard deviations out: 5 %.
    """
    plan = sixteen_bit_plan()
    with loaded(emit_program(plan), tmp_path) as load:
        machine = Machine(plan, load)
        sequence = Sequence(tokens=list(range(3, 90, 2)))
        run_all(machine, [sequence], [[(0, 20)], [(0, 1)]])
    ids = torch.tensor(sequence.tokens)
    expected = reference(plan.model)(ids, torch.arange(len(ids)))
    difference = (torch.cat(sequence.logits) - expected).abs().max()
    assert difference <= 0.05 * expected.abs().max()


def test_only_sampled_rows_get_logits(tmp_path):
    plan = make_plan(rows=ROWS)
    with loaded(emit_program(plan), tmp_path) as load:
        machine = Machine(plan, load)
        inputs = machine.inputs([(Sequence(tokens=[5, 6, 7, 8]), 4)], 0)
        inputs.sample_rows_R = torch.tensor([3, 1])
        logits = machine.programs[0].forward(machine.weights[0], inputs, machine.caches[0], None)
    ids = torch.tensor([5, 6, 7, 8])
    expected = reference(plan.model)(ids, torch.arange(4))[[3, 1]]
    torch.testing.assert_close(logits, expected, rtol=0, atol=logit_tolerance(expected))

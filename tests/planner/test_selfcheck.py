"""The planner's own rules: each lets a good answer pass and names what breaks it."""

import dataclasses
import hashlib

import pytest
from msgspec import structs
from strategies_planner import by_datasheet

from planner import export as exporting
from planner import selfcheck
from planner.answer import answer
from planner.catalog import load_device, load_model, load_workload, topology_for
from planner.selfcheck import SelfCheckFailed, check_files, verify
from planner.world import make_world
from plans.plan import MadeBy

MADE_BY = MadeBy(medha="0", effort="quick", seed=0, command="medha-plan")


def answered(model, gpus, *, measured):
    device = load_device("h100")
    world = make_world(
        model=load_model(model),
        device=device if measured else by_datasheet(device),
        topology=topology_for(device, gpus),
        workload=load_workload("chat"),
    )
    machines = lambda count: topology_for(device, count)  # noqa: E731
    return answer(world, name=lambda _: "p", made_by=MADE_BY, machines=machines)


@pytest.fixture(scope="module")
def good():
    """A plan whose step time was measured, on two GPUs."""
    return answered("llama3-8b", 2, measured=True)


def broken(name, good, plan=None, found=None):
    with pytest.raises(SelfCheckFailed) as caught:
        verify(found or good.found, plan or good.plan)
    assert caught.value.name == name
    return str(caught.value)


def with_time(plan, **changes):
    return structs.replace(plan, step_time=structs.replace(plan.step_time, **changes))


@pytest.mark.parametrize("measured", [True, False])
def test_good_answers_pass(good, measured):
    given = good if measured else answered("llama3-8b", 1, measured=False)
    verify(given.found, given.plan)


@pytest.mark.parametrize("gpus", [2, 4, 8])
@pytest.mark.parametrize("model", ["qwen2.5-0.5b", "llama3.2-1b"])
def test_sums_whose_time_stands_in_the_layers_table_are_not_faster_than_light(model, gpus):
    given = answered(model, gpus, measured=True)
    verify(given.found, given.plan)


def test_sums_and_products_together_are_held_to_the_data_sheet(good, monkeypatch):
    rows = selfcheck.breakdown(good.found.ranked[0])
    assert list(selfcheck.speed_of_light(good.found.ranked[0])) == []
    fast = [
        dataclasses.replace(row, seconds=0.0)
        if row.op in {"collectives", "matrix products"}
        else row
        for row in rows
    ]
    monkeypatch.setattr(selfcheck, "breakdown", lambda best: fast)
    assert any("matrix products" in each for each in selfcheck.speed_of_light(good.found.ranked[0]))


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({"pair_s": -1e-6, "key_s": -1e-6}, "tokens of a chunk"),
        ({"pair_s": -1.0, "key_s": -1e-9}, "prefix of"),
        ({"merge_token_s": -1.0}, "groups of"),
        ({"decode_sequence_s": -1.0}, "decodes of"),
        ({"decode_key_s": -1e-9}, "keys of"),
    ],
)
def test_a_step_that_more_work_makes_shorter_is_found(good, changes, more):
    plan = with_time(good.plan, **changes)
    plan = structs.replace(plan, parallelism=structs.replace(plan.parallelism, kvp=2))
    assert any(text.startswith(f"more {more}") for text in selfcheck.monotone(plan))


def with_provenance(plan, **changes):
    predicted = plan.predicted
    said = {**predicted.provenance, **changes}
    said = {term: origin for term, origin in said.items() if origin}
    return structs.replace(plan, predicted=structs.replace(predicted, provenance=said))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"matmul": None}, "terms without provenance: matmul"),
        ({"attention": "extrapolated by 17"}, "attention is extrapolated by 17; at most by 16"),
        ({"attention": "extrapolated by 0.5"}, "attention is extrapolated by 0.5"),
        ({"matmul": "formula"}, "by formula without a note that says why: matmul"),
    ],
)
def test_a_term_without_its_origin_or_from_too_far_is_found(good, changes, text):
    assert text in broken("provenance", good, with_provenance(good.plan, **changes))


def test_a_band_narrower_than_repeated_measurements_is_found(good):
    predicted = structs.replace(good.plan.predicted, error_band=0.001)
    assert "0.001" in broken("provenance", good, structs.replace(good.plan, predicted=predicted))


def test_a_data_sheet_that_claims_a_measurement_is_found(good):
    plan = with_time(good.plan, source="roofline")
    assert "by the data sheet" in broken("provenance", good, plan)


def test_flags_that_do_not_say_what_the_plan_says_are_found(good, monkeypatch):
    read = exporting.read_vllm

    def wrong(words):
        return dataclasses.replace(read(words), sequences=1)

    monkeypatch.setitem(exporting._READERS, "vllm", wrong)  # noqa: SLF001
    assert "vllm scripts say sequences 1" in broken("exports", good)


def test_a_price_that_does_not_come_again_is_found(good):
    best = dataclasses.replace(good.found.ranked[0], ttft_longest_s=1.0)
    found = dataclasses.replace(good.found, ranked=(best, *good.found.ranked[1:]))
    assert "priced again is not what it was" in broken("same-answer", good, found=found)


def test_a_better_neighbour_of_another_tp_is_found(good):
    """Of two GPUs one of the layouts wins; the other alone must not pass as the answer."""
    ranked = good.found.ranked
    first = ranked[0].candidate.parallelism
    others = [each for each in ranked if each.candidate.parallelism.tp != first.tp][:1]
    assert others
    found = dataclasses.replace(good.found, ranked=tuple(others), verdicts=("",), replays=(None,))
    found_missing = list(selfcheck.neighbours(others[0].world, others[0], found))
    assert any(f"tp {first.tp} " in text and "was missed" in text for text in found_missing)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({}, "missing: program/a.py"),
        ({"program/a.py": b"another"}, "program/a.py is not the file"),
    ],
)
def test_program_files_are_those_that_the_plan_hashes(good, files, text):
    digest = hashlib.sha256(b"one").hexdigest()
    plan = structs.replace(good.plan, files={"program/a.py": digest})
    check_files(plan, {"program/a.py": b"one", "graphs/a.txt": b"unhashed"})
    with pytest.raises(SelfCheckFailed, match=text):
        check_files(plan, files)

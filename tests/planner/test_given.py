"""medha-plan PLAN.yaml: valid is said of a plan only where the other commands would take it."""

import pytest
from msgspec import structs
from typer.testing import CliRunner

from planner.assemble import to_plan
from planner.bundle import compile_plan
from planner.catalog import load_device, load_model, load_workload, topology_for
from planner.cli_plan import app
from planner.given import has_program, load_given, stale
from planner.search import search
from planner.world import make_world
from plans.codec import dump_file, dumps
from plans.errors import BundleMismatch, InvalidFile
from plans.plan import MadeBy


@pytest.fixture(scope="module")
def compiled():
    device = load_device("cpu")
    world = make_world(
        model=load_model("tiny-llama"),
        device=device,
        topology=topology_for(device, 1),
        workload=load_workload("chat"),
    )
    made_by = MadeBy(medha="0", effort="quick", seed=0, command="medha-plan")
    return compile_plan(to_plan(world, search(world).ranked[0], name="p", made_by=made_by))


@pytest.fixture
def bundle(compiled, tmp_path):
    plan, files = compiled
    for name, content in ({"plan.yaml": dumps(plan).encode()} | files).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def said(bundle):
    return CliRunner().invoke(app, [str(bundle)], catch_exceptions=False).stdout


def test_an_untouched_bundle_is_valid(bundle):
    given, where = load_given(bundle)
    assert has_program(given, where)
    assert not stale(given)
    assert "valid: every check passes" in said(bundle)


def test_a_deleted_file_is_named(bundle):
    (bundle / "program/rotary.py").unlink()
    with pytest.raises(BundleMismatch, match=r"program/rotary\.py: missing"):
        has_program(*load_given(bundle))


def test_an_edited_model_is_not_that_of_the_program(bundle, compiled):
    plan, _ = compiled
    model = structs.replace(plan.model, vocab=plan.model.vocab // 2)
    dump_file(bundle / "plan.yaml", structs.replace(plan, model=model))
    with pytest.raises(BundleMismatch, match=r"model\.vocab: 1024, .* made for 2048"):
        has_program(*load_given(bundle))


def test_a_plan_without_its_program_is_valid_only_by_itself(bundle, compiled):
    _, files = compiled
    for name in files:
        (bundle / name).unlink()
    out = said(bundle)
    assert "its program is not beside it" in out
    assert "medha-run" not in out


def test_a_negative_capacity_is_not_valid(bundle, compiled):
    plan, _ = compiled
    predicted = structs.replace(plan.predicted, capacity_rps=-1.0)
    dump_file(bundle / "plan.yaml", structs.replace(plan, predicted=predicted))
    out = said(bundle)
    assert "predicted.capacity_rps in the file: -1.0 is negative" in out
    assert "valid: every check" not in out


def test_rows_of_kernels_are_checked_without_a_program(tmp_path, compiled):
    plan, _ = compiled
    dump_file(tmp_path / "plan.yaml", structs.replace(plan, kernels=()))
    with pytest.raises(InvalidFile, match="kernels: is empty"):
        load_given(tmp_path)

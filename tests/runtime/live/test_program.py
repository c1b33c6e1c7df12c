"""Opening a bundle: verified, isolated from its folder and from the current one."""

import importlib
import json
import sys
from pathlib import Path

import msgspec
import pytest
from live_bundles import TOY_FILES, toy_plan, write_bundle

from plans.codec import dump_file
from plans.errors import BundleMismatch, InvalidFile
from runtime.program import load_bundle

SIMPLE = {"program/stage_0.py": "PARAMETERS = ()\ndef forward(*args):\n    return 7\n"}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", toy_plan(), TOY_FILES)


def test_a_stage_loads_with_its_siblings_and_nothing_is_written(bundle):
    before = sorted(bundle.rglob("*"))
    program = load_bundle(bundle).load_stage(0)
    assert program.parameters == ()
    assert callable(program.forward)
    assert sorted(bundle.rglob("*")) == before


def test_a_bundle_loads_from_any_current_folder(bundle, monkeypatch):
    monkeypatch.chdir(bundle.parent)
    loaded = load_bundle(bundle.name)
    monkeypatch.chdir("/")
    assert callable(loaded.load_stage(0).forward)


def test_a_bundle_shadows_no_module(tmp_path):
    files = {
        **SIMPLE,
        "program/json.py": "raise SystemExit",
        "program/torch.py": "raise SystemExit",
    }
    loaded = load_bundle(write_bundle(tmp_path, toy_plan(), files))
    assert loaded.load_stage(0).forward() == 7
    assert str(tmp_path) not in sys.path
    assert importlib.reload(json).loads("7") == 7


def test_bytecode_beside_the_program_is_not_run(bundle):
    cache = bundle / "program" / "__pycache__"
    cache.mkdir()
    for name in ("stage_0", "toy_sums"):
        (cache / f"{name}.{sys.implementation.cache_tag}.pyc").write_bytes(b"no bytecode")
    assert callable(load_bundle(bundle).load_stage(0).forward)


def test_two_bundles_of_one_name_do_not_meet(tmp_path):
    programs = []
    for answer in (1, 2):
        text = f"PARAMETERS = ()\ndef forward(*args):\n    return {answer}\n"
        folder = write_bundle(
            tmp_path / str(answer) / "same", toy_plan(), {"program/stage_0.py": text}
        )
        programs.append(load_bundle(folder).load_stage(0))
    assert [program.forward() for program in programs] == [1, 2]


def test_what_was_verified_runs_even_if_the_file_changes_later(tmp_path):
    loaded = load_bundle(write_bundle(tmp_path, toy_plan(), SIMPLE))
    (tmp_path / "program" / "stage_0.py").write_text("raise SystemExit")
    assert loaded.load_stage(0).forward() == 7


def test_every_file_that_differs_is_named(bundle):
    (bundle / "program" / "stage_0.py").unlink()
    (bundle / "program" / "toy_sums.py").write_text("changed = True\n")
    (bundle / "program" / "stranger.py").touch()
    with pytest.raises(BundleMismatch) as caught:
        load_bundle(bundle)
    for text in (
        "stage_0.py: missing",
        "toy_sums.py: changed",
        "stranger.py: not part of the plan",
    ):
        assert text in str(caught.value)


def test_a_long_list_of_differences_fits_a_screen(bundle):
    for number in range(100):
        (bundle / "program" / f"extra_{number}.py").touch()
    with pytest.raises(BundleMismatch, match=r"\.\.\. and 80 more") as caught:
        load_bundle(bundle)
    assert len(str(caught.value).splitlines()) <= 24


def test_a_recorded_file_cannot_lie_outside_the_bundle(tmp_path):
    write_bundle(tmp_path, toy_plan(files={}), {})
    dump_file(tmp_path / "plan.yaml", toy_plan(files={"../outside.py": "0" * 64}))
    with pytest.raises((BundleMismatch, InvalidFile), match="outside"):
        load_bundle(tmp_path)


def test_a_bundle_without_a_program_says_how_to_make_one(tmp_path):
    made_by = toy_plan().made_by
    command = "medha-plan --model tiny --gpus 1 --no-kernels"
    plan = toy_plan(made_by=msgspec.structs.replace(made_by, command=command))
    with pytest.raises(BundleMismatch, match=r"no program") as caught:
        load_bundle(write_bundle(tmp_path, plan, {}))
    again = f"medha-plan --model tiny --gpus 1 --out {tmp_path} --overwrite"
    assert str(caught.value).splitlines()[1].strip() == again


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module_anywhere", "does not load here.*no_such_module_anywhere"),
        ("PARAMETERS = ()", "exports no forward"),
        ("forward = print", "exports no PARAMETERS"),
        ("forward = print\nPARAMETERS = ({'name': 3},)", "PARAMETERS: .*str"),
    ],
)
def test_a_program_that_is_none_says_why(tmp_path, text, message):
    loaded = load_bundle(write_bundle(tmp_path, toy_plan(), {"program/stage_0.py": text}))
    with pytest.raises(BundleMismatch, match=message):
        loaded.load_stage(0)


def test_a_folder_without_a_plan_is_no_bundle(tmp_path):
    with pytest.raises(InvalidFile, match="is no bundle"):
        load_bundle(tmp_path)

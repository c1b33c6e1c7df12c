"""Bundles on disk: whole or absent, never over someone's files; and their programs."""

import hashlib
import os
from pathlib import Path

import pytest
from msgspec import structs

from planner.assemble import to_plan
from planner.bundle import compile_plan
from planner.catalog import load_device, load_model, load_workload, topology_for
from planner.folder import check_inputs, check_target, write_folder
from planner.search import search
from planner.world import make_world
from plans.check import check_plan
from plans.errors import Infeasible, MedhaError, UsageError
from plans.plan import MadeBy

FILES = {"plan.yaml": b"schema: 1\n", "program/stage_0.py": b"x = 1\n"}


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- the folder ---------------------------------------------------------------------------------


def test_a_folder_holds_exactly_its_files_and_no_sibling_is_left(tmp_path):
    write_folder(tmp_path / "new" / "bundle", FILES, overwrite=False)
    assert tree(tmp_path) == {f"new/bundle/{name}": content for name, content in FILES.items()}


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "bundle").mkdir()
    write_folder(tmp_path / "bundle", FILES, overwrite=False)
    assert tree(tmp_path / "bundle") == FILES


def test_a_bundle_can_be_read_by_others_as_the_umask_allows(tmp_path):
    old = os.umask(0o022)
    try:
        write_folder(tmp_path / "bundle", FILES, overwrite=False)
    finally:
        os.umask(old)
    assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o755


def test_overwrite_replaces_a_bundle_whole(tmp_path):
    folder = tmp_path / "bundle"
    write_folder(folder, {**FILES, "old.txt": b""}, overwrite=False)
    write_folder(folder, {"plan.yaml": b"schema: 1\nname: x\n"}, overwrite=True)
    assert tree(tmp_path) == {"bundle/plan.yaml": b"schema: 1\nname: x\n"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_things_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=tmp_path.name):
        check_target(tmp_path, overwrite=overwrite)
    with pytest.raises(UsageError):
        write_folder(tmp_path, FILES, overwrite=overwrite)
    assert list(tree(tmp_path)) == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(UsageError, match="is a file"):
        write_folder(path, FILES, overwrite=True)


def test_a_parent_that_is_no_folder_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out"):
        write_folder(tmp_path / "file" / "bundle", FILES, overwrite=False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_bundle_and_nothing_else(tmp_path, monkeypatch, error):
    folder = tmp_path / "bundle"
    write_folder(folder, FILES, overwrite=False)
    write = Path.write_bytes

    def fail_at_the_second(path, content):
        if path.name == "stage_0.py":
            raise error
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fail_at_the_second)
    with pytest.raises(MedhaError if error is OSError else error):
        write_folder(folder, {**FILES, "plan.yaml": b"other"}, overwrite=True)
    assert tree(tmp_path) == {f"bundle/{name}": content for name, content in FILES.items()}


def test_of_two_runs_into_one_folder_the_slower_one_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "bundle"
    write = Path.write_bytes

    def while_another_run_finishes(path, content):
        folder.mkdir(exist_ok=True)
        write(folder / "plan.yaml", b"theirs")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", while_another_run_finishes)
    with pytest.raises(UsageError, match="exists and is not empty"):
        write_folder(folder, FILES, overwrite=False)
    assert tree(tmp_path) == {"bundle/plan.yaml": b"theirs"}


def test_an_interrupted_swap_puts_the_old_bundle_back(tmp_path, monkeypatch):
    folder = tmp_path / "bundle"
    write_folder(folder, FILES, overwrite=False)
    rename = Path.rename

    def fail_into_place(path, target):
        if Path(target) == folder and not path.name.endswith("-old"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_into_place)
    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, {"plan.yaml": b"other"}, overwrite=True)
    assert tree(tmp_path) == {f"bundle/{name}": content for name, content in FILES.items()}


@pytest.mark.parametrize("flag", ["--workload", "--topology", "--model"])
def test_a_bundle_that_holds_an_input_is_not_replaced(tmp_path, flag):
    folder = tmp_path / "bundle"
    write_folder(folder, {**FILES, "in/config.json": b"{}"}, overwrite=False)
    given = folder / "in" if flag == "--model" else folder / "in/config.json"
    with pytest.raises(UsageError, match=f"{flag} .* is in it and would be replaced"):
        check_inputs(folder, {flag: given})
    check_inputs(folder / "in/new", {flag: given})
    check_inputs(tmp_path / "other", {flag: given, "--workload": "chat", "--topology": None})


# --- the program --------------------------------------------------------------------------------


def plan_of(model, gpus, hardware, **changes):
    device = load_device(hardware)
    world = make_world(
        model=load_model(model),
        device=device,
        topology=topology_for(device, gpus),
        workload=load_workload("chat"),
        **changes,
    )
    made_by = MadeBy(medha="0", effort="quick", seed=0, command="medha-plan")
    return to_plan(world, search(world).ranked[0], name="p", made_by=made_by)


@pytest.mark.parametrize(
    ("model", "gpus", "hardware", "target"),
    [("tiny-llama", 1, "cpu", "torch"), ("qwen2.5-0.5b", 4, "h100", "triton")],
)
def test_a_compiled_plan_names_and_hashes_every_file(model, gpus, hardware, target):
    plan, files = compile_plan(plan_of(model, gpus, hardware))
    check_plan(plan)
    assert set(plan.files) == set(files)
    for name, content in files.items():
        assert plan.files[name] == hashlib.sha256(content).hexdigest()
    assert "program/stage_0.py" in files
    assert {kernel.file for kernel in plan.kernels} <= set(files)
    assert target in {kernel.target for kernel in plan.kernels}


def test_the_same_plan_compiles_to_the_same_bytes():
    plan = plan_of("tiny-llama", 1, "cpu")
    assert compile_plan(plan) == compile_plan(plan)


def test_attention_by_flash_attn_is_of_gpus_alone():
    for hardware, expected in (("h100", "flash_attn"), ("cpu", "torch")):
        plan, _ = compile_plan(plan_of("qwen2.5-0.5b", 1, hardware), attention="flash-attn")
        check_plan(plan)
        (target,) = (each.target for each in plan.kernels if each.op == "paged_attention")
        assert target == expected


def test_graphs_are_added_but_not_hashed():
    plan, files = compile_plan(plan_of("tiny-llama", 1, "cpu"), dump_graph=True)
    graphs = {name for name in files if name.startswith("graphs/")}
    assert graphs
    assert not graphs & set(plan.files)


def test_a_program_that_needs_more_than_was_set_aside_is_refused():
    plan = plan_of("tiny-llama", 1, "cpu")
    memory = structs.replace(plan.memory, activations_bytes=1)
    with pytest.raises(Infeasible, match="activations"):
        compile_plan(structs.replace(plan, memory=memory))

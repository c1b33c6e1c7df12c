"""Result files: refused early, whole or absent, and never in the place of a device or a link."""

import os
from pathlib import Path

import pytest

from plans.errors import MedhaError, UsageError
from runtime.outputs import bundle_inputs, check_output, check_outputs, written_whole


def half_written(path, error):
    with written_whole(path) as partial:
        partial.write_text("half")
        raise error


def test_a_file_appears_whole_and_alone(tmp_path):
    path = tmp_path / "out.png"
    path.write_text("old")
    with written_whole(path) as partial:
        assert partial.suffix == ".png"
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_breaks_off_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "out.json"
    path.write_text("old")
    with pytest.raises(error):
        half_written(path, error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_refuses_is_a_failed_run(tmp_path):
    path = tmp_path / "out.json"
    with pytest.raises(MedhaError, match="cannot be written: No space left") as caught:
        half_written(path, OSError(28, "No space left on device"))
    assert caught.value.exit_status == 1
    assert not list(tmp_path.iterdir())


def test_a_link_is_written_through(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    with written_whole(link) as path:
        path.write_text("text")
    assert link.is_symlink()
    assert target.read_text() == "text"


def test_a_pipe_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_output("--out", pipe)
    with written_whole(pipe) as path:
        assert path == pipe
    assert pipe.is_fifo()


def test_what_can_not_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a folder"):
        check_output("--out", tmp_path)
    for folder in ("none", "file"):
        with pytest.raises(UsageError, match="does not exist"):
            check_output("--out", tmp_path / folder / "x")
    with pytest.raises(UsageError, match="File name too long"):
        check_output("--out", tmp_path / ("x" * 300))
    check_output("--out", tmp_path / "x")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_link_that_can_not_be_written_through_is_refused_before_the_work(tmp_path):
    round_, nowhere = tmp_path / "round", tmp_path / "nowhere"
    round_.symlink_to(round_)
    nowhere.symlink_to(tmp_path / "none" / "x")
    with pytest.raises(UsageError, match="back to itself"):
        check_output("--out", round_)
    with pytest.raises(UsageError, match="does not exist"):
        check_output("--out", nowhere)


def spellings(path, folder):
    """Other names of a file, and of one that is still to come."""
    link, around = folder / "link", folder / "around"
    link.symlink_to(path)
    around.symlink_to(path.parent)
    yield from (path, link, around / path.name, path.parent / ".." / path.parent.name / path.name)
    if path.exists():
        hard = folder / "hard"
        hard.hardlink_to(path)
        yield hard


@pytest.mark.parametrize("there", [True, False])
def test_no_spelling_of_an_input_or_of_another_output_is_written(tmp_path, there):
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    path = tmp_path / "data" / "x.jsonl"
    if there:
        path.write_text("input")
    for each in spellings(path, tmp_path / "other"):
        with pytest.raises(
            UsageError, match=r"--out .* would replace an input \(--requests\)"
        ) as one:
            check_outputs({"--out": each}, {"--requests": [path]})
        assert one.value.exit_status == 2
        with pytest.raises(UsageError, match=r"--json .* is the file of --plot too"):
            check_outputs({"--json": path, "--plot": each}, {})
    check_outputs({"--json": path, "--plot": tmp_path / "y", "--out": None}, {"--trace": []})
    assert path.exists() == there
    assert not there or path.read_text() == "input"


def test_devices_may_be_named_as_often_as_one_likes():
    null = Path(os.devnull)
    check_outputs({"--json": null, "--plot": null}, {"--trace": [null]})


def test_of_a_bundle_nothing_that_was_planned_is_replaced_and_more_may_lie_there(tmp_path):
    (tmp_path / "program").mkdir()
    (tmp_path / "plan.yaml").touch()
    for name in ("plan.yaml", "README.md", "program/stage_0.py", "program/new.py"):
        for given in (tmp_path, tmp_path / "plan.yaml"):
            with pytest.raises(UsageError, match="would replace an input"):
                check_outputs({"--out": tmp_path / name}, {"BUNDLE": bundle_inputs(given)})
    check_outputs({"--out": tmp_path / "answers.jsonl"}, {"BUNDLE": bundle_inputs(tmp_path)})


def test_stdout_is_refused_where_it_would_be_a_file_of_that_name():
    with pytest.raises(UsageError, match="--decisions -: stdout is not for this one"):
        check_output("--decisions", Path("-"))

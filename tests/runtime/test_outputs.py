"""Result files: refused early, whole or absent, and never in the place of a device or a link."""

import os

import pytest

from plans.errors import MedhaError, UsageError
from runtime.outputs import check_output, written_whole


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

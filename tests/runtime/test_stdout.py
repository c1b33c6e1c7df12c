"""A full stdout is one line and a status in every command, and a closed one a status alone."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
CALL = "import pkgutil, sys; sys.argv[:1] = ['x']; pkgutil.resolve_name(sys.argv.pop(1))()"
FULL = "stdout: cannot be written: No space left on device\n"
SAID = """
import sys
from runtime.interrupts import started
def command():
    {said}
started(lambda: command)
"""
RICH = "from rich.console import Console; Console().print('text ' * 20_000)"
SAYINGS = ["print('text')", "print('text ' * 20_000)", "sys.stdout.buffer.write(b'text')", RICH]


def ended(stdout: object, *arguments: str) -> tuple[int, str]:
    """Status and stderr of a Python process that sees this tree."""
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return process.returncode, process.stderr


def nobody() -> int:
    """The write end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("command", COMMANDS)
def test_help_into_a_full_device_is_one_line_and_1(command):
    with Path("/dev/full").open("w") as full:
        assert ended(full, "-c", CALL, COMMANDS[command], "--help") == (1, FULL)


@pytest.mark.parametrize("said", SAYINGS)
def test_whatever_writes_a_full_device_is_a_failed_run(said):
    with Path("/dev/full").open("w") as full:
        assert ended(full, "-c", SAID.format(said=said)) == (1, FULL)


@pytest.mark.parametrize("said", SAYINGS)
def test_whatever_writes_a_reader_that_went_away_ends_it_quietly_with_141(said):
    with os.fdopen(nobody(), "w") as closed:
        assert ended(closed, "-c", SAID.format(said=said)) == (141, "")


def test_what_is_said_arrives_whole_and_in_order(tmp_path):
    path = tmp_path / "said.txt"
    said = "print('é' * 9); sys.stdout.flush(); sys.stdout.buffer.write(b'more'); sys.exit(3)"
    with path.open("w") as file:
        assert ended(file, "-c", SAID.format(said=said)) == (3, "")
    assert path.read_text() == "é" * 9 + "\nmore"


def test_a_command_without_stdout_works_on():
    status, errors = ended(
        None, "-c", "import sys; sys.stdout = None" + SAID.format(said="print()")
    )
    assert (status, errors) == (0, "")

"""Ctrl-C while libraries load, and SIGTERM."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from runtime.interrupts import loading, unwinding

LOAD = """
import os, signal
from runtime.interrupts import loading
try:
    with loading():
        os.kill(os.getpid(), signal.SIGINT)
        print("went on")
except BaseException as error:
    print("unwound", type(error))
"""


def test_an_interrupt_while_loading_ends_at_once_with_130():
    ended = subprocess.run(
        [sys.executable, "-c", LOAD], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_the_handler_from_before_comes_back():
    before = signal.getsignal(signal.SIGINT)
    with loading():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


FIRST_IMPORT = """
import os, pkgutil, signal, sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":  # the first that takes a while, in every command
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupted())
pkgutil.resolve_name(sys.argv[1])()
"""
ROOT = Path(__file__).resolve().parents[2]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_interrupted_in_its_first_import_ends_with_130(command):
    ended = subprocess.run(
        [sys.executable, "-c", FIRST_IMPORT, COMMANDS[command]],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


TOLD_TO_END = """
import os, signal
from runtime.interrupts import unwinding
with unwinding():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        print("went on")
    finally:
        print("cleaned up")
"""


def test_a_process_told_to_end_cleans_up_and_ends_with_143():
    ended = subprocess.run(
        [sys.executable, "-c", TOLD_TO_END], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (143, "cleaned up\n", "")


def test_a_process_told_to_end_while_loading_ends_at_once():
    load = LOAD.replace("SIGINT", "SIGTERM")
    ended = subprocess.run(
        [sys.executable, "-c", load], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGTERM, "", "")


def test_the_default_on_sigterm_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with unwinding():
        with loading():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) not in {before, signal.SIG_DFL}
    assert signal.getsignal(signal.SIGTERM) == before

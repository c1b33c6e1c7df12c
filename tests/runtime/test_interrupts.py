"""Ctrl-C while libraries load, and SIGTERM."""

import signal
import subprocess
import sys

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

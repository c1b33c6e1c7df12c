"""Ctrl-C while libraries load."""

import signal
import subprocess
import sys

from runtime.interrupts import loading

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

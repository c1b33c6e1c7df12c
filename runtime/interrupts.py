"""Ctrl-C while a large library loads: ends the process at once, as nothing is half-done yet."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells report it."""


@contextmanager
def loading() -> Iterator[None]:
    """Imports inside are left without unwinding. For the main thread, before anything is written.

    Python's own handler raises between any two lines; inside the start-up code of torch, which is
    C++, that aborts with a core dump.
    """
    before = signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)

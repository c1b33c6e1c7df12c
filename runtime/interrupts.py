"""Being told to end: what is half-written goes, and the status is the one that shells report."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from plans.errors import MedhaError
from runtime.stdout import watched_stdout

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells report it."""
TERMINATED = 143
"""After SIGTERM."""


@contextmanager
def loading() -> Iterator[None]:
    """Imports inside are left without unwinding. For the main thread, before anything is written.

    Python's own handler raises between any two lines; inside the start-up code of torch, which is
    C++, that aborts with a core dump.
    """
    before = signal.signal(signal.SIGINT, _leave), signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


@contextmanager
def unwinding() -> Iterator[None]:
    """SIGTERM inside runs the clean-up of whatever is open, as Ctrl-C does. For the main thread.

    By default the process would be gone at once and leave its hidden, half-written files.
    """
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def started(load: Callable[[], Callable[[], None]]) -> None:
    """Runs the command that `load` imports; Ctrl-C in the imports ends with 130 as well.

    A stdout that takes no more is a failed run, and one that nobody reads ends it quietly.
    """
    try:
        with watched_stdout():
            with loading():
                command = load()
            command()
    except MedhaError as error:  # at the last flush; commands say those of their own
        print(error, file=sys.stderr)  # noqa: T201
        raise SystemExit(error.exit_status) from None
    except KeyboardInterrupt:  # between the parts that say it themselves
        print("interrupted", file=sys.stderr)  # noqa: T201
        raise SystemExit(INTERRUPTED) from None


def _leave(number: int, frame: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def _end(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one need not wait for the first
    raise SystemExit(TERMINATED)

"""Standard output that is full, or that nobody reads any more: one line or none, and a status."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from plans.errors import MedhaError

CLOSED = 141
"""Exit status where the reader went away, as in `| head -1`: 128 + SIGPIPE, as shells report it."""


class StdoutFailed(MedhaError):
    """What stdout goes to takes no more, a full disk for one."""


class _Watched(io.FileIO):
    """Ends the command at the first write that fails; what comes after it goes nowhere.

    SystemExit and not OSError for a reader that went away: typer and rich each turn that into a
    status of their own.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # or the interpreter fails at its own last flush
            os.close(nowhere)
            if error.errno == errno.EPIPE:
                raise SystemExit(CLOSED) from None
            raise StdoutFailed(f"stdout: cannot be written: {error.strerror}") from None


@contextmanager
def watched_stdout() -> Iterator[None]:
    """Inside, sys.stdout fails as StdoutFailed or ends with CLOSED; all is written at the end.

    A stdout that is no file, as tests put there, stays what it is.
    """
    before = sys.stdout
    try:
        number = before.fileno()
    except (AttributeError, OSError):  # None where it was closed from the start
        yield
        return
    at_once = bool(getattr(before, "write_through", False))
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Watched(number, "wb", closefd=False)),
        encoding=before.encoding,
        errors=before.errors,
        line_buffering=at_once or before.isatty(),
        write_through=at_once,
    )
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        finally:
            sys.stdout = before

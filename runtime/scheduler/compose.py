"""What composes an engine's steps: our packer, or the re-creation of another engine's rules."""

import pkgutil
from collections.abc import Callable
from typing import Protocol

from runtime.book import Book
from runtime.executor.base import Step
from runtime.scheduler import Scheduling


class Composer(Protocol):
    """Decides each step. Works on the book that it was made for, and alone takes its pages.

    Nothing that it does may leak a page, compute a token twice or leave a request behind for ever:
    with nothing in flight and somebody there, `pack` gives a step.
    """

    overrun_s: float
    """Seconds that a step takes beyond the formula, learnt by the engine; 0 at the start."""

    def pack(self, now_s: float) -> Step | None:
        """The next step, with pages taken and cursors moved; None where nothing can run now."""
        ...

    def predicted_s(self, step: Step) -> float:
        """The formula's seconds of a step, summed over stages, without overrun or margin."""
        ...


def composer_of(book: Book, scheduling: Scheduling) -> Composer:
    """The composer that a scheduling names (a factory of its own would make imports circular)."""
    factory: Callable[[Book, Scheduling], Composer] = pkgutil.resolve_name(scheduling.composer)
    return factory(book, scheduling)

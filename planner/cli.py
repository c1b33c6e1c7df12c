"""Where medha-plan and medha-tune begin: Ctrl-C is answered before anything large is imported."""

from collections.abc import Callable

from runtime.interrupts import started


def plan() -> None:
    """medha-plan."""
    started(_plan)


def tune() -> None:
    """medha-tune."""
    started(_tune)


def _plan() -> Callable[[], None]:
    from planner.cli_plan import main

    return main


def _tune() -> Callable[[], None]:
    from planner.cli_tune import main

    return main

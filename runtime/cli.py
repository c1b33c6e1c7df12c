"""Where medha-run and medha-sim begin: Ctrl-C is answered before anything large is imported."""

from collections.abc import Callable

from runtime.interrupts import started


def run() -> None:
    """medha-run."""
    started(_run)


def simulate() -> None:
    """medha-sim."""
    started(_simulate)


def _run() -> Callable[[], None]:
    from runtime.cli_run import main

    return main


def _simulate() -> Callable[[], None]:
    from runtime.cli_sim import main

    return main

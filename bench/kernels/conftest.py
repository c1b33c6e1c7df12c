"""Kernel benches on a machine without a GPU: skipped, and said so at the end."""

import pytest
import torch

REASON = "no CUDA device is visible: no kernel was timed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked gpu."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=REASON))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line in large letters: hundreds of skips are easily taken for success."""
    if not torch.cuda.is_available():
        terminalreporter.section(REASON.upper())

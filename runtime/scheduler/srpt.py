"""Shortest remaining prefill first, with ageing: a request earns r seconds a second of waiting.

Displaces a running prefill at chunk ends. Without ageing (r = 0) long prompts may starve.
"""

from runtime.scheduler.policy import Prefills, Ranked, plain


class Srpt:
    """Key = remaining - r x (now - arrival)."""

    def __init__(self, aging: float = 0.0) -> None:
        """The rate r, at least 0."""
        self._aging = aging

    def rank(self, waiting: Prefills, *, now_s: float) -> Ranked:
        """Remaining seconds less what waiting has earned."""
        return plain(waiting.remaining_s - self._aging * (now_s - waiting.arrival_s))

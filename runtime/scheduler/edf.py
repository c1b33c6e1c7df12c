"""Earliest deadline first. An expired long prompt outranks everything: a convoy, kept pure."""

from runtime.scheduler.policy import Prefills, Ranked, plain


class Edf:
    """Key = arrival + deadline: the clock at which the first token is due."""

    def rank(self, waiting: Prefills, *, now_s: float) -> Ranked:
        """Due times, whatever the time."""
        return plain(waiting.arrival_s + waiting.deadline_s)

"""First come, first served: the order of arrival. Chunks of the oldest prompt block all others."""

from runtime.scheduler.policy import Prefills, Ranked, plain


class Fcfs:
    """Key = arrival number."""

    def rank(self, waiting: Prefills, *, now_s: float) -> Ranked:
        """Arrival order, whatever the time."""
        return plain(waiting.number.astype(float))

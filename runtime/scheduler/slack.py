"""Absolute slack: seconds that a request can still wait. Favours shorts once they are late."""

from runtime.scheduler.policy import Prefills, Ranked, plain, slack_s


class Slack:
    """Key = arrival + deadline - now - remaining prefill."""

    def rank(self, waiting: Prefills, *, now_s: float) -> Ranked:
        """Slack of each request at now_s."""
        return plain(slack_s(waiting, now_s))

"""Slack over remaining work: nearly finished longs yield while early, and press once they are late.

Ours, in no source; a candidate for the default where it measures better.
"""

import numpy as np

from runtime.scheduler.policy import LEAST_S, Prefills, Ranked, plain, slack_s


class SlackRemaining:
    """Key = (arrival + deadline - now - remaining) / remaining."""

    def rank(self, waiting: Prefills, *, now_s: float) -> Ranked:
        """Slack of each request at now_s, in units of what is left of it."""
        return plain(slack_s(waiting, now_s) / np.maximum(waiting.remaining_s, LEAST_S))

"""Slack over deadline: what the public code of the authors of arXiv 2409.17264 calls LRS.

The paper's LARS divides by the whole prefill instead. Where the deadline is a fixed multiple of
that, both give one order; where a floor lengthens short deadlines, this key is safer for shorts.
"""

import numpy as np

from runtime.scheduler.policy import LEAST_S, Prefills, Ranked, plain, slack_s


class Lrs:
    """Key = (arrival + deadline - now - remaining) / deadline."""

    def rank(self, waiting: Prefills, *, now_s: float) -> Ranked:
        """Slack of each request at now_s, as a share of its deadline."""
        return plain(slack_s(waiting, now_s) / np.maximum(waiting.deadline_s, LEAST_S))

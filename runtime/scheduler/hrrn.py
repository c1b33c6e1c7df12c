"""Highest response ratio next, as SGLang measures it: in tokens served to others, not in seconds.

    -(P - P_a) / u      P prefill tokens computed so far, P_a the same at arrival, u own tokens

Orders the waiting queue only: a prompt that has started is not displaced. With more than 128
requests waiting it is first come, first served.
Source: SGLang 0.5.23 and its pull request 32911.
"""

import numpy as np

from runtime.scheduler.policy import Prefills, Ranked, plain

FCFS_ABOVE = 128
STARTED = -1e18
"""Before all that wait: a ratio stays below the tokens that any engine computes in its life."""


class Hrrn:
    """Key = -(tokens served since arrival) / (own tokens)."""

    def rank(self, waiting: Prefills, *, now_s: float) -> Ranked:
        """Response ratios; started prompts first, in order of arrival."""
        keys = -waiting.served_tokens / np.maximum(waiting.missing_tokens, 1)
        if int((~waiting.started).sum()) > FCFS_ABOVE:
            keys = waiting.number.astype(float)
        return plain(np.where(waiting.started, STARTED, keys))

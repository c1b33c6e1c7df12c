"""LARS, length-aware relative slack (arXiv 2409.17264v5, section 4.1), with a rule for overload.

    rho = (arrival + deadline - now - remaining prefill) / whole prefill        smallest first

Beyond the paper: a request whose deadline can no longer be met is demoted to best effort instead of
becoming the most urgent one; among equals the prefill in progress goes first, so that two equal
long prompts do not alternate and hold double memory.
"""

import numpy as np

from runtime.scheduler.policy import LEAST_S, Prefills, Ranked, slack_s

HYSTERESIS = 0.02
"""Lead in rho of the prefill in progress: far below the 0.5 that a fresh request starts with."""


class Lars:
    """Relative slack; yields and demotions as in design section 4."""

    def __init__(self, max_yield: float = 0.4) -> None:
        """max_yield is the plan's cap on what a long request leaves to short ones."""
        self._max_yield = max_yield

    def rank(self, waiting: Prefills, *, now_s: float) -> Ranked:
        """Relative slack of each request at now_s."""
        slack = slack_s(waiting, now_s)
        rho = slack / np.maximum(waiting.work_s, LEAST_S)
        return Ranked(
            keys=rho - HYSTERESIS * waiting.recent,
            yields=np.minimum(np.maximum(rho, 0.0), self._max_yield) * waiting.long,
            demoted=slack < 0.0,
        )

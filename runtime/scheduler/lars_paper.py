"""LARS as published (arXiv 2409.17264v5, sections 4.1 and 4.3), for comparison with ours.

    rho = (arrival + deadline - now - remaining prefill) / whole prefill        smallest first

No rule for overload: a request that is late already stays the most urgent. No hysteresis: two equal
long prompts take turns. A long prompt leaves min(max(rho, 0), max_yield) of the step to short ones.
"""

import numpy as np

from runtime.scheduler.policy import LEAST_S, Prefills, Ranked, slack_s


class LarsPaper:
    """Relative slack and its yield, nothing else."""

    def __init__(self, max_yield: float = 0.4) -> None:
        """max_yield is the plan's cap on what a long request leaves to short ones."""
        self._max_yield = max_yield

    def rank(self, waiting: Prefills, *, now_s: float) -> Ranked:
        """Relative slack of each request at now_s."""
        rho = slack_s(waiting, now_s) / np.maximum(waiting.work_s, LEAST_S)
        return Ranked(
            keys=rho,
            yields=np.clip(rho, 0.0, self._max_yield) * waiting.long,
            demoted=np.zeros(len(rho), dtype=np.bool_),
        )

"""Two lanes: an express lane for prompts of a few steps, and the rest by work and slack together.

    key = remaining prefill + SLACK_WEIGHT x slack                  until one whole deadline late
    slack = arrival + deadline - now - remaining prefill            LATE_WEIGHT from there on

Why: relative slack lets a short prompt wait until its own slack per work has sunk to that of a long
one, so a slack that nobody needed is spent on queueing; and it makes long prompts with near-equal
keys advance together, so that all of them finish late. Here the express lane never waits for a long
prompt, and among long ones the nearly finished go first. The weight keeps targets and ageing in the
order: a tight target moves a request ahead, and a second of waiting earns half a second of work.

What is later than its whole deadline was lost to the load: if it went on earning at that rate, the
largest prompts would overtake smaller ones that are not late yet, and in a rush the latest tenth of
all would be made of both. It earns a little for ever, so that nothing waits without end.

All that is not in the express lane is best effort in the packer's sense: it goes last but keeps its
share of the prefill time, so that no rush of short prompts starves it. Express work is small: on
the paper's mix of 5 % long prompts, 3 % of all prefill seconds.
"""

import numpy as np

from runtime.scheduler.policy import Prefills, Ranked, slack_s

EXPRESS_S = 0.5
"""Whole prefill up to which a request rides in the express lane: the floor of the deadlines. Not
what remains of it: the last pieces of late long prompts would go before fresh short ones."""
SLACK_WEIGHT = 0.5
"""0 is shortest remaining work first, 1 is earliest deadline first."""
LATE_WEIGHT = 0.005


class LarsLanes:
    """Express lane first; keys as above in both lanes."""

    def rank(self, waiting: Prefills, *, now_s: float) -> Ranked:
        """Remaining work and weighted slack of each request at now_s."""
        slack = slack_s(waiting, now_s)
        lost = np.minimum(slack + waiting.deadline_s, 0.0)
        return Ranked(
            keys=waiting.remaining_s + SLACK_WEIGHT * (slack - lost) + LATE_WEIGHT * lost,
            yields=np.zeros(len(waiting)),
            demoted=waiting.work_s > EXPRESS_S,
        )

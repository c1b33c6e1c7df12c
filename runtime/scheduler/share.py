"""The share of best effort: a credit in predicted prefill seconds, one a KVP group.

While best-effort prefills wait, a group's credit grows by `share` of the prefill seconds of every
step. In a step that starts with a credit above 0 they go before all others and have its whole
prefill time; what they use is debited. With p the most prefill seconds of one step, over any run of
steps with best-effort prefills waiting in the group:

    seconds given to them  >=  share x prefill seconds of all  -  (1 + share) x p

    seconds in which they went before others  <=  the same with + instead of -

since the credit stays within [-p, share x p] and every debit was a use. Two rules keep it there.
What they use after all others had their turn is debited down to one such use and no further: time
that nobody wanted is no debt. What they could not use when they went first, so that others had time
in that step, is forfeited: no credit piles up for a rush.
"""

from collections.abc import Sequence


class BestEffortShare:
    """Credits of all groups; a plain function of the steps, so a replay has the same ones."""

    def __init__(self, share: float, *, groups: int) -> None:
        """share is the plan's best_effort_share."""
        self._share = share
        self._credit_s = [0.0] * groups

    @property
    def credit_s(self) -> tuple[float, ...]:
        """Credit of each group."""
        return tuple(self._credit_s)

    def due(self) -> frozenset[int]:
        """Groups in which best-effort prefills go first in the next step."""
        return frozenset(group for group, credit in enumerate(self._credit_s) if credit > 0)

    def debit(
        self, due: frozenset[int], *, used_s: Sequence[float], others_s: Sequence[float]
    ) -> None:
        """Books a step in which best-effort prefills waited.

        due       as it was before the step
        used_s    seconds that best-effort chunks added to the step, by group
        others_s  seconds that all other chunks added
        """
        for group, (used, others) in enumerate(zip(used_s, others_s, strict=True)):
            credit = self._credit_s[group]
            if group not in due:
                credit = min(credit, -used)
            elif others > 0:
                credit = min(credit - used, 0.0)
            else:
                credit -= used
            self._credit_s[group] = credit + self._share * (used + others)

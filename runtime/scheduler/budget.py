"""Seconds that a step may take: by the tightest time between tokens, and by what is ahead of it.

A decode's next token comes when its step has left the last stage. On its way a step waits for the
step before it wherever that is still on a stage (several stages, or work queued ahead on one), so
what the token may still wait is not all the step's own.
"""

from collections.abc import Iterable
from itertools import accumulate

from plans.plan import Plan
from runtime.book import Book
from runtime.request import Sequence

NEVER_S = float("inf")


class TimeBudget:
    """Remembers when the last step leaves each stage, by the formula."""

    def __init__(self, plan: Plan) -> None:
        """No step yet."""
        self._config = plan.scheduler
        self._margin = plan.step_time.margin
        layers = plan.step_time.stage_layers
        self._behind = [each / sum(layers) for each in accumulate(reversed(layers))][::-1]
        """Share of a step's time that it spends from a stage on to the end; 1 for the first."""
        self._leaves_s = [0.0] * len(layers)

    def seconds(
        self, book: Book, decodes: list[Sequence], now_s: float, *, overrun_s: float
    ) -> float:
        """Predicted seconds that the next step may take, its decodes included.

        decodes    the running requests that are in it
        overrun_s  seconds that a step takes beyond the formula
        """
        config = self._config
        budget_s, step_budget_s = config.idle_budget_s, config.step_budget_s
        for each in book.running.rows:
            if not each.own_tbt:
                budget_s = min(budget_s, step_budget_s)
                break
        if decodes:
            comes_s = max(self._leaves_s[-1], now_s)
            due_s = NEVER_S
            for each in decodes:
                # the step in flight brings a token before this one does
                last_s = comes_s if each.in_flight else each.last_token_s
                due_s = min(due_s, last_s + each.tbt_s)
            # a token that is late already does not stop all prefill
            budget_s = min(budget_s, max(self.until(due_s, now_s), 0.5 * step_budget_s))
        if len(decodes) < len(book.running):
            # who is in flight decodes again behind this step, which by then is still on its way
            apart_s = min(
                (each.tbt_s for each in book.running if _comes_back(each)), default=NEVER_S
            )
            budget_s = min(budget_s, max(apart_s, 0.5 * step_budget_s))
        # a host that takes more than half of the budget is not made faster by smaller chunks
        budget_s = max(budget_s - max(overrun_s, 0.0), 0.5 * budget_s)
        return budget_s / (1.0 + self._margin)

    def until(self, due_s: float, now_s: float) -> float:
        """The longest that a step which enters the first stage now may take to end at due_s.

        From stage k on it cannot move before the step ahead has left k, and spends the share of
        its time there that the layers have.
        """
        return min(
            (due_s - max(leaves_s, now_s)) / share
            for leaves_s, share in zip(self._leaves_s, self._behind, strict=True)
        )

    def submitted(self, stages_s: Iterable[float], now_s: float, *, overrun_s: float) -> None:
        """A step of these predicted times enters the first stage."""
        host_s = max(overrun_s, 0.0) / len(self._leaves_s)
        leaves_s = now_s
        for stage, seconds in enumerate(stages_s):
            leaves_s = max(leaves_s, self._leaves_s[stage]) + seconds + host_s
            self._leaves_s[stage] = leaves_s


def _comes_back(sequence: Sequence) -> bool:
    """Whether a request with a token in flight will want another one."""
    coming = sequence.in_flight
    return coming > 0 and sequence.generated + coming < sequence.request.max_tokens

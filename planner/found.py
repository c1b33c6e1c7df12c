"""What a search found, and what came of it after replays: all that explains the answer."""

from dataclasses import dataclass

from planner.price import Priced
from planner.space import Pruned, Rejected
from planner.text import seconds_text
from plans.plan import Replay


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One thing different, and the plan that would then be best."""

    label: str
    """What is different."""
    degrees: str
    """Of the plan that is best then; empty where there is none."""
    score: float
    """In the unit of the objective."""
    ttft_longest_s: float
    tbt_full_s: float
    differs: bool
    """Whether the degrees are others than the plan's."""

    @property
    def text(self) -> str:
        """One line."""
        if not self.degrees:
            return f"{self.label}: no plan"
        verb = "becomes" if self.differs else "stays"
        return (
            f"{self.label}: {verb} {self.degrees}; longest prompt"
            f" {seconds_text(self.ttft_longest_s)}, token at full context"
            f" {seconds_text(self.tbt_full_s)}, score {self.score:.3g}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The ranked answer; the first is the plan."""

    ranked: tuple[Priced, ...]
    """Best first; those that lost on a rule, and not on the score alone, come last."""
    verdicts: tuple[str, ...]
    """Why each of `ranked` stands where it does; empty for those that lost on the score alone."""
    ledger: tuple[Rejected, ...]
    pruned: tuple[Pruned, ...]
    objective: str
    notes: tuple[str, ...]
    replays: tuple[Replay | None, ...] = ()
    """Of each of `ranked`, where it was replayed; empty before any was."""
    sensitivity: tuple[Change, ...] = ()
    why: tuple[str, ...] = ()
    """Sentences that explain the choice."""

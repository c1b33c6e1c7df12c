"""Why there is no plan: the constraint that binds, and the nearest value that would do."""

import math
from collections.abc import Callable

from planner.memory import reachable_context
from planner.price import Priced
from planner.space import Candidate, Rejected
from planner.world import World
from plans.errors import Infeasible

TargetValues = Callable[[World, Priced], tuple[tuple[str, str, float, float | None, str], ...]]
WHAT = {
    "ttft": "the first token of a lone prompt",
    "tbt": "tokens at full context",
    "rate": "",
}


class NoPlan(Infeasible):
    """No candidate is left; carries the ledger."""

    def __init__(
        self, constraint: str, need: str, have: str, nearest: str, ledger: tuple[Rejected, ...]
    ) -> None:
        """An Infeasible with the reasons of all candidates."""
        super().__init__(constraint, need, have, nearest)
        self.ledger = ledger


def nothing_fits(world: World, every: list[Candidate], ledger: tuple[Rejected, ...]) -> NoPlan:
    """The error for a model that fits no candidate, from the one that comes nearest."""
    if not every:
        row = ledger[0]
        return NoPlan(row.constraint, row.need, row.have, "another number of GPUs", ledger)
    other = [row for row in ledger if row.constraint not in {"memory", "heads", "kv_heads"}]
    best = max(every, key=lambda each: reachable_context(world, each))
    row = next((row for row in ledger if row.label == best.label), ledger[-1])
    if row.constraint != "memory" and other:
        row = other[0]
    return NoPlan(row.constraint, row.need, row.have, row.nearest, ledger)


def too_slow(
    world: World, fitting: list[Priced], ledger: tuple[Rejected, ...], values: TargetValues
) -> NoPlan:
    """The error for targets that no candidate keeps, with the nearest value that one would."""
    rows = {id(each): values(world, each) for each in fitting}

    def keeps(each: Priced, index: int) -> bool:
        _, _, value, target, _ = rows[id(each)][index]
        return target is None or value <= target

    count = len(rows[id(fitting[0])])
    for index in range(count):
        others = [other for other in range(count) if other != index]
        able = [each for each in fitting if all(keeps(each, other) for other in others)]
        if not able:
            continue  # another target is impossible by itself: report that one
        best = min(able, key=lambda each: rows[id(each)][index][2])
        return _missed(best, rows[id(best)][index], ledger)
    # two targets at a time are impossible together: report the first that is missed most widely
    index = next(index for index in range(count) if not any(keeps(each, index) for each in fitting))
    best = min(fitting, key=lambda each: rows[id(each)][index][2])
    return _missed(best, rows[id(best)][index], ledger)


def _missed(
    best: Priced,
    row: tuple[str, str, float, float | None, str],
    ledger: tuple[Rejected, ...],
) -> NoPlan:
    name, flag, value, target, unit = row
    need = f"{flag} {abs(target or 0.0):g} {unit}"
    if name == "rate":
        have = f"the best plan ({best.candidate.label}) sustains {-value:.4g} {unit}"
        return NoPlan(name, need, have, f"{flag} {round_down(-value):g}", ledger)
    have = (
        f"the best plan ({best.candidate.label}) needs {value:.4g} s for {WHAT[name]},"
        " margin included"
    )
    return NoPlan(name, need, have, f"{flag} {round_up(value):g}", ledger)


def round_up(value: float, digits: int = 3) -> float:
    """The next value of so many significant digits: a target that is met when given back."""
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    return float(f"{math.ceil(value / unit) * unit:.{digits}g}")


def round_down(value: float, digits: int = 3) -> float:
    """The value of so many significant digits below: a rate that is kept when given back."""
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    return float(f"{math.floor(value / unit) * unit:.{digits}g}")

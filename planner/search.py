"""Finds the best candidates of a world: enumerate, bound, price, rank. What decides: objective.py.

Few mesh shapes are all priced, in every variant. Many are priced best bound first, in two passes:

1. the best class that anything reaches, and the shortest longest prompt in it (which sets rule 3),
   by rising lower bound of that time until the bound alone exceeds the best found
2. the table, by falling upper bound of the score until the bound alone is below its last row

A shape that was never priced stands in `pruned` with the inequality that kept it out, so the table
is the one that pricing everything would give: a test holds the search to brute force both ways.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from planner.bound import Bound, Bounds, above_target
from planner.cost import MARGIN
from planner.failure import NoPlan, nothing_fits, too_slow
from planner.found import Found
from planner.memory import reachable_context
from planner.objective import (
    in_words,
    keeps_idle,
    keeps_tbt,
    level,
    order,
    score,
    score_bound,
    ttft_limit_s,
)
from planner.price import Priced, price, solo_s, tbt_s
from planner.space import (
    Candidate,
    Pruned,
    Rejected,
    branches,
    candidates,
    rejected,
    variants,
)
from planner.world import World
from plans.errors import Infeasible
from plans.topology import Topology

__all__ = ["Found", "NoPlan", "Priced", "price", "search", "solo_s", "tbt_s"]

EXACT_SHAPES = 96
"""Up to so many mesh shapes all are priced; more are bounded first."""
TABLE = 10
"""Rows of the ranking that pruning may not touch."""


class _Market:
    """Shapes and branches of one world: bounds and prices when asked for, and the ledger."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.roots, self.ledger = candidates(world)
        self.priced: dict[Candidate, list[Priced]] = {}
        """By branch."""
        self.branches = {root: _named(root) for root in self.roots}
        self._bounds = Bounds(world)
        self._known: dict[Candidate, Bound] = {}
        self._ttft_s: dict[Candidate, float] = {}

    def bound(self, branch: Candidate) -> Bound:
        """Bound of a branch; of a shape where no number of groups is said and kvp is above 1."""
        if branch not in self._known:
            self._known[branch] = self._bounds.of(branch, whole=branch.spread is None)
        return self._known[branch]

    def ttft_s(self, branch: Candidate, enough_s: float) -> float:
        """Bound on the longest prompt; computed more closely where the plain one is not enough."""
        if (plain_s := self.bound(branch).ttft_longest_s) > enough_s:
            return plain_s
        if branch not in self._ttft_s:
            self._ttft_s[branch] = max(self._bounds.ttft_s(branch), plain_s)
        return self._ttft_s[branch]

    def fits(self, root: Candidate) -> bool:
        """Whether a shape can hold the context at all; otherwise a row of the ledger."""
        try:
            if self.bound(root).fits:
                return True
            self.price(root)
        except Infeasible as error:  # a dtype that the device does not have
            self.ledger.append(rejected(root.label, error))
        return False

    def price(self, branch: Candidate) -> list[Priced]:
        """All variants of a branch that fit, priced once; the others go to the ledger."""
        if branch in self.priced:
            return self.priced[branch]
        fitting, failed = [], []
        for candidate in variants(self.world, branch):
            try:
                fitting.append(price(self.world, candidate))
            except Infeasible as error:
                failed.append(rejected(candidate.label, error))
        # one row says it for a branch of which no variant fits
        self.ledger += failed if fitting else [replace(failed[0], label=branch.label)]
        self.priced[branch] = fitting
        return fitting

    @property
    def all_priced(self) -> list[Priced]:
        """Everything priced so far, in the order of the shapes."""
        return [
            each
            for root in self.roots
            for branch in self.branches[root]
            for each in self.priced.get(branch, ())
        ]


def _named(root: Candidate) -> list[Candidate]:
    """Branches of a shape, each saying its number of groups where there is a choice."""
    every = branches(root)
    kvp = root.parallelism.kvp
    return every if kvp == 1 else [replace(each, spread=each.groups) for each in every]


def search(world: World) -> Found:
    """Ranks the candidates; raises NoPlan where there is none."""
    market = _Market(world)
    pruned: list[Pruned] = []
    if len(market.roots) > EXACT_SHAPES:
        pruned = _branch_and_bound(market)
    else:
        for root in market.roots:
            for branch in market.branches[root]:
                market.price(branch)
    fitting = market.all_priced
    if not fitting:
        raise nothing_fits(world, market.roots, tuple(market.ledger))
    meeting, missed = meet_targets(world, fitting)
    market.ledger += missed
    if not meeting:
        raise too_slow(world, fitting, tuple(market.ledger), target_values)
    ranked, verdicts, notes = rank(world, meeting)
    return Found(
        ranked=tuple(ranked),
        verdicts=tuple(verdicts),
        ledger=tuple(market.ledger),
        pruned=tuple(pruned),
        objective=in_words(world),
        notes=(*world.notes, *notes),
    )


def _branch_and_bound(market: _Market) -> list[Pruned]:
    """Prices what could stand in the table or set its limits; the proof for all others."""
    world = market.world
    roots = [root for root in market.roots if market.fits(root)]
    _price_near_targets(market, roots)
    rules = _rules(market, roots)
    table: list[float] = []

    def last() -> float | None:
        return table[-1] if len(table) == TABLE else None

    def enter(priced: list[Priced]) -> None:
        meeting, _ = meet_targets(world, priced)
        table.extend(score(world, each) for each in meeting if rules.competes(world, each))
        table.sort(reverse=True)
        del table[TABLE:]

    enter(market.all_priced)
    for root in sorted(roots, key=lambda root: -score_bound(world, market.bound(root))):
        if (least := last()) is not None and score_bound(world, market.bound(root)) < least:
            break
        for branch in market.branches[root] if _proof(market, root, rules, last()) is None else ():
            if branch not in market.priced and _proof(market, branch, rules, last()) is None:
                enter(market.price(branch))
    proofs = []
    for root in roots:
        left = [branch for branch in market.branches[root] if branch not in market.priced]
        proof = _proof(market, root, rules, last()) if left else None
        for branch in [root] if proof else left:
            proof = proof or _proof(market, branch, rules, last())
            assert proof is not None, f"{branch.label} was neither priced nor ruled out"
            proofs.append((branch, proof))
    return _rolled_up(proofs)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rules:
    """Rules 2 and 3 of the objective with their values."""

    level: int
    best_s: float
    limit_s: float

    def competes(self, world: World, each: Priced) -> bool:
        return level(world, each) >= self.level and each.ttft_longest_s <= self.limit_s


def _rules(market: _Market, roots: list[Candidate]) -> _Rules:
    """The best class that is reached, and the shortest longest prompt in it: pass 1."""
    world = market.world
    best_s = math.inf
    for wanted in (2, 1, 0):
        for root in sorted(roots, key=lambda root: market.bound(root).ttft_longest_s):
            if market.bound(root).ttft_longest_s > best_s:
                break
            for branch in [root, *market.branches[root]]:
                bound = market.bound(branch)
                if level(world, bound) < wanted or _misses(world, bound):
                    continue
                if market.ttft_s(branch, best_s) > best_s:
                    continue
                if branch is not root or len(market.branches[root]) == 1:
                    best_s = min([best_s, *_times(market, branch, wanted)])
        if best_s < math.inf:
            break
    return _Rules(level=wanted, best_s=best_s, limit_s=ttft_limit_s(world, best_s))


def _times(market: _Market, branch: Candidate, wanted: int) -> list[float]:
    """Longest prompts of a branch's variants that keep the hard targets and reach the class."""
    world = market.world
    meeting, _ = meet_targets(world, market.price(branch))
    return [each.ttft_longest_s for each in meeting if level(world, each) >= wanted]


def _price_near_targets(market: _Market, roots: list[Candidate]) -> None:
    """With hard targets that few meet, prices the shapes that come nearest to each target."""
    world = market.world
    merits: list[Callable[[Bound], float]] = []
    if world.tbt_slo_s is not None:
        merits.append(lambda bound: bound.tbt_full_s)
    if world.ttft_slo_s is not None:
        merits.append(lambda bound: bound.ttft_longest_s)
    if world.rate_rps is not None:
        merits.append(lambda bound: -bound.rps)
    for merit in merits:
        for root in sorted(roots, key=lambda root: merit(market.bound(root)))[:TABLE]:
            for branch in market.branches[root]:
                market.price(branch)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Proof:
    """Why no variant of a shape can matter."""

    reason: str
    value: float
    """The bound, the smaller the more promising."""
    bound: str
    best: str


def _misses(world: World, bound: Bound) -> _Proof | None:
    """The proof that no variant of a shape keeps a hard target."""
    rate, slo_s = world.rate_rps, world.tbt_slo_s
    if rate is not None and bound.rps < rate:
        return _Proof(
            reason="rate",
            value=-bound.rps,
            bound=f"at most {bound.rps:.4g} requests/s",
            best=f"--rate {rate:g}",
        )
    if slo_s is not None and above_target(world, bound.tbt_full_s, slo_s):
        return _at_least("tbt", bound.tbt_full_s, f"--tbt-slo {slo_s * 1e3:g} ms", "ms")
    return None


def _at_least(reason: str, seconds: float, target: str, unit: str) -> _Proof:
    shown = seconds * 1e3 if unit == "ms" else seconds
    margin = f" with {MARGIN:.0%} margin" if unit == "ms" else ""
    bound = f"at least {shown:.4g} {unit}"
    return _Proof(reason=reason, value=seconds, bound=bound, best=f"{target}{margin}")


def _proof(market: _Market, branch: Candidate, rules: _Rules, last: float | None) -> _Proof | None:
    """The rule that keeps every variant of a branch out of the table, or None."""
    world, bound = market.world, market.bound(branch)
    if missed := _misses(world, bound):
        return missed
    if rules.level >= 1 and not keeps_tbt(world, bound.tbt_full_s):
        target = f"{world.targets.tbt_s * 1e3:g} ms"
        return _at_least("time between tokens at full context", bound.tbt_full_s, target, "ms")
    if rules.level == 2 and not keeps_idle(world, bound.least_chunk_s):
        target = f"{world.scheduler.idle_budget_s * 1e3:g} ms"
        return _at_least("least chunk at full context", bound.least_chunk_s, target, "ms")
    value = score_bound(world, bound)
    if last is not None and value < last:
        return _Proof(
            reason=f"score, {world.objective}",
            value=-value,
            bound=f"at most {value:.4g}",
            best=f"{last:.4g}, row {TABLE} of the table",
        )
    if (seconds := market.ttft_s(branch, rules.limit_s)) > rules.limit_s:
        target = f"{rules.limit_s:.4g} s, from the best plan's {rules.best_s:.4g} s"
        return _at_least("longest prompt", seconds, target, "s")
    return None


def _rolled_up(proofs: list[tuple[Candidate, _Proof]]) -> list[Pruned]:
    """One row for each tp, kvp and reason, with the bound of its most promising shape."""
    groups: dict[tuple[int, int, str], list[tuple[int, _Proof]]] = {}
    for root, proof in proofs:
        p = root.parallelism
        groups.setdefault((p.tp, p.kvp, proof.reason), []).append((p.spp, proof))
    found = []
    for (tp, kvp, reason), members in groups.items():
        stages = [spp for spp, _ in members]
        span = f"{min(stages)}" if len(stages) == 1 else f"{min(stages)}-{max(stages)}"
        _, best = min(members, key=lambda member: member[1].value)
        found.append(
            Pruned(
                label=f"tp {tp} x spp {span} x kvp {kvp}",
                branches=len(members),
                reason=reason,
                bound=best.bound,
                best=best.best,
            )
        )
    return found


def target_values(
    world: World, each: Priced
) -> tuple[tuple[str, str, float, float | None, str], ...]:
    """(constraint, flag, value, target, unit) of each hard target; values are to stay below."""
    rate = None if world.rate_rps is None else -world.rate_rps
    return (
        ("ttft", "--ttft-slo", each.ttft_slo_s * (1 + MARGIN), world.ttft_slo_s, "s"),
        ("tbt", "--tbt-slo", each.tbt_full_s * (1 + MARGIN), world.tbt_slo_s, "s"),
        ("rate", "--rate", -each.capacity.rps, rate, "requests/s"),
    )


def meet_targets(world: World, fitting: Iterable[Priced]) -> tuple[list[Priced], list[Rejected]]:
    """Those that keep every hard target, and the ledger of the others."""
    meeting, missed = [], []
    for each in fitting:
        broken = next(
            (row for row in target_values(world, each) if row[3] is not None and row[2] > row[3]),
            None,
        )
        if broken is None:
            meeting.append(each)
            continue
        name, flag, value, target, unit = broken
        margin = "" if name == "rate" else f" with {MARGIN:.0%} margin"
        missed.append(
            Rejected(
                label=each.candidate.label,
                constraint=name,
                need=f"{flag} {abs(target or 0.0):g} {unit}",
                have=f"{abs(value):.4g} {unit}{margin}",
            )
        )
    return meeting, missed


def rank(world: World, fitting: list[Priced]) -> tuple[list[Priced], list[str], tuple[str, ...]]:
    """Best first, why each that did not compete, and notes on targets that nothing keeps."""
    target_s, idle_s = world.targets.tbt_s, world.scheduler.idle_budget_s
    levels = {id(each): level(world, each) for each in fitting}
    best_level = max(levels.values())
    preferred = [each for each in fitting if levels[id(each)] == best_level]
    note = ""
    if best_level == 0:
        best = min(each.tbt_full_s for each in fitting)
        note = (
            f"no plan keeps the target of {target_s * 1e3:g} ms between tokens at full context;"
            f" the best reaches {best * 1e3:.1f} ms"
        )
    elif best_level == 1:
        note = (
            f"at full context even a chunk of {world.scheduler.min_chunk_tokens} tokens exceeds the"
            f" idle budget of {idle_s * 1e3:g} ms, so the longest prompts advance in longer steps"
        )
    limit_s = ttft_limit_s(world, min(each.ttft_longest_s for each in preferred))

    def verdict(each: Priced) -> str:
        if best_level >= 1 and levels[id(each)] == 0:
            return f"above {target_s * 1e3:g} ms between tokens at full context"
        if best_level == 2 and levels[id(each)] == 1:
            return f"least chunk at full context above {idle_s * 1e3:g} ms"
        if each.ttft_longest_s > limit_s:
            return f"longest prompt above {limit_s:.3g} s"
        return ""

    judged = sorted(
        ((verdict(each), each) for each in fitting),
        key=lambda pair: (bool(pair[0]), order(world, pair[1])),
    )
    return [each for _, each in judged], [why for why, _ in judged], (note,) if note else ()


def smallest_fitting(world: World, machines: Iterable[Topology]) -> int | None:
    """Devices of the first machine on which some candidate fits in memory; None where none does."""
    for machine in machines:
        bigger = world.with_devices(machine)
        every, _ = candidates(bigger)
        if any(reachable_context(bigger, each) >= world.limits.context_tokens for each in every):
            return machine.devices
    return None

"""Finds the best plan of a world: enumerate, prune with reasons, price, rank.

The objective, in the order in which it decides (OBJECTIVE says the same to the user):

1. hard      memory, context, divisibility, --ttft-slo, --tbt-slo: a candidate that misses one is in
             the ledger with the two sides of the broken inequality
2. class     time between tokens at full context, a minimal chunk beside the decode, within the
             target; and a minimal chunk at full context within the idle budget. Where no candidate
             does both, the first alone; where none does that, all compete and a note says so. This
             is what makes KVP win: beyond some context no other axis shortens a decode.
3. limit     solo prefill of the longest prompt within max(multiplier x the best, floor): the same
             rule by which LARS sets deadlines
4. score     capacity x min(1, step budget / time between tokens at full context): a decode that
             fills the step budget leaves no room for the prefills beside it

Ties go to the lower TTFT, then the lower TBT, then the smaller degrees.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from planner.capacity import Capacity, capacity
from planner.cost import MARGIN, step_time
from planner.memory import Footprint, footprint, reachable_context
from planner.placement import place
from planner.schedule import (
    chunk_sizes,
    estimate_solo_s,
    least_chunk_step_s,
    rows_of,
)
from planner.space import Candidate, Rejected, candidates, rejected
from planner.world import World, slo_classes, slo_prompt
from plans.chunks import WorkTable
from plans.errors import Infeasible
from plans.plan import Placement
from plans.steptime import StepTime
from plans.topology import Topology

OBJECTIVE = (
    "most requests a second, among plans whose longest prompt alone starts within {multiplier:g} x"
    " the best time (or {floor:g} s) and whose tokens at full context keep {tbt_ms:g} ms; a decode"
    " above the step budget of {budget_ms:g} ms counts against the rate"
)
EXACT_CHUNKS = 512
"""Prompts of at most this many chunk and stage pairs are priced chunk by chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Priced:
    """A candidate that fits, and what it would do."""

    candidate: Candidate
    placement: Placement
    footprint: Footprint
    time: StepTime
    sizes: tuple[tuple[int, int], ...]
    """(until_tokens, chunk_tokens) of the schedule."""
    capacity: Capacity
    ttft_longest_s: float
    """Lone prompt as long as the context."""
    ttft_slo_s: float
    """Lone prompt for which --ttft-slo is judged."""
    tbt_full_s: float
    """Gap between tokens of one request at full context, a minimal chunk of another beside it."""
    least_chunk_s: float
    """Step of a minimal chunk at full context."""
    score: float

    @property
    def shard_tokens(self) -> int:
        """Tokens of one request in one KVP group."""
        return self.footprint.kv.tokens_per_kvp_shard

    @property
    def order(self) -> tuple[float, ...]:
        """Sort key; the best is smallest."""
        p = self.candidate.parallelism
        return (-self.score, self.ttft_longest_s, self.tbt_full_s, p.tp, p.spp, p.kvp)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The ranked answer; the first is the plan."""

    ranked: tuple[Priced, ...]
    verdicts: tuple[str, ...]
    """Why each of `ranked` stands where it does; empty for those that lost on the score alone."""
    ledger: tuple[Rejected, ...]
    objective: str
    notes: tuple[str, ...]


class NoPlan(Infeasible):
    """No candidate is left; carries the ledger."""

    def __init__(
        self, constraint: str, need: str, have: str, nearest: str, ledger: tuple[Rejected, ...]
    ) -> None:
        """An Infeasible with the reasons of all candidates."""
        super().__init__(constraint, need, have, nearest)
        self.ledger = ledger


def search(world: World) -> Found:
    """Ranks every feasible candidate; raises NoPlan where there is none."""
    every, ledger = candidates(world)
    fitting: list[Priced] = []
    for candidate in every:
        try:
            fitting.append(price(world, candidate))
        except Infeasible as error:
            ledger.append(rejected(candidate.label, error))
    if not fitting:
        raise _nothing_fits(world, every, tuple(ledger))
    meeting, missed = meet_slos(world, fitting)
    ledger += missed
    if not meeting:
        raise _slo_missed(world, fitting, tuple(ledger))
    ranked, verdicts, note = rank(world, meeting)
    return Found(
        ranked=tuple(ranked),
        verdicts=tuple(verdicts),
        ledger=tuple(ledger),
        objective=OBJECTIVE.format(
            multiplier=world.targets.ttft.multiplier,
            floor=world.targets.ttft.floor_s,
            tbt_ms=world.targets.tbt_s * 1e3,
            budget_ms=world.scheduler.step_budget_s * 1e3,
        ),
        notes=(*world.notes, *note),
    )


def price(world: World, candidate: Candidate) -> Priced:
    """Memory, step time, schedule, latencies, capacity; raises Infeasible where it does not fit."""
    room = footprint(world, candidate)
    placement = place(world.topology, candidate.parallelism)
    time = step_time(world, candidate, placement)
    shard = room.kv.tokens_per_kvp_shard
    sizes = chunk_sizes(world, time, shard)
    rate = capacity(
        world,
        candidate.parallelism,
        time,
        sizes,
        pool_tokens=room.pool_tokens,
        shard_tokens=shard,
    )
    tbt_full_s = tbt_s(time, world.limits.context_tokens, shard, world.scheduler.min_chunk_tokens)
    context = world.limits.context_tokens
    slo_tokens = min(max(slo_prompt(each) for each in slo_classes(world.workload)), context)
    return Priced(
        candidate=candidate,
        placement=placement,
        footprint=room,
        time=time,
        sizes=sizes,
        capacity=rate,
        ttft_longest_s=solo_s(sizes, time, context, shard),
        ttft_slo_s=solo_s(sizes, time, slo_tokens, shard),
        tbt_full_s=tbt_full_s,
        least_chunk_s=least_chunk_step_s(world, time, shard),
        score=rate.rps * min(1.0, world.scheduler.step_budget_s / tbt_full_s),
    )


def solo_s(
    sizes: tuple[tuple[int, int], ...], time: StepTime, tokens: int, shard_tokens: int
) -> float:
    """Time to the first token of a lone prompt: by chunks where that is cheap, else by spans."""
    if tokens / sizes[-1][1] * time.stages <= EXACT_CHUNKS:
        return WorkTable(rows_of(sizes), time, shard_tokens).solo_s(tokens)
    return estimate_solo_s(sizes, time, tokens, shard_tokens)


def tbt_s(time: StepTime, context: int, shard_tokens: int, chunk_tokens: int = 0) -> float:
    """Gap between tokens of one request at a context, on its slowest group.

    chunk_tokens  a chunk of another, new prompt in the same step
    """
    groups = (context - 1) // shard_tokens + 1
    chunks = [(chunk_tokens, 0)] if chunk_tokens else []
    keys = min(context, shard_tokens)
    if not chunks or groups == 1:
        return time.step_s(chunks, [keys], groups)
    # the chunk is in one group only, so it merges nothing
    alone = time.step_s((), [keys], groups)
    return alone + time.step_s(chunks, [keys]) - time.step_s((), [keys])


def meet_slos(world: World, fitting: list[Priced]) -> tuple[list[Priced], list[Rejected]]:
    """Those that keep both hard targets with the margin, and the ledger of the others."""
    meeting, missed = [], []
    for each in fitting:
        broken = [
            (name, flag, value, slo)
            for name, flag, value, slo in _slo_values(world, each)
            if slo is not None and value > slo
        ]
        if not broken:
            meeting.append(each)
            continue
        name, flag, value, slo = broken[0]
        missed.append(
            Rejected(
                label=each.candidate.label,
                constraint=name,
                need=f"{flag} {slo:g} s",
                have=f"{value:.4g} s with {MARGIN:.0%} margin",
            )
        )
    return meeting, missed


def _slo_values(world: World, each: Priced) -> tuple[tuple[str, str, float, float | None], ...]:
    return (
        ("ttft", "--ttft-slo", each.ttft_slo_s * (1 + MARGIN), world.ttft_slo_s),
        ("tbt", "--tbt-slo", each.tbt_full_s * (1 + MARGIN), world.tbt_slo_s),
    )


def rank(world: World, fitting: list[Priced]) -> tuple[list[Priced], list[str], tuple[str, ...]]:
    """Best first, why each that did not compete, and notes on targets that nothing keeps."""
    target_s, idle_s = world.targets.tbt_s, world.scheduler.idle_budget_s
    quick = [each for each in fitting if each.tbt_full_s * (1 + MARGIN) <= target_s]
    roomy = [each for each in quick if each.least_chunk_s * (1 + MARGIN) <= idle_s]
    preferred = roomy or quick or fitting
    note = ""
    if not quick:
        best = min(each.tbt_full_s for each in fitting)
        note = (
            f"no plan keeps the target of {target_s * 1e3:g} ms between tokens at full context;"
            f" the best reaches {best * 1e3:.1f} ms"
        )
    elif not roomy:
        note = (
            f"at full context even a chunk of {world.scheduler.min_chunk_tokens} tokens exceeds the"
            f" idle budget of {idle_s * 1e3:g} ms, so the longest prompts advance in longer steps"
        )
    ttft = world.targets.ttft
    limit_s = max(ttft.multiplier * min(each.ttft_longest_s for each in preferred), ttft.floor_s)

    def verdict(each: Priced) -> str:
        if quick and each.tbt_full_s * (1 + MARGIN) > target_s:
            return f"above {target_s * 1e3:g} ms between tokens at full context"
        if roomy and each.least_chunk_s * (1 + MARGIN) > idle_s:
            return f"least chunk at full context above {idle_s * 1e3:g} ms"
        if each.ttft_longest_s > limit_s:
            return f"longest prompt above {limit_s:.3g} s"
        return ""

    judged = sorted(
        ((verdict(each), each) for each in fitting),
        key=lambda pair: (bool(pair[0]), pair[1].order),
    )
    return [each for _, each in judged], [why for why, _ in judged], (note,) if note else ()


def _nothing_fits(world: World, every: list[Candidate], ledger: tuple[Rejected, ...]) -> NoPlan:
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


def _slo_missed(world: World, fitting: list[Priced], ledger: tuple[Rejected, ...]) -> NoPlan:
    """The error for targets that no candidate keeps, with the nearest value that one would."""
    for index in (0, 1):
        other = 1 - index
        able = [
            each
            for each in fitting
            if (slo := _slo_values(world, each)[other][3]) is None
            or _slo_values(world, each)[other][2] <= slo
        ]
        if not able:
            continue  # the other target is impossible by itself: report that one
        best = min(able, key=lambda each: _slo_values(world, each)[index][2])
        name, flag, value, slo = _slo_values(world, best)[index]
        if slo is not None and value > slo:
            what = "first token of a lone prompt" if name == "ttft" else "tokens at full context"
            return NoPlan(
                name,
                f"{flag} {slo:g} s",
                f"the best plan ({best.candidate.label}) needs {value:.4g} s for"
                f" {what}, {MARGIN:.0%} margin included",
                f"{flag} {round_up(value):g}",
                ledger,
            )
    raise AssertionError("called although a candidate meets both targets")


def round_up(value: float, digits: int = 3) -> float:
    """The next value of so many significant digits: a target that is met when given back."""
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    return float(f"{math.ceil(value / unit) * unit:.{digits}g}")


def smallest_fitting(world: World, machines: Iterable[Topology]) -> int | None:
    """Devices of the first machine on which some candidate fits in memory; None where none does."""
    for machine in machines:
        bigger = world.with_devices(machine)
        every, _ = candidates(bigger)
        if any(reachable_context(bigger, each) >= world.limits.context_tokens for each in every):
            return machine.devices
    return None

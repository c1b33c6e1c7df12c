"""What "best" means: four objectives, each a score to be as large as possible, and who competes.

The order in which merits decide, whatever the objective:

1. hard      memory, context, divisibility, --ttft-slo, --tbt-slo, --rate: a candidate that misses
             one is in the ledger with the two sides of the broken inequality
2. class     time between tokens at full context, a minimal chunk beside the decode, within the
             target; and a minimal chunk at full context within the idle budget. Where no candidate
             does both, the first alone; where none does that, all compete and a note says so. This
             is what makes KVP win: beyond some context no other axis shortens a decode.
3. limit     goodput only: solo prefill of the longest prompt within max(multiplier x the best,
             floor): the same rule by which LARS sets deadlines
4. score     goodput   capacity x min(1, step budget / time between tokens at full context): a
                       decode that fills the step budget leaves no room for prefills beside it
             latency   one over the end-to-end time of a lone request, geometric mean of the
                       classes by their shares

Ties go to the lower TTFT, then the lower TBT, then the smaller degrees. `min-gpus` and
`max-context` ask the goodput question of other machines and contexts: planner/answer.py.
"""

import math
from collections.abc import Mapping

from planner.bound import Bound, above_target
from planner.price import Priced
from planner.world import World
from plans.workload import length_at

OBJECTIVES = ("goodput", "latency", "max-context", "min-gpus")
_RULE = "plans whose tokens at full context keep {tbt_ms:g} ms{rate}"
_GOODPUT = (
    "most requests a second, among plans whose longest prompt alone starts within {multiplier:g} x"
    " the best time (or {floor:g} s) and whose tokens at full context keep {tbt_ms:g} ms{rate}; a"
    " decode above the step budget of {budget_ms:g} ms counts against the rate"
)
WORDS = {
    "goodput": _GOODPUT,
    "latency": "shortest time of a lone request from end to end, classes weighed by share, among "
    + _RULE,
    "max-context": "longest context that fits and keeps {tbt_ms:g} ms between tokens; then "
    + _GOODPUT,
    "min-gpus": "fewest GPUs{rate}; then " + _GOODPUT,
}


def in_words(world: World) -> str:
    """The objective as the answer states it."""
    rate = "" if world.rate_rps is None else f" and that sustain {world.rate_rps:g} requests/s"
    return WORDS[world.objective].format(
        multiplier=world.targets.ttft.multiplier,
        floor=world.targets.ttft.floor_s,
        tbt_ms=world.targets.tbt_s * 1e3,
        budget_ms=world.scheduler.step_budget_s * 1e3,
        rate=rate,
    )


def score(world: World, each: Priced) -> float:
    """Merit of a candidate; larger is better."""
    if world.objective == "latency":
        return 1 / lone_s(world, dict(_lone(world, each)))
    return each.capacity.rps * _budget_share(world, each.tbt_full_s)


def score_bound(world: World, bound: Bound) -> float:
    """What no candidate of a shape exceeds."""
    if world.objective == "latency":
        return 1 / lone_s(world, bound.lone_s)
    return bound.rps * _budget_share(world, bound.tbt_full_s)


def _budget_share(world: World, tbt_full_s: float) -> float:
    return min(1.0, world.scheduler.step_budget_s / tbt_full_s)


def lone_s(world: World, by_class: Mapping[str, float]) -> float:
    """Geometric mean of the classes' times by their shares."""
    shares = {each.name: each.share for each in world.workload.classes}
    total = sum(shares.values())
    return math.exp(sum(share * math.log(by_class[name]) for name, share in shares.items()) / total)


def _lone(world: World, each: Priced) -> list[tuple[str, float]]:
    context = world.limits.context_tokens
    found = []
    for one in world.workload.classes:
        prompt = min(length_at(one.input_tokens, 0.5), context - 1)
        answer = min(length_at(one.output_tokens, 0.5), context - prompt)
        found.append((one.name, each.solo_s(prompt) + (answer - 1) * each.tbt_s(prompt)))
    return found


def order(world: World, each: Priced) -> tuple[float, ...]:
    """Sort key; the best is smallest."""
    p = each.candidate.parallelism
    return (
        -score(world, each),
        each.ttft_longest_s,
        each.tbt_full_s,
        *(p.tp, p.spp, p.kvp),
        -each.candidate.page_tokens,
        -each.candidate.groups,
    )


def keeps_tbt(world: World, seconds: float) -> bool:
    """Whether a gap at full context is within the target."""
    return not above_target(world, seconds, world.targets.tbt_s)


def keeps_idle(world: World, seconds: float) -> bool:
    """Whether a minimal chunk at full context is within the idle budget."""
    return not above_target(world, seconds, world.scheduler.idle_budget_s)


def level(world: World, each: Priced | Bound) -> int:
    """Class of a candidate: 2 keeps both limits of rule 2, 1 the time between tokens, 0 neither."""
    if not keeps_tbt(world, each.tbt_full_s):
        return 0
    return 2 if keeps_idle(world, each.least_chunk_s) else 1


def ttft_limit_s(world: World, best_s: float) -> float:
    """Rule 3: where the longest prompt must start, given the best time of the class."""
    if world.objective == "latency":
        return math.inf
    ttft = world.targets.ttft
    return max(ttft.multiplier * best_s, ttft.floor_s)

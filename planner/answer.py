"""From a question to the answer: search, replay the best, decide, say why, check.

quick   at most three short replays: the best three shapes at one common rate, or, where targets are
        hard, the best one at falling rates until it keeps them
full    five shapes over long replays; then the winner's capacity by offering it more than it can
        do, and by bisection the highest rate at which nine of ten requests meet their SLO

A replay changes the ranking only where it says more than chance: a candidate passes another when
its share of requests in time is higher by two standard errors of the difference.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from msgspec import structs

from planner.assemble import evaluate, to_plan
from planner.bound import Bounds
from planner.failure import NoPlan, round_up
from planner.found import Found
from planner.memory import reachable_context
from planner.objective import level
from planner.price import Priced, price
from planner.replay import LEAST_REQUESTS, LOAD, delivered_rps, replay
from planner.search import search
from planner.selfcheck import verify
from planner.sensitivity import changes
from planner.space import candidates, gpus_text
from planner.story import why
from planner.world import World, slo_classes, slo_prompt
from plans.errors import Infeasible, UsageError
from plans.plan import MadeBy, Plan, Replay
from plans.topology import Topology
from plans.workload import mean_length

Machines = Callable[[int], Topology]
STEPS = {"quick": 6000, "full": 150000}
"""Of all replays of the finalists together."""
FINALISTS = {"quick": 3, "full": 5}
FALLING = (LOAD, LOAD / 4, LOAD / 1024)
"""Loads at which hard targets are tried; at the last one requests are alone."""
WHOLE = 5
"""Factor on the steps of a replay in which every request is to arrive; it ends by itself."""
OVERLOAD = 1.3
"""What is offered, over the formula's capacity, to see what is delivered."""
FEW_GPUS = 64
"""Up to here a quick answer also searches half and twice as many."""
ATTAINMENT = 0.9
BISECTIONS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The plan, without program, and everything that the search found on the way."""

    world: World
    """The question answered: with `max-context` or `min-gpus` another than the one asked."""
    found: Found
    plan: Plan


def answer(
    world: World,
    *,
    name: Callable[[World], str],
    made_by: MadeBy,
    machines: Machines | None = None,
    remake: Callable[[int], World] | None = None,
) -> Answer:
    """Answers one question at the effort of made_by; raises NoPlan, or SelfCheckFailed for a bug.

    name      of the plan, once it is known how many GPUs it has
    machines  makes the machine of so many GPUs; needed by min-gpus
    remake    asks the question anew for another context; needed by max-context
    """
    if world.objective == "min-gpus":
        assert machines is not None
        world, found = fewest_gpus(world, machines)
    else:
        if world.objective == "max-context":
            assert remake is not None
            world = remake(longest_context(world))
        found = search(world)
    effort = made_by.effort
    title = name(world)

    def draft(each: Priced) -> Plan:
        notes = (*found.notes, *_caveats(world, each))
        return to_plan(world, each, name=title, made_by=made_by, notes=notes)

    found, plan = _replayed(world, found, draft, effort=effort, seed=made_by.seed)
    few = world.gpus <= FEW_GPUS or effort == "full"
    found = replace(found, sensitivity=tuple(changes(world, found, machines if few else None)))
    found = replace(found, why=tuple(why(world, found, plan)))
    verify(found, plan)
    return Answer(world=world, found=found, plan=plan)


def _caveats(world: World, each: Priced) -> Iterator[str]:
    """What the runtime cannot do yet, and what changes the answers."""
    if gaps := each.world.model.unsupported:
        yield f"no program is emitted: {' and '.join(gaps)} cannot be run yet, only simulated"
    if each.world.model.weight_dtype != world.model.weight_dtype:
        yield f"weights rounded to {each.world.model.weight_dtype}: answers differ from the model's"
    if each.world.kv_dtype != world.kv_dtype:
        yield f"keys and values rounded to {each.world.kv_dtype}: answers differ from the model's"


def _replayed(
    world: World, found: Found, draft: Callable[[Priced], Plan], *, effort: str, seed: int
) -> tuple[Found, Plan]:
    """The ranking after replays, and the plan of the first with its operating point."""
    finalists = _finalists(found, FINALISTS[effort])
    rate = world.rate_rps or LOAD * finalists[0].capacity.rps
    hard = world.ttft_slo_s is not None or world.tbt_slo_s is not None
    loads = FALLING if hard and world.rate_rps is None else (LOAD,)
    if len(loads) > 1 and effort == "quick":
        finalists = finalists[:1]
    plans = [draft(each) for each in finalists]
    steps = STEPS[effort] // len(plans)
    count = None
    if hard:  # all that are offered must have come, or percentiles are of a part of the mix
        answers = sum(
            each.share * mean_length(each.output_tokens) for each in world.workload.classes
        )
        count, steps = max(int(steps / answers), LEAST_REQUESTS), WHOLE * steps
    missed: list[tuple[str, float, float]] = []
    for load in loads:
        at_rps = rate * load / LOAD
        points = [
            replay(plan, rate_rps=at_rps, seed=seed, steps=steps, count=count) for plan in plans
        ]
        keeping = [index for index, point in enumerate(points) if not misses(world, point)]
        if keeping:
            break
        missed = misses(world, points[0])
    else:
        raise _missed_in_replay(world, found, missed)
    first = best_point(points, keeping)
    plan = _with_replay(plans[first], points[first])
    if effort == "full":
        plan = _measured(world, plan, seed=seed)
    order = [first, *(index for index in range(len(finalists)) if index != first)]
    ahead = [finalists[index] for index in order]
    others = [
        (each, verdict)
        for each, verdict in zip(found.ranked, found.verdicts, strict=True)
        if all(each is not one for one in ahead)
    ]
    known: list[Replay | None] = [points[index] for index in order]
    known[0] = plan.predicted.replay
    return (
        replace(
            found,
            ranked=(*ahead, *(each for each, _ in others)),
            verdicts=(*("" for _ in ahead), *(verdict for _, verdict in others)),
            replays=(*known, *(None for _ in others)),
        ),
        plan,
    )


def _finalists(found: Found, most: int) -> list[Priced]:
    """The best of each mesh shape, the plan first, among those that compete."""
    shapes: dict[object, Priced] = {}
    for each, verdict in zip(found.ranked, found.verdicts, strict=True):
        if not verdict:
            shapes.setdefault(each.candidate.parallelism, each)
    return list(shapes.values())[:most]


def best_point(points: list[Replay], keeping: list[int]) -> int:
    """The first of the keeping ones, unless a later one is better by more than chance."""
    best = keeping[0]
    for index in keeping[1:]:
        one, other = points[best], points[index]
        spread = sum(
            each.attainment * (1 - each.attainment) / max(each.requests - each.undecided, 1)
            for each in (one, other)
        )
        if other.attainment - one.attainment > 2 * math.sqrt(spread):
            best = index
    return best


def misses(world: World, point: Replay) -> list[tuple[str, float, float]]:
    """(flag, measured, target) of each hard target that a replay misses.

    --ttft-slo holds for the 90th percentile of its classes, --tbt-slo for the 99th of all gaps.
    """
    found = []
    if world.ttft_slo_s is not None:
        short = all(
            slo_prompt(each) < world.scheduler.long_tokens for each in slo_classes(world.workload)
        )
        ttft_s = point.ttft_s["short" if short else "all"].p90
        if ttft_s is not None and ttft_s > world.ttft_slo_s:
            found.append(("--ttft-slo", ttft_s, world.ttft_slo_s))
    if world.tbt_slo_s is not None:
        tbt_s = point.tbt_s["all"].p99
        if tbt_s is not None and tbt_s > world.tbt_slo_s:
            found.append(("--tbt-slo", tbt_s, world.tbt_slo_s))
    return found


def _missed_in_replay(world: World, found: Found, missed: list[tuple[str, float, float]]) -> NoPlan:
    flag, value, target = missed[0]
    which = "P90 of the first token" if flag == "--ttft-slo" else "P99 between tokens"
    rate = "" if world.rate_rps is None else f" at --rate {world.rate_rps:g}"
    return NoPlan(
        flag.removeprefix("--").partition("-")[0],
        f"{flag} {target:g} s{rate}",
        f"in replay the best plan ({found.ranked[0].candidate.label}) has {which} at {value:.4g} s",
        f"{flag} {round_up(value):g}",
        found.ledger,
    )


def _with_replay(plan: Plan, point: Replay) -> Plan:
    notes = tuple(note for note in plan.predicted.notes if not note.startswith("overloaded: "))
    if point.arrival_rps > plan.predicted.capacity_rps:
        over = f"{point.arrival_rps:.3g} requests/s against {plan.predicted.capacity_rps:.3g}"
        notes = (*notes, f"overloaded: {over} that fill the devices; queues grow without end")
    predicted = structs.replace(
        plan.predicted, replay=point, goodput_rps=point.goodput_rps, notes=notes
    )
    return structs.replace(plan, predicted=predicted)


def _measured(world: World, plan: Plan, *, seed: int) -> Plan:
    """Capacity by offering too much, and the rate at which nine of ten are in time."""
    formula_rps = plan.predicted.capacity_rps
    capacity_rps = delivered_rps(plan, rate_rps=OVERLOAD * formula_rps, seed=seed)
    note = (
        f"capacity is what the simulated runtime delivers when offered"
        f" {OVERLOAD * formula_rps:.3g} requests/s; the formula says {formula_rps:.3g}"
    )
    predicted = structs.replace(
        plan.predicted, capacity_rps=capacity_rps, notes=(*plan.predicted.notes, note)
    )
    plan = structs.replace(plan, predicted=predicted)
    if world.rate_rps is not None:
        return plan

    def good(point: Replay) -> bool:
        return point.attainment >= ATTAINMENT and not misses(world, point)

    first = plan.predicted.replay
    best = first if first is not None and good(first) else None
    low, high = (best.arrival_rps, capacity_rps) if best else (0.0, LOAD * capacity_rps)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if middle <= low:
            break
        point = replay(plan, rate_rps=middle, seed=seed, steps=STEPS["full"] // 3)
        if good(point):
            low, best = middle, point
        else:
            high = middle
    return _with_replay(plan, best) if best else plan


def fewest_gpus(world: World, machines: Machines) -> tuple[World, Found]:
    """The question on the smallest machine that has a plan, up to the one asked about."""
    if world.rate_rps is None:
        raise UsageError("--objective min-gpus needs --rate, the requests a second to sustain")
    last: NoPlan | None = None
    for gpus in _counts(world.gpus):
        try:
            smaller = world.with_devices(machines(gpus))
        except UsageError:
            continue
        if not _could_fit(smaller):
            continue
        try:
            found = search(smaller)
        except NoPlan as error:
            last = error
            continue
        note = f"{gpus_text(gpus)} of at most {world.gpus} are enough for {world.rate_rps:g} a s"
        return smaller, replace(found, notes=(*found.notes, note))
    if last is not None:
        raise last
    return world, search(world)  # nothing fits: this raises, with the reasons


def _counts(most: int) -> Iterator[int]:
    """Machine sizes to try: each up to a node of 8, whole nodes beyond, and the one asked for."""
    yield from range(1, min(most, 8) + 1)
    yield from range(16, most, 8)
    if most > 8:
        yield most


def _could_fit(world: World) -> bool:
    """Whether some shape holds the context; the machine asked about last always counts."""
    bounds = Bounds(world)
    try:
        return any(bounds.of(root).fits for root in candidates(world)[0])
    except Infeasible:  # a dtype that the device does not have: search() says so
        return True


def longest_context(world: World) -> int:
    """Tokens of the longest context that fits and keeps the time between tokens, to 1024 tokens.

    Times and memory rise with the context, so halving intervals finds the last one that does both.
    """
    roots, ledger = candidates(world)
    unit = 1024

    def holds(units: int) -> bool:
        limits = structs.replace(world.limits, context_tokens=units * unit)
        longer = replace(world, limits=limits, objective="goodput", notes=())
        for root in sorted(roots, key=lambda each: -each.parallelism.kvp):
            if reachable_context(longer, root) < units * unit:
                continue
            try:
                each = price(longer, root)
            except Infeasible:
                continue
            if level(longer, each) >= 1:
                return True
        return False

    most = max((reachable_context(world, root) for root in roots), default=0) // unit
    if not most or not holds(1):
        row = ledger[0] if ledger else None
        raise NoPlan(
            "max-context",
            f"a context of {unit} tokens that keeps {world.targets.tbt_s * 1e3:g} ms",
            row.have if row else "no plan does",
            f"--tbt-slo {round_up(world.targets.tbt_s * 2):g}",
            tuple(ledger),
        )
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low * unit


def reevaluated(plan: Plan, prompt_tokens: int | None = None) -> Plan:
    """A plan that was edited, with every prediction computed anew, its replay among them."""
    old = plan.predicted.replay
    fresh = evaluate(plan, prompt_tokens)
    rate_rps = LOAD * fresh.predicted.capacity_rps if old is None else old.arrival_rps
    seed = plan.made_by.seed if old is None else old.seed
    return _with_replay(
        fresh, replay(fresh, rate_rps=rate_rps, seed=seed, steps=STEPS["quick"] // 3)
    )

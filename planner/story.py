"""Why the plan is what it is, in sentences with numbers: what binds, what each axis is for."""

from collections.abc import Iterator

from msgspec import structs

from planner.cost import MARGIN
from planner.found import Found
from planner.objective import keeps_tbt
from planner.price import Priced, solo_s
from planner.schedule import chunk_sizes
from planner.text import seconds_text, tokens_text
from planner.world import World
from plans.plan import Plan
from plans.steptime import StepTime


def why(world: World, found: Found, plan: Plan) -> Iterator[str]:
    """Sentences, the most decisive first."""
    best = found.ranked[0]
    p = best.candidate.parallelism
    context = world.limits.context_tokens
    yield from _kvp(world, found, best)
    if p.spp > 1:
        yield _spp(best, context)
    yield _chunks(best, context)
    yield _binding(best, plan)


def _kvp(world: World, found: Found, best: Priced) -> Iterator[str]:
    """KVP is there because without it a token at full context is late or dear; or is not needed."""
    p, context = best.candidate.parallelism, world.limits.context_tokens
    target = seconds_text(world.targets.tbt_s)
    others = [each for each in found.ranked if each.candidate.parallelism.kvp == 1]
    late = [each for each in others if not keeps_tbt(world, each.tbt_full_s)]
    pruned = [row for row in found.pruned if row.label.endswith("kvp 1")]
    slow = [row for row in found.ledger if row.constraint == "tbt" and " kvp 1 " in row.label]
    if p.kvp == 1:
        yield from _no_kvp(world, found, best)
        return
    share = tokens_text(best.shard_tokens)
    if others and len(late) == len(others) and all("tokens" in row.reason for row in pruned):
        nearest = min(late, key=lambda each: each.tbt_full_s)
        yield (
            f"kvp {p.kvp}: without it a token at {tokens_text(context)} takes"
            f" {seconds_text(nearest.tbt_full_s)} at best ({nearest.candidate.label}), above"
            f" {target} with {MARGIN:.0%} margin; tp ends at the node and spp shortens no token."
            f" A group joins every {share} tokens"
        )
    elif not others and slow:
        row = min(slow, key=lambda row: float(row.have.split()[0]))
        yield (
            f"kvp {p.kvp}: without it a token at {tokens_text(context)} misses {row.need}: the"
            f" best, {row.label}, takes {row.have}. A group joins every {share} tokens"
        )
    elif not others and not pruned:
        yield f"kvp {p.kvp}: the KV of one request fits no single group; each holds {share} tokens"
    elif not others:
        cut = next((each for each in pruned if each.label.startswith(f"tp {p.tp} ")), pruned[0])
        yield (
            f"kvp {p.kvp}, {share} tokens a group: without it ({cut.label}) no plan competes,"
            f" {cut.reason}: {cut.bound}, to beat {cut.best}"
        )
    else:
        nearest = min(others, key=lambda each: each.tbt_full_s)
        budget_s, takes_s = world.scheduler.step_budget_s, nearest.tbt_full_s
        beyond = (
            f", above the step budget of {seconds_text(budget_s)}, where prompts beside it come on"
            " by the least chunk alone"
            if best.tbt_full_s <= budget_s < takes_s
            else ""
        )
        yield (
            f"kvp {p.kvp}: without it a token at {tokens_text(context)} takes"
            f" {seconds_text(takes_s)} at best ({nearest.candidate.label}){beyond}; its reads are"
            f" shared by {best.candidate.groups} groups, {share} tokens each, and it takes"
            f" {seconds_text(best.tbt_full_s)}"
        )


def _no_kvp(world: World, found: Found, best: Priced) -> Iterator[str]:
    """What KVP would have done for a token at full context, and when it would be needed."""
    p, context = best.candidate.parallelism, world.limits.context_tokens
    wider = [
        each
        for each in found.ranked
        if each.candidate.parallelism.kvp > 1 and each.candidate.parallelism.tp == p.tp
    ]
    if not wider:
        return
    other = wider[0]
    yield (
        f"kvp 1: a token at {tokens_text(context)} takes {seconds_text(best.tbt_full_s)} on one"
        f" group, within {seconds_text(world.targets.tbt_s)}; {other.candidate.label} would take"
        f" {seconds_text(other.tbt_full_s)}, start {tokens_text(context)} tokens in"
        f" {seconds_text(other.ttft_longest_s)} and sustain {other.capacity.rps:.3g} requests/s"
        f" instead of {best.capacity.rps:.3g}. A limit below"
        f" {seconds_text(best.tbt_full_s * (1 + MARGIN))} needs it"
    )


def _spp(best: Priced, context: int) -> str:
    """What pipelining gives one request: against the same stages without overlap."""
    p = best.candidate.parallelism
    whole = structs.replace(best.time, stage_layers=(sum(best.time.stage_layers),))
    one = _with_time(best, whole)
    gain = one / best.ttft_longest_s
    return (
        f"spp {p.spp}: chunks of one prompt follow each other through {p.spp} stages, so"
        f" {tokens_text(context)} tokens start in {seconds_text(best.ttft_longest_s)} instead of"
        f" {seconds_text(one)} on one stage of the same tp and kvp ({gain:.2f} x)"
    )


def _with_time(best: Priced, time: StepTime) -> float:
    sizes = chunk_sizes(best.world, time, best.shard_tokens)
    return solo_s(sizes, time, best.world.limits.context_tokens, best.shard_tokens)


def _chunks(best: Priced, context: int) -> str:
    """How the chunk moves the first token: the schedule against one fixed small chunk."""
    small = min(size for _, size in best.sizes)
    fixed_s = solo_s(((context, small),), best.time, context, best.shard_tokens)
    first = best.sizes[0][1]
    if first == small:
        return f"chunks of {small} tokens at every prefix keep each step within the idle budget"
    return (
        f"chunks fall from {first} to {small} tokens as the prefix grows, at an even step time;"
        f" {small} everywhere would start {tokens_text(context)} tokens in"
        f" {seconds_text(fixed_s)} instead of {seconds_text(best.ttft_longest_s)}"
    )


def _binding(best: Priced, plan: Plan) -> str:
    """What limits the rate."""
    terms = best.capacity.terms
    whole = sum(terms.values())
    shares = sorted(terms.items(), key=lambda item: -item[1])[:3]
    text = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in shares if seconds)
    return f"the rate is bound by {plan.predicted.bound_by}; a full step is {text}"

"""What would change the decision: the same question with one thing different, ranked again.

GPUs are searched anew; for the rest the best rows of the table are priced again, since what lost by
far does not win by a factor of two in one input. Times are by formula, without replay.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from msgspec import structs

from planner.found import Change, Found
from planner.objective import score
from planner.price import Priced, price
from planner.search import meet_targets, rank, search
from planner.space import Candidate
from planner.text import seconds_text
from planner.world import STEP_SHARE, World
from plans.errors import Infeasible, UsageError
from plans.topology import Topology

ROWS = 12
"""Candidates that are priced again, the plan first."""
Machines = Callable[[int], Topology]


def changes(world: World, found: Found, machines: Machines | None) -> Iterator[Change]:
    """Every change in turn; GPUs only where `machines` makes a machine of so many."""
    best = found.ranked[0]
    if machines is not None:
        for gpus in (world.gpus // 2, world.gpus * 2):
            yield from _other_machine(world, best, gpus, machines)
    table = _rows(found)
    for label, other in _variations(world):
        yield _change(label, other, table, best)


def _other_machine(world: World, best: Priced, gpus: int, machines: Machines) -> Iterator[Change]:
    if gpus < 1:
        return
    label = f"{gpus} GPUs"
    try:
        other = search(world.with_devices(machines(gpus)))
    except UsageError:  # no such machine
        return
    except Infeasible:
        yield _none(label)
    else:
        yield _as_change(label, other.ranked[0], best)


def _variations(world: World) -> Iterator[tuple[str, World]]:
    target_s = world.targets.tbt_s
    for factor in (0.5, 2.0):
        budget_s = STEP_SHARE * target_s * factor
        scheduler = structs.replace(
            world.scheduler,
            step_budget_s=budget_s,
            idle_budget_s=max(world.scheduler.idle_budget_s, budget_s),
        )
        targets = structs.replace(world.targets, tbt_s=target_s * factor)
        slo_s = world.tbt_slo_s and world.tbt_slo_s * factor
        yield (
            f"time between tokens {seconds_text(target_s * factor)}",
            replace(world, targets=targets, scheduler=scheduler, tbt_slo_s=slo_s),
        )
    for factor in (0.5, 2.0):
        links = tuple(
            structs.replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * factor)
            for link in world.topology.links
        )
        if links:
            topology = structs.replace(world.topology, links=links)
            yield f"links x {factor:g}", replace(world, topology=topology)
    device = structs.replace(
        world.device,
        memory_bandwidth_bytes_per_s=world.device.memory_bandwidth_bytes_per_s * 1.5,
    )
    yield "memory bandwidth x 1.5", replace(world, device=device)
    if world.rate_rps is not None:
        for factor in (0.5, 2.0):
            rate = world.rate_rps * factor
            yield f"rate {rate:g} requests/s", replace(world, rate_rps=rate)


def _rows(found: Found) -> list[Candidate]:
    """The plan, and the best candidate of each other mesh shape, those that lost on a rule too."""
    shapes: dict[object, Candidate] = {}
    for each in found.ranked:
        shapes.setdefault(each.candidate.parallelism, each.candidate)
    return list(shapes.values())[:ROWS]


def _change(label: str, world: World, table: list[Candidate], best: Priced) -> Change:
    priced = []
    for candidate in table:
        try:
            priced.append(price(world, candidate))
        except Infeasible:
            continue
    meeting, _ = meet_targets(world, priced)
    if not meeting:
        return _none(label)
    return _as_change(label, rank(world, meeting)[0][0], best)


def _as_change(label: str, other: Priced, best: Priced) -> Change:
    p = other.candidate.parallelism
    return Change(
        label=label,
        degrees=f"{p.tp}x{p.spp}x{p.kvp}x{p.replicas}",
        score=score(other.world, other),
        ttft_longest_s=other.ttft_longest_s,
        tbt_full_s=other.tbt_full_s,
        differs=p != best.candidate.parallelism,
    )


def _none(label: str) -> Change:
    return Change(
        label=label, degrees="", score=0.0, ttft_longest_s=0.0, tbt_full_s=0.0, differs=True
    )

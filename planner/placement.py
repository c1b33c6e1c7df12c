"""Which device each rank runs on, and the link that each axis then gets.

Devices form levels (planner/topology_graph.py): the best connected inside a node, further groups of
the node, the node, nodes under the same leaf switches, the whole machine. An axis is at the first
level whose groups hold each of its lines; so a line's worst connection is the level's. `place`
chooses the lowest levels that leave room for all replicas, for tp first, since it exchanges most,
then kvp, then spp; tp never leaves a node. What fits in a group is thus never split.

Whether levels leave room is counted, not searched: an axis at a level fills each of its groups with
whole lines of what the axes at lower levels made, and the remainder is idle. Ranks follow each
other through the nodes, because launchers number the ranks of a node consecutively; so where kvp
leaves the node, spp, which varies more slowly, is at no lower level.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product

from planner.topology_graph import Device, node_levels, shared_link
from plans.mesh import Parallelism
from plans.plan import Placement
from plans.topology import Link, Topology

AXES = ("tp", "kvp", "spp")
"""Fastest in rank order first, and most exchange first."""
NO_LEVEL = -1
"""Of an axis of one rank."""

Line = tuple[Device, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Group:
    """Devices that a level holds together, as groups of the level below."""

    level: int
    inner: tuple["Group", ...] = ()
    device: int = 0
    """Of a single one, its place in its node."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Levels:
    """The machine as groups of groups; all nodes share the groups inside."""

    node: Group
    node_level: int
    leaves: tuple[int, ...]
    """Nodes of each group under the same leaf switches."""
    machine_level: int


@cache
def levels_of(topology: Topology) -> Levels:
    """Groups of a topology, from its graph or in closed form where it has none."""
    groups: dict[tuple[int, ...], Group] = {
        (device,): Group(level=NO_LEVEL, device=device)
        for device in range(topology.devices_per_node)
    }
    level = NO_LEVEL
    for level, parts in enumerate(node_levels(topology)):
        merged: dict[tuple[int, ...], Group] = {}
        for members in parts:
            inner = [each for key, each in groups.items() if set(key) <= set(members)]
            merged[tuple(members)] = Group(level=level, inner=tuple(inner))
        groups = merged
    (node,) = groups.values()
    network = topology.fabric.network if topology.fabric is not None else None
    per_leaf = topology.nodes if network is None else network.nodes_per_leaf
    leaves = [min(per_leaf, topology.nodes - at) for at in range(0, topology.nodes, per_leaf)]
    return Levels(
        node=node,
        node_level=level,
        leaves=tuple(leaves),
        machine_level=level + 1 + (len(leaves) > 1),
    )


def place(topology: Topology, parallelism: Parallelism) -> Placement:
    """Rank map and idle devices; the caller made sure that the groups fit."""
    levels = levels_of(topology)
    chosen = choose_levels(levels, parallelism)
    steps = _steps(chosen, parallelism)
    replicas = _machine_lines(levels, steps)[: parallelism.replicas]
    strides, stride = {}, 1
    for axis, _, size in steps:
        strides[axis] = stride
        stride *= size
    offsets = [
        spp * strides.get("spp", 0) + kvp * strides.get("kvp", 0) + tp * strides.get("tp", 0)
        for spp in range(parallelism.spp)
        for kvp in range(parallelism.kvp)
        for tp in range(parallelism.tp)
    ]
    rank_map = tuple(replica[offset] for replica in replicas for offset in offsets)
    used = set(rank_map)
    idle = tuple(
        (node, device)
        for node in range(topology.nodes)
        for device in range(topology.devices_per_node)
        if (node, device) not in used
    )
    return Placement(rank_map=rank_map, idle=idle)


def choose_levels(levels: Levels, parallelism: Parallelism) -> dict[str, int]:
    """Lowest levels, axis by axis, at which all replicas fit; NO_LEVEL for an axis of one rank.

    Raises ValueError where they fit at no levels, which planner/space.py never asks for.
    """
    for chosen in _choices(levels, parallelism):
        if _room(levels, _steps(chosen, parallelism)) >= parallelism.replicas:
            return chosen
    raise ValueError(f"{parallelism} does not fit on these nodes")


def _choices(levels: Levels, parallelism: Parallelism) -> Iterator[dict[str, int]]:
    """Levels of the axes, best first; those that would tear a node's ranks apart are left out."""
    whole = range(levels.machine_level + 1)
    several = [getattr(parallelism, axis) > 1 for axis in AXES]
    spans = [
        (range(levels.node_level + 1) if axis == "tp" else whole) if used else (NO_LEVEL,)
        for axis, used in zip(AXES, several, strict=True)
    ]
    for chosen in product(*spans):
        _, kvp, spp = chosen
        if kvp > levels.node_level and NO_LEVEL < spp < kvp:
            continue
        yield dict(zip(AXES, chosen, strict=True))


def _steps(chosen: dict[str, int], parallelism: Parallelism) -> list[tuple[str, int, int]]:
    """(axis, level, size) of the axes of several ranks, lowest level first."""
    steps = [(axis, chosen[axis], getattr(parallelism, axis)) for axis in AXES]
    return sorted((step for step in steps if step[2] > 1), key=lambda step: step[1])


def _room(levels: Levels, steps: list[tuple[str, int, int]]) -> int:
    """Replicas that fit."""

    def formed(count: int, level: int) -> int:
        for _, at, size in steps:
            if at == level:
                count //= size
        return count

    def inside(group: Group) -> int:
        count = sum(inside(each) for each in group.inner) if group.inner else 1
        return formed(count, group.level)

    node = inside(levels.node)
    if len(levels.leaves) == 1:
        return formed(node * levels.leaves[0], levels.machine_level)
    leaf_level = levels.node_level + 1
    under = {nodes: formed(node * nodes, leaf_level) for nodes in set(levels.leaves)}
    return formed(sum(under[nodes] for nodes in levels.leaves), levels.machine_level)


def _machine_lines(levels: Levels, steps: list[tuple[str, int, int]]) -> list[Line]:
    """All replicas that fit, each as its devices, axes at lower levels varying faster."""

    def formed(lines: list[Line], level: int) -> list[Line]:
        for _, at, size in steps:
            if at == level:
                whole = len(lines) // size * size
                lines = [sum(lines[row : row + size], ()) for row in range(0, whole, size)]
        return lines

    def inside(group: Group) -> list[Line]:
        if not group.inner:
            return [((0, group.device),)]
        return formed([line for each in group.inner for line in inside(each)], group.level)

    template = inside(levels.node)
    lines: list[Line] = []
    first = 0
    for nodes in levels.leaves:
        here = [
            tuple((node, device) for _, device in line)
            for node in range(first, first + nodes)
            for line in template
        ]
        first += nodes
        lines += formed(here, levels.node_level + 1) if len(levels.leaves) > 1 else here
    return formed(lines, levels.machine_level)


@lru_cache(maxsize=512)
def slowest_link(
    topology: Topology, parallelism: Parallelism, placement: Placement, axis: str
) -> Link | None:
    """The link that an axis ("tp", "kvp", "spp") gets; None where it is 1.

    The worst between neighbours, all lines of the axis at once: where a fabric makes flows share an
    edge, each gets its part of the bandwidth. What closes a ring runs against the other flows, over
    edges that carry as many of them already.
    """
    size = getattr(parallelism, axis)
    if size == 1:
        return None
    stride = {"tp": 1, "kvp": parallelism.tp, "spp": parallelism.tp * parallelism.kvp}[axis]
    map_ = placement.rank_map
    flows = [
        (device, map_[rank + stride])
        for rank, device in enumerate(map_)
        if rank // stride % size + 1 < size
    ]
    if topology.fabric is None:
        crosses = any(one[0] != other[0] for one, other in flows)
        return topology.link("cluster" if crosses else "node") or topology.link("node")
    return shared_link(topology, flows)

"""Which device each rank runs on, and which links the axes then cross.

Ranks in the order of plans/mesh.py (tp fastest, then kvp, spp, replica) fill the nodes one after
the other, a tp group never split: so the chattiest axis has the fastest link, and stages, which
exchange least, are the ones that cross nodes.
"""

from plans.mesh import Parallelism
from plans.plan import Placement
from plans.topology import Link, Topology


def place(topology: Topology, parallelism: Parallelism) -> Placement:
    """Rank map and idle devices; the caller made sure that the groups fit."""
    tp = parallelism.tp
    slots = [
        (node, first)
        for node in range(topology.nodes)
        for first in range(0, topology.devices_per_node - tp + 1, tp)
    ]
    groups = parallelism.ranks // tp
    rank_map = tuple((node, first + rank) for node, first in slots[:groups] for rank in range(tp))
    used = set(rank_map)
    idle = tuple(
        (node, device)
        for node in range(topology.nodes)
        for device in range(topology.devices_per_node)
        if (node, device) not in used
    )
    return Placement(rank_map=rank_map, idle=idle)


def slowest_link(
    topology: Topology, parallelism: Parallelism, placement: Placement, axis: str
) -> Link | None:
    """The slowest link that neighbours on an axis ("tp", "kvp", "spp") use; None where it is 1."""
    size = {"tp": parallelism.tp, "kvp": parallelism.kvp, "spp": parallelism.spp}[axis]
    if size == 1:
        return None
    stride = {"tp": 1, "kvp": parallelism.tp, "spp": parallelism.tp * parallelism.kvp}[axis]
    crosses = False
    for rank, (node, _) in enumerate(placement.rank_map):
        first = rank - rank // stride % size * stride  # the axis's first rank, in the same line
        crosses = crosses or placement.rank_map[first][0] != node
    return topology.link("cluster" if crosses else "node") or topology.link("node")

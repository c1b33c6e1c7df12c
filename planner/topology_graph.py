"""The machine as a networkx graph, and which connection limits a flow between two devices.

Vertices are names: `n0/gpu3`, `n0/switch`, `n0/nic0`, `leaf0.3` (of the first group of nodes, rail
3), `spine`. An edge has the `link` it is made of and `lanes`, how many flows it carries at the
link's full bandwidth. `links` of a topology without fabric become one switch in each node and one
port a device; nothing needs that graph for planning, whose closed form is in planner/placement.py.

A flow takes the way whose worst edge is best (most bandwidth, then least latency), and among those
the shortest; its link is that worst edge. Every part passes flows on, devices too, as NCCL does
over NVLink and rails. All nodes are alike, so what connects two devices depends on their places in
their nodes and on whether the nodes are one, under the same leaf switches, or apart: a graph of
three nodes (`coarse_nodes`) stands for any number.
"""

from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import islice, pairwise
from typing import TYPE_CHECKING

from msgspec import structs

from plans.topology import Fabric, Link, Network, Part, Topology, Wires, gpu

if TYPE_CHECKING:
    import networkx as nx

Device = tuple[int, int]
"""(node, device) as in a placement."""
Quality = tuple[float, float]
"""(bandwidth reached, -latency); more is better."""
Edge = tuple[str, str]
Places = tuple[tuple[int, int], ...]
"""Flows between two nodes, each as the devices' places in them."""
Sharers = tuple[tuple[int, str, int], ...]
"""Flows that meet in a node or at leaf switches: bundle, owner of the edges, and how many such."""

OWNERS = ("first", "second", "first leaves", "second leaves")
"""Of an edge on the way from a first node to a second."""
MOST_WAYS = 64
"""Equally short ways that are looked at for the least loaded one."""


def quality(link: Link) -> Quality:
    """How good a link is, for comparisons."""
    return link.bandwidth_bytes_per_s * link.efficiency, -link.latency_s


def graph_of(topology: Topology, nodes: Iterable[int] | None = None) -> "nx.Graph[str]":
    """The graph of all nodes, or of some; edges carry `link` and `lanes`."""
    import networkx as nx

    fabric = fabric_of(topology)
    devices = topology.devices_per_node
    graph: nx.Graph[str] = nx.Graph()
    wanted = range(topology.nodes) if nodes is None else nodes
    for node in wanted:
        graph.add_nodes_from((_name(node, gpu(index)), {"kind": "gpu"}) for index in range(devices))
        graph.add_nodes_from((_name(node, part.name), {"kind": part.kind}) for part in fabric.parts)
        for wires in fabric.wires:
            for one, other in wires.joins:
                ends = _name(node, one), _name(node, other)
                graph.add_edge(*ends, link=wires.link, lanes=1)
        if fabric.network is not None and topology.nodes > 1:
            _add_ports(graph, fabric, fabric.network, node, topology.nodes)
    return graph


def _add_ports(
    graph: "nx.Graph[str]", fabric: Fabric, network: Network, node: int, nodes: int
) -> None:
    """Joins the ports of a node to their leaf switches, and those to the spine."""
    group = node // network.nodes_per_leaf
    members = min(network.nodes_per_leaf, nodes - group * network.nodes_per_leaf)
    ports = len(fabric.ports)
    for rail, port in enumerate(fabric.ports):
        leaf = f"leaf{group}.{rail if network.rails else 0}"
        graph.add_node(leaf, kind="leaf")
        graph.add_edge(_name(node, port), leaf, link=network.leaf, lanes=1)
        if network.spine is not None and (network.rails or nodes > network.nodes_per_leaf):
            graph.add_node("spine", kind="spine")
            lanes = members * (1 if network.rails else ports)
            graph.add_edge(leaf, "spine", link=network.spine, lanes=lanes)


def fabric_of(topology: Topology) -> Fabric:
    """The topology's fabric; where it has only links, one switch a node and one port a device."""
    if topology.fabric is not None:
        return topology.fabric
    devices = range(topology.devices_per_node)
    parts: list[Part] = []
    wires: list[Wires] = []
    network = None
    if (inside := topology.link("node")) is not None:
        parts.append(Part(name="switch", kind="nvlink-switch"))
        wires.append(Wires(link=inside, joins=tuple((gpu(each), "switch") for each in devices)))
    if (between := topology.link("cluster")) is not None:
        parts += [Part(name=f"nic{each}", kind="nic") for each in devices]
        ports = tuple((gpu(each), f"nic{each}") for each in devices)
        wires.append(Wires(link=structs.replace(between, scope="node"), joins=ports))
        network = Network(nodes_per_leaf=topology.nodes, rails=False, leaf=between)
    return Fabric(parts=tuple(parts), wires=tuple(wires), network=network)


def node_levels(topology: Topology) -> list[list[list[int]]]:
    """Devices of one node in groups, the best connected first, up to the whole node.

    Two devices share a group of a level where some way inside the node joins them of which every
    edge is at least as good as the level's; levels that part the devices as the one before are
    left out.
    """
    import networkx as nx

    devices = topology.devices_per_node
    if topology.fabric is None or devices == 1:
        return [[list(range(devices))]]
    graph = graph_of(topology, [0])
    graph.remove_nodes_from([name for name in graph if "/" not in name])  # leaf and spine
    place = {_name(0, gpu(index)): index for index in range(devices)}
    levels: list[list[list[int]]] = []
    for least in qualities(graph):
        part = _at_least(graph, least)
        part.add_nodes_from(place)
        components = nx.connected_components(part)
        groups = sorted(
            sorted(place[name] for name in component if name in place)
            for component in components
            if not component.isdisjoint(place)
        )
        if (not levels or groups != levels[-1]) and len(groups) < devices:
            levels.append(groups)
    return levels


def qualities(graph: "nx.Graph[str]") -> list[Quality]:
    """Different qualities of the edges, best first."""
    return sorted({quality(data["link"]) for _, _, data in graph.edges.data()}, reverse=True)


def _at_least(graph: "nx.Graph[str]", least: Quality) -> "nx.Graph[str]":
    """The edges that are at least so good, and what they join."""
    import networkx as nx

    kept: nx.Graph[str] = nx.Graph()
    for one, other, data in graph.edges.data():
        if quality(data["link"]) >= least:
            kept.add_edge(one, other)
    return kept


def coarse_nodes(topology: Topology) -> list[int]:
    """A node, one under the same leaf switches and one apart, as far as there are such."""
    network = topology.fabric.network if topology.fabric is not None else None
    apart = topology.nodes if network is None else network.nodes_per_leaf
    return sorted({0, *(node for node in (1, apart) if node < topology.nodes)})


class Ways:
    """Ways between devices of a topology with a fabric, found once for each pair of places.

    Named after the coarse graph: from node 0 to the node that stands for the other's relation.
    """

    def __init__(self, topology: Topology) -> None:
        """Builds the coarse graph."""
        self._graph = graph_of(topology, coarse_nodes(topology))
        network = topology.fabric.network if topology.fabric is not None else None
        self._per_leaf = topology.nodes if network is None else network.nodes_per_leaf
        self._nodes = topology.nodes
        self._ways: dict[tuple[int, int, int], tuple[tuple[Edge, ...], ...]] = {}
        self._numbers: dict[tuple[Places, int], int] = {}
        self._loads: list[dict[str, list[tuple[Edge, int]]]] = []

    def stand_in(self, one: int, other: int) -> int:
        """The node of the coarse graph that is to node 0 what one node is to the other."""
        if one == other:
            return 0
        return 1 if self.group(one) == self.group(other) else self._per_leaf

    def group(self, node: int) -> int:
        """Number of a node's group under the same leaf switches."""
        return node // self._per_leaf

    def members(self, group: int) -> int:
        """Nodes of a group."""
        return min(self._per_leaf, self._nodes - group * self._per_leaf)

    def of(self, one: int, other: int, there: int) -> tuple[tuple[Edge, ...], ...]:
        """Best ways as directed edges, in a fixed order, between places in node 0 and `there`."""
        key = (one, other, there)
        if key not in self._ways:
            found = self._shortest((0, one), (there, other))
            self._ways[key] = tuple(tuple(pairwise(way)) for way in found)
        return self._ways[key]

    def bundle(self, places: Places, there: int) -> int:
        """Number of the flows between two nodes, by which their loads are found."""
        key = (places, there)
        if key not in self._numbers:
            self._numbers[key] = len(self._loads)
            self._loads.append(self._load(places, there))
        return self._numbers[key]

    def loads(self, bundle: int) -> dict[str, list[tuple[Edge, int]]]:
        """Flows on each edge where all flows of a bundle run at once, by whose edge it is.

        Each flow, in the order given, takes the least loaded of its equally good ways. Edges are
        named as those of the first node and its leaf switches.
        """
        return self._loads[bundle]

    def _load(self, places: Places, there: int) -> dict[str, list[tuple[Edge, int]]]:
        load: Counter[Edge] = Counter()
        for one, other in places:
            ways = self.of(one, other, there)
            load.update(min(ways, key=lambda way: max(load[edge] for edge in way)))
        found: dict[str, list[tuple[Edge, int]]] = {owner: [] for owner in OWNERS}
        for edge, flows in load.items():
            found[_owner(edge)].append(((_in_first(edge[0]), _in_first(edge[1])), flows))
        return found

    def link(self, edge: Edge, flows: int, group: int = 0) -> Link:
        """What each of so many flows gets of an edge of node 0, or of a group's leaf switches."""
        data = self._graph.edges[edge[0], edge[1]]
        link: Link = data["link"]
        lanes: int = data["lanes"]
        if "spine" in edge:
            lanes = lanes * self.members(group) // self.members(0)
        if flows <= lanes:
            return link
        share = link.bandwidth_bytes_per_s * lanes / flows
        return structs.replace(link, bandwidth_bytes_per_s=share)

    def _shortest(self, one: Device, other: Device) -> Iterable[tuple[str, ...]]:
        """Shortest ways among those whose worst edge is best, through no third node."""
        import networkx as nx

        start, end = _name(one[0], gpu(one[1])), _name(other[0], gpu(other[1]))
        inside = {f"n{one[0]}", f"n{other[0]}"}
        part = self._graph.subgraph(
            name
            for name in self._graph
            if (name.partition("/")[0] in inside if "/" in name else len(inside) > 1)
        )
        for least in qualities(part):
            kept = _at_least(part, least)
            if start in kept and end in kept and nx.has_path(kept, start, end):
                break
        behind = nx.single_source_shortest_path_length(kept, end)
        near = {name: sorted(kept[name]) for name in kept}
        return islice(_descents(near, behind, (start,)), MOST_WAYS)


def _owner(edge: Edge) -> str:
    """Which of OWNERS an edge of the coarse graph belongs to."""
    if "spine" in edge:
        first = any(name.startswith("leaf0.") for name in edge)
        return "first leaves" if first else "second leaves"
    return "first" if any(name.startswith("n0/") for name in edge) else "second"


def _in_first(name: str) -> str:
    """A vertex's stand-in in the first node and group."""
    if name.startswith("leaf"):
        return f"leaf0.{name.partition('.')[2]}"
    return name if name == "spine" else f"n0/{name.partition('/')[2]}"


def _descents(
    near: dict[str, list[str]], behind: dict[str, int], way: tuple[str, ...]
) -> Iterable[tuple[str, ...]]:
    """Ways that lose one step with each edge."""
    steps = behind[way[-1]]
    if steps == 0:
        yield way
    for each in near[way[-1]]:
        if behind.get(each) == steps - 1:
            yield from _descents(near, behind, (*way, each))


@cache
def ways_of(topology: Topology) -> Ways:
    """Ways of a topology, which many candidates ask for."""
    return Ways(topology)


def shared_link(topology: Topology, flows: Iterable[tuple[Device, Device]]) -> Link | None:
    """The worst link that flows at the same time get, its bandwidth divided where they share it.

    Nodes whose flows are alike are looked at once.
    """
    ways = ways_of(topology)
    between: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for one, other in flows:
        between.setdefault((one[0], other[0]), []).append((one[1], other[1]))
    at_node: dict[int, list[tuple[int, str, int]]] = {}
    at_group: dict[int, Counter[tuple[int, str]]] = {}
    for (first, second), places in between.items():
        there = ways.stand_in(first, second)
        bundle = ways.bundle(tuple(places), there)
        at_node.setdefault(first, []).append((bundle, "first", 1))
        if there:
            at_node.setdefault(second, []).append((bundle, "second", 1))
            at_group.setdefault(ways.group(first), Counter())[bundle, "first leaves"] += 1
            at_group.setdefault(ways.group(second), Counter())[bundle, "second leaves"] += 1
    alike: set[tuple[int, Sharers]] = {(0, tuple(found)) for found in at_node.values()}
    for group, found in at_group.items():
        alike.add((group, tuple((*each, times) for each, times in sorted(found.items()))))
    links = [link for group, sharers in sorted(alike) for link in _shares(ways, group, sharers)]
    return min(links, key=lambda each: (*quality(each), each.kind, each.source), default=None)


def _shares(ways: Ways, group: int, sharers: Sharers) -> Iterable[Link]:
    """What flows that meet get of each edge that they use."""
    load: Counter[Edge] = Counter()
    for bundle, owner, times in sharers:
        for edge, flows in ways.loads(bundle)[owner]:
            load[edge] += flows * times
    for edge, flows in sorted(load.items()):
        yield ways.link(edge, flows, group)


def _name(node: int, part: str) -> str:
    return f"n{node}/{part}"

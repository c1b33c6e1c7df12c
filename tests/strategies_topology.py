"""Hypothesis strategies for machines small enough to check every way and every placement."""

from itertools import product
from typing import Any

from hypothesis import strategies as st

from planner.topology_graph import Device, Quality, quality
from plans.topology import Fabric, Link, Network, Part, Topology, Wires, gpu

SPEEDS = (1e9, 2e9, 4e9, 8e9)


def link(speed: float, *, scope: str = "node", latency_s: float = 1e-5) -> Link:
    """A link in round figures."""
    return Link(
        kind="pcie" if scope == "node" else "infiniband",
        scope=scope,  # type: ignore[arg-type]
        bandwidth_bytes_per_s=speed,
        efficiency=0.5,
        latency_s=latency_s,
        source="made up",
    )


@st.composite
def links(draw: st.DrawFn, scope: str = "node") -> Link:
    return link(
        draw(st.sampled_from(SPEEDS)),
        scope=scope,
        latency_s=draw(st.sampled_from((1e-5, 2e-5))),
    )


@st.composite
def machines(
    draw: st.DrawFn, *, layouts: tuple[tuple[int, int], ...], is_tree: bool = False
) -> Topology:
    """A connected random graph a node: a tree of devices and parts, and some wires more.

    layouts  (nodes, devices_per_node) to choose from
    is_tree  one way between any two devices: one port, one network, no further wires
    """
    nodes, devices = draw(st.sampled_from(layouts))
    switches = [f"switch{each}" for each in range(draw(st.integers(1, 2)))]
    ports = [f"nic{each}" for each in range(1 if is_tree else draw(st.integers(1, 2)))]
    names = [*switches, *(gpu(each) for each in range(devices)), *ports]
    joins = {
        frozenset((name, names[draw(st.integers(0, place - 1))]))
        for place, name in enumerate(names)
        if place
    }
    pairs = st.lists(st.sampled_from(names), min_size=2, max_size=2, unique=True).map(frozenset)
    joins |= draw(st.sets(pairs, max_size=0 if is_tree else 4))
    wires = tuple(
        Wires(link=draw(links()), joins=(tuple(sorted(ends)),))  # type: ignore[arg-type]
        for ends in sorted(joins, key=sorted)
    )
    network = None
    if nodes > 1:
        network = Network(
            nodes_per_leaf=draw(st.integers(1, nodes)),
            rails=draw(st.booleans()),
            leaf=draw(links("cluster")),
            spine=draw(links("cluster")),
        )
    parts = [Part(name=name, kind="pcie-switch") for name in switches]
    parts += [Part(name=name, kind="nic") for name in ports]
    return Topology(
        device="tiny-gpu",
        device_memory_bytes=1 << 26,
        nodes=nodes,
        devices_per_node=devices,
        links=(),
        fabric=Fabric(parts=tuple(parts), wires=wires, network=network),
    )


def widest(graph: Any, start: str, end: str) -> Quality:
    """Best worst edge between two vertices, by closing every vertex in turn (Floyd, Warshall)."""
    best: dict[tuple[str, str], Quality] = {}
    for one, other, data in graph.edges.data():
        best[one, other] = best[other, one] = quality(data["link"])
    for middle, one, other in product(graph, graph, graph):
        if (one, middle) in best and (middle, other) in best:
            way = min(best[one, middle], best[middle, other])
            best[one, other] = max(best.get((one, other), way), way)
    return best[start, end]


def name(device: Device) -> str:
    """Vertex of a device."""
    return f"n{device[0]}/{gpu(device[1])}"

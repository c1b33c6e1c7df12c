"""What the hardware is: devices, links, and how many of each.

The planner's catalog holds one YAML for each device and each node type; a plan carries the topology
it was made for, so that the runtime can refuse a machine of another shape.

A node whose devices are all joined alike needs `links` only. Any other one has a `fabric`: the
graph of its parts and wires, and the network between the nodes.
"""

import difflib
from collections.abc import Iterator
from typing import Annotated, Literal

from msgspec import Meta, Struct

from plans.model import Count

Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(gt=0, le=1)]


class Device(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One accelerator, or one CPU taken as one: datasheet limits and the shares kernels reach."""

    name: str
    aliases: tuple[str, ...] = ()
    kind: Literal["cpu", "cuda"]
    compute_capability: str | None = None
    """Such as "9.0"; None on a CPU."""
    memory_bytes: Count
    memory_bandwidth_bytes_per_s: Positive
    peak_flops_per_s: dict[str, float]
    """Dense peak by dtype name."""
    gemm_efficiency: Share
    """Share of the peak that large matrix products reach."""
    attention_efficiency: Share
    """Share of the peak that chunk attention reaches."""
    memory_efficiency: Share
    """Share of the bandwidth that streaming kernels reach."""
    step_overhead_s: Positive
    """Host and launch time of one step of one stage, whatever is in it."""
    reserved_bytes: Annotated[int, Meta(ge=0)]
    """Memory that is never the engine's: context, graphs, communicators, fragmentation."""
    default_node: str
    """Node type of the catalog used when no topology is named."""
    sources: dict[str, str]
    """Where each figure comes from: field name to a public source, or how it was measured."""


class Link(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What connects devices, in one direction, as one device sees it."""

    kind: Literal["infiniband", "ethernet", "nvlink", "pcie", "shared-memory", "socket"]
    """`socket` joins the CPUs of one node."""
    scope: Literal["node", "cluster"]
    """`node` joins the devices of one node; `cluster` joins nodes."""
    bandwidth_bytes_per_s: Positive
    """Per device and direction; datasheet."""
    efficiency: Share
    """Share of the bandwidth that large transfers reach."""
    latency_s: Positive
    """Time of a small collective or message."""
    source: str
    """Public source of the figures, or how they were measured."""


class Part(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something in a node that wires end at, besides its devices."""

    name: str
    kind: Literal["cpu", "nic", "nvlink-switch", "pcie-switch"]


class Wires(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Connections of one kind inside a node; each has the whole bandwidth of the link."""

    link: Link
    joins: tuple[tuple[str, str], ...]
    """Pairs of names: parts, and devices, which are called gpu0, gpu1, ..."""


class Network(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What joins the network ports (parts of kind nic) of all nodes."""

    nodes_per_leaf: Count
    """Nodes whose ports share leaf switches."""
    rails: bool
    """Port i of each node goes to leaf switch i; else all ports of a node go to one leaf switch."""
    leaf: Link
    """From a port to its leaf switch."""
    spine: Link | None = None
    """From a leaf switch to the spine, as a share for each port that the leaf switch serves."""


class Fabric(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The graph of one node, and the network between the nodes."""

    parts: tuple[Part, ...] = ()
    wires: tuple[Wires, ...]
    network: Network | None = None

    @property
    def ports(self) -> tuple[str, ...]:
        """Names of the network ports; the place of one is its rail."""
        return tuple(part.name for part in self.parts if part.kind == "nic")


class NodeType(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A kind of node in the catalog, or a user's topology file (which also names `nodes`)."""

    name: str
    device: str
    devices_per_node: Count
    nodes: Count | None = None
    """How many there are; None in the catalog, where the GPUs asked for decide."""
    links: tuple[Link, ...] = ()
    """One of each scope, where all devices of a node are joined alike."""
    fabric: Fabric | None = None
    """The graph, where they are not."""


class Topology(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The machine that a plan is for."""

    device: str
    """Name of the device in the catalog."""
    device_memory_bytes: Count
    """Memory of one device; the checks need it and the runtime has no catalog."""
    nodes: Count
    devices_per_node: Count
    links: tuple[Link, ...]
    fabric: Fabric | None = None
    """Where devices are not all joined alike; `links` is empty then."""

    @property
    def devices(self) -> int:
        """Devices of all nodes."""
        return self.nodes * self.devices_per_node

    def link(self, scope: str) -> Link | None:
        """The link of a scope, or None where a single device or node has none."""
        return next((link for link in self.links if link.scope == scope), None)


def gpu(index: int) -> str:
    """Name of a device of a node in a fabric."""
    return f"gpu{index}"


def fabric_problems(fabric: Fabric, devices: int, nodes: int) -> Iterator[tuple[str, str]]:
    """(path, message) for each rule that a fabric breaks on so many nodes of so many devices."""
    names = [gpu(index) for index in range(devices)]
    for row, part in enumerate(fabric.parts):
        if part.name in names:
            yield f"fabric.parts[{row}].name", f"{part.name!r} stands twice, names are unique"
        names.append(part.name)
    yield from _wire_problems(fabric, names)
    if nodes > 1:
        yield from _network_problems(fabric, nodes)


def _wire_problems(fabric: Fabric, names: list[str]) -> Iterator[tuple[str, str]]:
    """Wires that end nowhere or twice at the same parts, and what they leave apart."""
    near: dict[str, set[str]] = {name: set() for name in names}
    for row, wires in enumerate(fabric.wires):
        if wires.link.scope != "node":
            yield f"fabric.wires[{row}].link.scope", "is cluster; wires of a fabric are in one node"
        for column, (one, other) in enumerate(wires.joins):
            path = f"fabric.wires[{row}].joins[{column}]"
            if unknown := [name for name in (one, other) if name not in near]:
                close = difflib.get_close_matches(unknown[0], names, n=3, cutoff=0.4)
                hint = ", ".join(close or names[:1])
                yield path, f"unknown part {unknown[0]!r}; nearest: {hint}"
            elif one == other:
                yield path, f"joins {one!r} to itself"
            elif other in near[one]:
                yield path, f"{one!r} and {other!r} are joined twice; add the bandwidths up"
            else:
                near[one].add(other)
                near[other].add(one)
    reached = _reached(near, names[0])
    if lost := [name for name in names if name not in reached]:
        yield (
            "fabric.wires",
            (
                f"the graph is not connected: {', '.join(lost)} cannot be reached from {names[0]}; "
                "wires must lead there"
            ),
        )


def _network_problems(fabric: Fabric, nodes: int) -> Iterator[tuple[str, str]]:
    """What keeps so many nodes from reaching each other."""
    network = fabric.network
    if network is None:
        yield "fabric.network", f"is missing, and {nodes} nodes need one"
        return
    if not fabric.ports:
        yield "fabric.parts", f"none is of kind nic, and {nodes} nodes need network ports"
    if network.spine is None and nodes > network.nodes_per_leaf:
        yield (
            "fabric.network.spine",
            (
                f"is missing: {nodes} nodes exceed nodes_per_leaf {network.nodes_per_leaf}, and "
                "leaf switches do not reach each other"
            ),
        )
    for path, link in (("leaf", network.leaf), ("spine", network.spine)):
        if link is not None and link.scope != "cluster":
            yield f"fabric.network.{path}.scope", "is node; the network's links join nodes"


def _reached(near: dict[str, set[str]], start: str) -> set[str]:
    """Names that can be reached from one of them."""
    seen, todo = {start}, [start]
    while todo:
        fresh = near[todo.pop()] - seen
        seen |= fresh
        todo += sorted(fresh)
    return seen

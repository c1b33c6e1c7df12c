"""What the hardware is: devices, links, and how many of each.

The planner's catalog holds one YAML for each device and each node type; a plan carries the topology
it was made for, so that the runtime can refuse a machine of another shape.
"""

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

    kind: Literal["infiniband", "ethernet", "nvlink", "pcie", "shared-memory"]
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


class NodeType(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A kind of node in the catalog, or a user's topology file (which also names `nodes`)."""

    name: str
    device: str
    devices_per_node: Count
    nodes: Count | None = None
    """How many there are; None in the catalog, where the GPUs asked for decide."""
    links: tuple[Link, ...]


class Topology(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The machine that a plan is for."""

    device: str
    """Name of the device in the catalog."""
    device_memory_bytes: Count
    """Memory of one device; the checks need it and the runtime has no catalog."""
    nodes: Count
    devices_per_node: Count
    links: tuple[Link, ...]

    @property
    def devices(self) -> int:
        """Devices of all nodes."""
        return self.nodes * self.devices_per_node

    def link(self, scope: str) -> Link | None:
        """The link of a scope, or None where a single device or node has none."""
        return next((link for link in self.links if link.scope == scope), None)

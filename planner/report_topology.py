"""Where the groups run, drawn: a node with its wires and groups, and the mesh of a replica.

Up to four nodes are drawn each; of more, one of each kind with how many there are. A hue stands for
the stage, or where there is one stage for the KVP group, or where there is one of those too for the
replica.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from planner.explain import Table
from planner.placement import slowest_link
from planner.report_page import Figure, Key
from planner.report_svg import FONT, WIDTH, Drawing, Point, text_width
from planner.space import gpus_text
from planner.topology_graph import fabric_of
from plans.mesh import Coordinates, coordinates
from plans.plan import Plan
from plans.topology import Fabric, Link, gpu

MOST_NODES = 4
MOST_ROWS = 24
"""Rows of the mesh: KVP groups of so many replicas as fit."""
HUES = 8
A_ROW = 8
"""Devices of a node drawn side by side."""
LINKS = {
    "nvlink": ("s3", "NVLink"),
    "pcie": ("s0", "PCIe"),
    "infiniband": ("s6", "InfiniBand"),
    "ethernet": ("s5", "Ethernet"),
    "socket": ("s0", "CPU link"),
    "shared-memory": ("s0", "shared memory"),
}
PART_NAMES = {"nvlink-switch": "switch"}
Seats = tuple[Coordinates | None, ...]
"""What each device of a node runs; None is idle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """Nodes whose devices are grouped alike."""

    nodes: tuple[int, ...]
    seats: Seats
    """Of the first of them."""


def seats_of(plan: Plan) -> list[Seats]:
    """What each device of each node runs."""
    topology = plan.topology
    table: list[list[Coordinates | None]] = [
        [None] * topology.devices_per_node for _ in range(topology.nodes)
    ]
    for rank, (node, device) in enumerate(plan.placement.rank_map):
        table[node][device] = coordinates(plan.parallelism, rank)
    return [tuple(row) for row in table]


def kinds_of(plan: Plan) -> list[Kind]:
    """Nodes to draw: each of a few, or one of each kind."""
    seats = seats_of(plan)
    if len(seats) <= MOST_NODES:
        return [Kind(nodes=(node,), seats=row) for node, row in enumerate(seats)]
    alike: dict[tuple[int, ...], list[int]] = {}
    for node, row in enumerate(seats):
        alike.setdefault(_pattern(row), []).append(node)
    return [Kind(nodes=tuple(nodes), seats=seats[nodes[0]]) for nodes in alike.values()]


def _pattern(row: Seats) -> tuple[int, ...]:
    """Groups of a node by order of appearance; -1 is idle."""
    seen: dict[tuple[int, int, int], int] = {}
    return tuple(-1 if one is None else seen.setdefault(_group(one), len(seen)) for one in row)


def _group(one: Coordinates) -> tuple[int, int, int]:
    """The tp group that a rank belongs to."""
    return one.replica, one.stage, one.group


def hue(plan: Plan, one: Coordinates) -> int:
    """Number of a colour class, from 1 on."""
    p = plan.parallelism
    number = one.stage if p.spp > 1 else one.group if p.kvp > 1 else one.replica
    return number % HUES + 1


def hue_words(plan: Plan) -> str:
    """What the hues stand for."""
    p = plan.parallelism
    return "stage" if p.spp > 1 else "KVP group" if p.kvp > 1 else "replica"


def topology_figure(plan: Plan) -> Figure:
    """Nodes with their wires, and the mesh."""
    kinds = kinds_of(plan)
    nodes = tuple(_node(plan, kind, index) for index, kind in enumerate(kinds))
    p = plan.parallelism
    links = _links(plan)
    gets = "; ".join(f"{axis} over {_link_text(link)}" for axis, _, link in links if link)
    used = {link.kind for link in _all_links(plan)}
    return Figure(
        name="figure-topology",
        heading="Where the groups run",
        lead=(
            f"{gpus_text(plan.topology.devices)} on {plan.topology.nodes} node"
            f"{'s'[: plan.topology.nodes > 1]}"
            f" of {plan.topology.devices_per_node}. {gets or 'One device needs no link'}."
            f" A colour is a {hue_words(plan)}; a frame is a tp group of {p.tp}."
        ),
        drawings=(*nodes, _mesh(plan)),
        keys=tuple(
            Key(sign="line", look=f"wire {look}", text=name)
            for kind, (look, name) in LINKS.items()
            if kind in used
        ),
        table=Table(
            columns=("axis", "size", "slowest link it gets"),
            rows=tuple(
                (axis, str(size), _link_text(link) if link else "none needed")
                for axis, size, link in links
            ),
        ),
    )


def _links(plan: Plan) -> list[tuple[str, int, Link | None]]:
    return [
        (
            axis,
            getattr(plan.parallelism, axis),
            slowest_link(plan.topology, plan.parallelism, plan.placement, axis),
        )
        for axis in ("tp", "kvp", "spp")
    ]


def _all_links(plan: Plan) -> Iterator[Link]:
    fabric = fabric_of(plan.topology)
    for wires in fabric.wires:
        yield wires.link
    if plan.topology.nodes > 1 and fabric.network is not None:
        yield fabric.network.leaf


def _link_text(link: Link) -> str:
    rate = f"{link.bandwidth_bytes_per_s / 1e9:.3g} GB/s"
    return f"{LINKS[link.kind][1]}, {rate} each way, {link.latency_s * 1e6:.3g} µs"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Where the parts of a node stand."""

    places: dict[str, Point]
    """Centres by name."""
    bars: dict[str, tuple[float, float, float, float]]
    """Boxes of parts that are not devices."""
    height: float


def _layout(plan: Plan, top: float) -> _Layout:
    """Network ports above, what joins them to the devices below those, switches at the bottom."""
    fabric = fabric_of(plan.topology)
    devices = plan.topology.devices_per_node
    rows = -(-devices // A_ROW)
    across = min(devices, A_ROW)
    pitch = (WIDTH - 24) / max(across, 4)
    start = WIDTH / 2 - pitch * (across - 1) / 2
    places: dict[str, Point] = {}
    bars = {}
    y = top
    above = [kind for kind in ("cpu", "nic", "pcie-switch") if _parts(fabric, kind)]
    if plan.topology.nodes == 1 and "nic" in above:
        above.remove("nic")
    for kind in above:
        names = _parts(fabric, kind)
        width = (WIDTH - 24) / len(names)
        for index, name in enumerate(names):
            left = 12 + width * index
            bars[name] = (left + 4, y, left + width - 4, y + 18)
            places[name] = (left + width / 2, y + 9)
        y += 44
    y += 18  # the names of groups
    for index in range(devices):
        row, column = divmod(index, A_ROW)
        places[gpu(index)] = (start + pitch * column, y + 20 + 66 * row)
    y += 66 * rows
    below = _parts(fabric, "nvlink-switch")
    width = (WIDTH - 24) / max(len(below), 1)
    for index, name in enumerate(below):
        left = 12 + width * index
        bars[name] = (left + 4, y, left + width - 4, y + 18)
        places[name] = (left + width / 2, y + 9)
    bridges = any(gpu(0) in pair and "gpu" in pair[1] for w in fabric.wires for pair in w.joins)
    return _Layout(places=places, bars=bars, height=y + (26 if below or bridges else 0))


def _parts(fabric: Fabric, kind: str) -> list[str]:
    return [part.name for part in fabric.parts if part.kind == kind]


def _node(plan: Plan, kind: Kind, index: int) -> str:
    """One node."""
    names = ", ".join(str(node) for node in kind.nodes[:3])
    count = len(kind.nodes)
    if count == 1:
        title = f"node {names}"
    elif not any(kind.seats):
        title = f"{count} idle nodes: {names}{', ...' if count > 3 else ''}"
    else:
        title = f"{count} nodes grouped so: {names}{', ...' if count > 3 else ''}"
    several = plan.topology.nodes > 1
    top = 70.0 if several else 30.0
    layout = _layout(plan, top)
    drawing = Drawing(
        name=f"chart-node-{index}",
        width=WIDTH,
        height=layout.height + 6,
        title=title,
        description="; ".join(
            f"GPU {device}: {_seat_words(seat)}" for device, seat in enumerate(kind.seats)
        ),
    )
    drawing.text(2, 15, title, class_="strong")
    if several:
        _network(drawing, plan, layout)
    for wires in fabric_of(plan.topology).wires:
        look = f"wire {LINKS[wires.link.kind][0]}"
        for one, other in wires.joins:
            if one in layout.places and other in layout.places:
                _wire(drawing, layout, (one, other), look=look, tip=_link_text(wires.link))
    for name, box in layout.bars.items():
        drawing.rect(box, rx=4, class_="part", tip=name)
        text = name if text_width(name, 11) < box[2] - box[0] - 4 else ""
        middle = (box[0] + box[2]) / 2
        drawing.text(middle, box[1] + 13, text, class_="small tick", text_anchor="middle")
    _devices(drawing, plan, kind, layout)
    return drawing.svg()


def _network(drawing: Drawing, plan: Plan, layout: _Layout) -> None:
    """The bar above that joins the nodes, and lines to the ports of this one."""
    fabric = fabric_of(plan.topology)
    network = fabric.network
    if network is None:
        return
    look = f"wire {LINKS[network.leaf.kind][0]}"
    for port in fabric.ports:
        if port in layout.places:
            x, y = layout.places[port]
            drawing.line((x, 44), (x, y - 9), class_=look, tip=_link_text(network.leaf))
    drawing.rect((12, 26, WIDTH - 12, 46), rx=4, class_="part")
    rails = " on rails" if network.rails else ""
    text = f"to other nodes: {_link_text(network.leaf)}{rails}"
    drawing.text(WIDTH / 2, 40, text, class_="small", text_anchor="middle")


def _wire(drawing: Drawing, layout: _Layout, pair: tuple[str, str], *, look: str, tip: str) -> None:
    one, other = pair
    (x1, y1), (x2, y2) = layout.places[one], layout.places[other]
    ends = f"{one} {other}"
    if one not in layout.bars and other not in layout.bars:  # a bridge between two devices
        low = max(y1, y2) + 20
        drop = low + 10 + 3 * (abs(x2 - x1) > WIDTH / 5)
        drawing.path(
            [(x1, low), (x1, drop), (x2, drop), (x2, low)], class_=look, tip=tip, data_wire=ends
        )
        return
    if one in layout.bars and other not in layout.bars:
        (x1, y1), (x2, y2), one, other = (x2, y2), (x1, y1), other, one
    if other in layout.bars:  # straight up or down where the part is that wide
        left, _, right, _ = layout.bars[other]
        x2 = min(max(x1, left + 6), right - 6)
    drawing.line((x1, y1), (x2, y2), class_=look, tip=tip, data_wire=ends)


def _devices(drawing: Drawing, plan: Plan, kind: Kind, layout: _Layout) -> None:
    """Frames of the tp groups, then the devices in them."""
    exact = len(kind.nodes) == 1
    members: dict[tuple[int, int, int], list[int]] = {}
    for device, seat in enumerate(kind.seats):
        if seat is not None:
            members.setdefault(_group(seat), []).append(device)
    for group, devices in members.items():
        _frame(drawing, plan, group, devices, layout, exact=exact)
    for device, seat in enumerate(kind.seats):
        x, y = layout.places[gpu(device)]
        look = "free" if seat is None else f"f{hue(plan, seat) if exact else 0} veil"
        drawing.rect((x - 19, y - 19, x + 19, y + 19), rx=5, class_="hollow s0")
        drawing.rect(
            (x - 19, y - 19, x + 19, y + 19),
            rx=5,
            class_=look,
            tip=f"GPU {device}: {_seat_words(seat)}",
            data_device=device,
        )
        drawing.text(x, y - 2, f"{device}", class_="strong", text_anchor="middle")
        small = "idle" if seat is None else f"tp {seat.tp}"
        drawing.text(x, y + 13, small, class_="small tick", text_anchor="middle")


def _frame(
    drawing: Drawing,
    plan: Plan,
    group: tuple[int, int, int],
    devices: list[int],
    layout: _Layout,
    *,
    exact: bool,
) -> None:
    """A frame around a group's devices in each row of the picture, its name on the first."""
    words = _group_words(plan, group) if exact else "one tp group"
    alone = plan.parallelism.ranks == plan.parallelism.tp
    rows: dict[float, list[float]] = {}
    for device in devices:
        x, y = layout.places[gpu(device)]
        rows.setdefault(y, []).append(x)
    for index, (y, xs) in enumerate(rows.items()):
        left, right = min(xs) - 23, max(xs) + 23
        drawing.rect((left, y - 23, right, y + 23), rx=8, class_="frontier", tip=words)
        room = right - left
        text = words if text_width(words, 11) <= room else _initials(words)
        if index == 0 and not alone and text_width(text, 11) <= room + 6:
            drawing.text(
                (left + right) / 2, y - 28, text, class_="small halo", text_anchor="middle"
            )


def _initials(words: str) -> str:
    """`stage 1, KVP 0` as `s1 k0`."""
    return " ".join(part[0].lower() + part.split()[-1] for part in words.split(", "))


def _group_words(plan: Plan, group: tuple[int, int, int]) -> str:
    replica, stage, kvp = group
    p = plan.parallelism
    words = [f"stage {stage}"] if p.spp > 1 else []
    words += [f"KVP {kvp}"] if p.kvp > 1 else []
    words += [f"replica {replica}"] if p.replicas > 1 else []
    return ", ".join(words) or "replica 0"


def _seat_words(seat: Coordinates | None) -> str:
    if seat is None:
        return "idle"
    return f"tp {seat.tp}, stage {seat.stage}, KVP {seat.group}, replica {seat.replica}"


def _mesh(plan: Plan) -> str:
    """Stages across, KVP groups and replicas down; a cell is a tp group and names its node."""
    p = plan.parallelism
    replicas = min(p.replicas, max(MOST_ROWS // p.kvp, 1))
    rows = replicas * p.kvp
    left, right = 96.0, WIDTH - 8.0
    wide = min((right - left) / p.spp, 88.0)
    tall = min(max(220.0 / rows, 9.0), 30.0)
    top = 58.0
    more = p.replicas - replicas
    height = top + tall * rows + 6 * (replicas - 1) + (26 if more else 8)
    title = (
        "mesh: a cell is a tp group" if not more else f"mesh of {replicas} of {p.replicas} replicas"
    )
    drawing = Drawing(
        name="chart-mesh",
        width=WIDTH,
        height=height,
        title=title,
        description=(
            f"{p.spp} stages across, {p.kvp} KVP groups down, {p.replicas} replicas, each cell"
            f" {p.tp} devices."
        ),
    )
    drawing.text(2, 15, title, class_="strong")
    _stage_names(drawing, left, wide, p.spp)
    heads = _first_devices(plan)
    stride = max(-(-(FONT + 2) // int(tall)), 1)
    for row in range(rows):
        replica, kvp = divmod(row, p.kvp)
        y = top + tall * row + 6 * replica
        if row % stride == 0:
            name = f"KVP {kvp}" if p.kvp > 1 else ""
            name = f"r{replica} {name}" if p.replicas > 1 else name or "replica 0"
            drawing.text(
                left - 8, y + tall / 2 + FONT * 0.35, name, class_="tick", text_anchor="end"
            )
        for stage in range(p.spp):
            one = Coordinates(replica=replica, stage=stage, group=kvp, tp=0)
            node, device = heads[replica, stage, kvp]
            x = left + wide * stage
            first, end = plan.stages[stage]
            drawing.rect(
                (x + 1, y + 1, x + wide - 1, y + tall - 1),
                rx=3,
                class_=f"f{hue(plan, one)} veil",
                tip=(
                    f"replica {replica}, stage {stage} (layers {first} to {end - 1}), KVP {kvp}:"
                    f" node {node} from GPU {device} on"
                ),
                data_cell=f"{replica} {stage} {kvp}",
            )
            text = f"node {node}" if wide > 62 else f"n{node}"
            if tall >= 15 and text_width(text, 11) < wide - 4:
                middle = x + wide / 2
                drawing.text(middle, y + tall / 2 + 4, text, class_="small", text_anchor="middle")
    if more:
        drawing.text(left, height - 8, f"and {more} more replicas, each as these", class_="name")
    return drawing.svg()


def _stage_names(drawing: Drawing, left: float, wide: float, stages: int) -> None:
    """Names over the columns, and which way chunks go."""
    drawing.text(left, 36, "stages, in the order that chunks pass", class_="name")
    stride = math.ceil((text_width(str(stages - 1)) + 5) / wide)
    for stage in range(0, stages, stride):
        middle = left + wide * (stage + 0.5)
        drawing.text(middle, 53, str(stage), class_="tick", text_anchor="middle")


def _first_devices(plan: Plan) -> dict[tuple[int, int, int], tuple[int, int]]:
    """(node, device) of the first rank of each tp group."""
    p = plan.parallelism
    return {
        _group(coordinates(p, rank)): plan.placement.rank_map[rank]
        for rank in range(0, len(plan.placement.rank_map), p.tp)
    }

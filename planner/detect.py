"""This machine as a node type: what `medha-plan --detect` prints and `--topology` accepts.

Read are `nvidia-smi` (devices, the matrix of connections, NVLink speeds) and /sys (network ports);
nothing is measured. Of the matrix, PIX and PXB make a PCIe switch, PHB and NODE a CPU, SYS a wire
between CPUs, and NV# so many NVLinks: to a switch where every pair has all links of a device, as a
bridge else. Each parser takes the text alone and says which line it cannot read.
"""

import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from planner.catalog import load_device, names
from plans.codec import dumps
from plans.errors import MedhaError
from plans.topology import Fabric, Link, Network, NodeType, Part, Wires, gpu

Run = Callable[[tuple[str, ...]], str | None]
"""Output of a command, or None where there is none or it fails."""
Pair = tuple[str, str]

QUERY = "index,name,pcie.link.gen.max,pcie.link.width.max"
LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
"""PCI Express, one lane and direction, by generation."""
NVLINK_STEP = 25.0
"""GB/s: NVLinks carry 25 or a multiple; what nvidia-smi reports is the raw rate, a little more."""
MOST_LINKS = 18
"""NVLinks of any device so far."""
TIMEOUT_S = 30.0

SAME_SWITCH = {"PIX", "PXB"}
SAME_CPU = {"PHB", "NODE"}
CELL = re.compile(r"X|PIX|PXB|PHB|NODE|SYS|SOC|NV[1-9]\d*")
ANSI = re.compile(r"\x1b\[[0-9;]*m")
HEADING = re.compile(r"(GPU|NIC|mlx5_)\d+")
SAID = ("WARNING", "No devices were found")
"""Beginnings of lines that the query has instead of a device."""
ASSUMED = "Efficiency and latency: assumed, not measured."


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A row of nvidia-smi's query."""

    index: int
    name: str
    pcie_generation: int
    pcie_lanes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """What `nvidia-smi topo` prints."""

    cells: dict[Pair, str]
    """Connection of two names, such as PIX, SYS or NV18."""
    legend: dict[str, str]
    """The kernel's name of each NIC; empty where the columns have it already."""
    affinity: dict[str, str]
    """CPUs next to each name, as a list of ranges."""

    @property
    def without_nvlink(self) -> dict[Pair, str]:
        """The cells, NV# replaced by what the CPUs next to both ends say."""
        near = self.affinity
        return {
            pair: ("NODE" if near.get(pair[0]) == near.get(pair[1]) else "SYS")
            if cell.startswith("NV")
            else cell
            for pair, cell in self.cells.items()
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Port:
    """A network port that is up."""

    name: str
    gigabits_per_s: float
    kind: str
    """InfiniBand or Ethernet, as the kernel says."""


def detect(run: Run | None = None, sys: Path = Path("/sys")) -> str:
    """YAML of the node type that this machine is.

    Raises MedhaError where there is no NVIDIA GPU or the devices differ, UnknownName for a device
    that the catalog does not have.
    """
    run = run or run_command
    listed = run(("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"))
    found = parse_gpus(listed or "")
    if not found:
        raise MedhaError(
            "no GPU found: nvidia-smi is not here or lists none; nearest: --topology with a file"
            f" or one of {', '.join(names('topologies'))}"
        )
    kinds = sorted({each.name for each in found})
    if len(kinds) > 1:
        raise MedhaError(f"the GPUs of this machine differ: {', '.join(kinds)}; a plan needs one")
    device = load_device(kinds[0])
    matrix = run(("nvidia-smi", "topo", "-m")) or ""
    best = parse_matrix(matrix)
    plain = parse_matrix(run(("nvidia-smi", "topo", "-mp")) or "")
    node = build(
        found,
        device=device.name,
        pcie=best.without_nvlink | plain.cells,
        nvlink=best.cells,
        legend=best.legend,
        speeds=parse_nvlinks(run(("nvidia-smi", "nvlink", "-s")) or ""),
        ports=fastest(read_ports(sys)),
    )
    notes = [
        "Detected, not measured: bandwidths are those of the links' generations.",
        "Other nodes are taken to be like this one, all under one leaf switch or rail.",
    ]
    notes += _gaps(found, best, matrix)
    return "".join(f"# {note}\n" for note in notes) + dumps(node)


def _gaps(found: tuple[Gpu, ...], best: Matrix, text: str) -> list[str]:
    """What the matrix of connections leaves open, and what is taken instead."""
    if len(found) < 2:
        return []
    if not best.cells:
        unread = " that can be read" if text.strip() else ""
        return [
            f"nvidia-smi gave no matrix of connections{unread}: all GPUs are taken to share a CPU."
        ]
    rows = {name for name, _ in best.cells}
    missing = [each for each in (f"GPU{gpu.index}" for gpu in found) if each not in rows]
    return [
        f"nvidia-smi's matrix of connections has no {each}: it is taken to be under a CPU of its"
        " own, with no NVLink."
        for each in missing
    ]


def run_command(command: tuple[str, ...]) -> str | None:
    """Output of a command on this machine; None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(  # noqa: S603 (fixed words)
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # a strange byte is named as a line that cannot be read
            check=True,
            timeout=TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Rows of `nvidia-smi --query-gpu`; what a driver does not know (`[N/A]`) counts as 0."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != QUERY.count(",") + 1 or not cells[0].isdecimal():
            if line.strip() and not line.startswith(SAID):
                raise MedhaError(f"nvidia-smi --query-gpu: cannot read {line.strip()!r}")
            continue
        generation, lanes = (int(cell) if cell.isdecimal() else 0 for cell in cells[2:])
        found.append(
            Gpu(index=int(cells[0]), name=cells[1], pcie_generation=generation, pcie_lanes=lanes)
        )
    indices = [each.index for each in found]
    for index in indices:
        if indices.count(index) > 1:
            raise MedhaError(f"nvidia-smi --query-gpu: lists device {index} more than once")
    return tuple(sorted(found, key=lambda each: each.index))


def parse_matrix(text: str) -> Matrix:
    """The matrix of `nvidia-smi topo -m` or `-mp`; empty where the text has none."""
    cells: dict[Pair, str] = {}
    columns: list[str] = []
    legend: dict[str, str] = {}
    affinity: dict[str, str] = {}
    for line in ANSI.sub("", text).splitlines():
        words = line.split()
        if entry := re.fullmatch(r"\s*(NIC\d+):\s*(\S+)\s*", line):
            legend[entry[1]] = entry[2]
        elif not columns:
            if words and HEADING.fullmatch(words[0]) and not any(map(CELL.fullmatch, words[1:2])):
                columns = words[: words.index("CPU")] if "CPU" in words else words
        elif words and words[0] in columns:
            row, rest = words[1 : len(columns) + 1], words[len(columns) + 1 :]
            if len(row) < len(columns) or not all(map(CELL.fullmatch, row)):
                raise MedhaError(f"nvidia-smi topo: cannot read {line.strip()!r}")
            cells |= {(words[0], column): cell for column, cell in zip(columns, row, strict=True)}
            affinity[words[0]] = rest[0] if rest else ""
    return Matrix(cells=cells, legend=legend, affinity=affinity)


def parse_nvlinks(text: str) -> dict[int, list[float]]:
    """GB/s of the active links of each device, from `nvidia-smi nvlink -s`."""
    speeds: dict[int, list[float]] = {}
    device = None
    for line in text.splitlines():
        if heading := re.match(r"\s*GPU (\d+):", line):
            device = int(heading[1])
        elif (link := re.match(r"\s*Link \d+:\s*([\d.]+) GB/s", line)) and device is not None:
            speeds.setdefault(device, []).append(float(link[1]))
    return speeds


def read_ports(sys: Path) -> tuple[Port, ...]:
    """Active ports below /sys/class/infiniband, RoCE included, by name."""
    found = []
    for port in sorted(sys.glob("class/infiniband/*/ports/*")):
        state, rate, layer = (_text(port / name) for name in ("state", "rate", "link_layer"))
        speed = re.match(r"([\d.]+) Gb/sec", rate)
        if "ACTIVE" in state and speed:
            found.append(
                Port(
                    name=port.parts[-3], gigabits_per_s=float(speed[1]), kind=layer or "InfiniBand"
                )
            )
    return tuple(found)


def fastest(ports: Iterable[Port]) -> tuple[Port, ...]:
    """Ports of the highest rate: the others are there for storage and management."""
    every = tuple(ports)
    most = max((each.gigabits_per_s for each in every), default=0.0)
    return tuple(each for each in every if each.gigabits_per_s == most)


def build(
    gpus: tuple[Gpu, ...],
    *,
    device: str,
    pcie: Mapping[Pair, str],
    nvlink: Mapping[Pair, str],
    legend: Mapping[str, str],
    speeds: Mapping[int, list[float]],
    ports: tuple[Port, ...],
) -> NodeType:
    """The node type of what was read; `pcie` has no NV# where the driver can leave it out."""
    name = f"detected-{len(gpus)}x-{device}"
    smi = {f"GPU{each.index}": gpu(place) for place, each in enumerate(gpus)}
    known = {port.name for port in ports}
    nics = {
        column: legend.get(column, column)
        for column, _ in pcie
        if column not in smi and legend.get(column, column) in known
    }
    if len(gpus) == 1 and not nics:
        return NodeType(name=name, device=device, devices_per_node=1)
    smi |= {column: f"nic{place}" for place, column in enumerate(sorted(nics, key=_natural))}
    parts, joins, sockets = _pcie_tree(smi, pcie)
    wires = _nvlinks(smi, nvlink, speeds)
    if _switched(wires):
        parts.insert(0, Part(name="nvswitch", kind="nvlink-switch"))
    wires.append(Wires(link=_pcie_link(gpus), joins=tuple(joins)))
    if sockets:
        wires.append(Wires(link=_socket_link(), joins=tuple(sockets)))
    network = _network(ports, len(nics)) if nics else None
    fabric = Fabric(parts=tuple(parts), wires=tuple(wires), network=network)
    return NodeType(name=name, device=device, devices_per_node=len(gpus), fabric=fabric)


def _pcie_tree(
    smi: Mapping[str, str], pcie: Mapping[Pair, str]
) -> tuple[list[Part], list[tuple[str, str]], list[tuple[str, str]]]:
    """Parts, wires of PCIe and wires between CPUs, for devices and ports by nvidia-smi's names."""
    switches = _merged([{each} for each in smi], pcie, SAME_SWITCH)
    cpus = _merged(switches, pcie, SAME_CPU if pcie else set())
    if not pcie:
        cpus = [set(smi)]
    parts = [Part(name=f"cpu{row}", kind="cpu") for row in range(len(cpus))]
    joins: list[tuple[str, str]] = []
    count = 0
    for row, members in enumerate(cpus):
        for switch in (each for each in switches if each <= members):
            above = f"cpu{row}"
            if len(switch) > 1:
                parts.append(Part(name=f"pcie{count}", kind="pcie-switch"))
                joins.append((f"pcie{count}", above))
                above = f"pcie{count}"
                count += 1
            joins += [(smi[each], above) for each in sorted(switch, key=_natural)]
    parts += [Part(name=each, kind="nic") for each in smi.values() if each.startswith("nic")]
    sockets = list(combinations([f"cpu{row}" for row in range(len(cpus))], 2))
    return parts, joins, sockets


def _merged(groups: list[set[str]], matrix: Mapping[Pair, str], same: set[str]) -> list[set[str]]:
    """Groups, those joined that a pair connected in one of these ways stands in."""
    groups = [set(each) for each in groups]
    for (one, other), cell in matrix.items():
        if cell in same:
            hit = [each for each in groups if one in each or other in each]
            if len(hit) == 2:
                hit[0].update(hit[1])
                groups.remove(hit[1])
    return sorted(groups, key=lambda each: _natural(min(each, key=_natural)))


def _nvlinks(
    smi: Mapping[str, str], matrix: Mapping[Pair, str], speeds: Mapping[int, list[float]]
) -> list[Wires]:
    """NVLink wires: to a switch where each pair has all links of a device, else between pairs."""
    counts = {
        (smi[one], smi[other]): int(cell.removeprefix("NV"))
        for (one, other), cell in matrix.items()
        if cell.startswith("NV") and one in smi and other in smi and _natural(one) < _natural(other)
    }
    if not counts:
        return []
    devices = sorted({each for pair in counts for each in pair}, key=_natural)
    raw = [speed for every in speeds.values() for speed in every]
    speed = min(raw, default=NVLINK_STEP)
    nominal = speed // NVLINK_STEP * NVLINK_STEP or speed
    has = max((len(each) for each in speeds.values()), default=MOST_LINKS)
    (links, *others) = sorted(set(counts.values()))
    pairs = len(devices) * (len(devices) - 1) // 2
    every_pair = not others and len(counts) == pairs and len(devices) > 2
    if every_pair and links * (len(devices) - 1) > has:
        link = _nvlink(links, nominal)
        return [Wires(link=link, joins=tuple((each, "nvswitch") for each in devices))]
    return [
        Wires(
            link=_nvlink(many, nominal),
            joins=tuple(pair for pair, count in counts.items() if count == many),
        )
        for many in sorted(set(counts.values()), reverse=True)
    ]


def _switched(wires: list[Wires]) -> bool:
    return any("nvswitch" in ends for each in wires for ends in each.joins)


def _nvlink(links: int, gigabytes_per_s: float) -> Link:
    return Link(
        kind="nvlink",
        scope="node",
        bandwidth_bytes_per_s=links * gigabytes_per_s * 1e9,
        efficiency=0.7,
        latency_s=2e-5,
        source=f"nvidia-smi: {links} NVLinks of {gigabytes_per_s:g} GB/s each way. {ASSUMED}",
    )


def _pcie_link(gpus: tuple[Gpu, ...]) -> Link:
    generation = min(each.pcie_generation for each in gpus)
    lanes = min(each.pcie_lanes for each in gpus)
    said = f"nvidia-smi: PCI Express generation {generation} with {lanes} lanes."
    if generation not in LANE_BYTES_PER_S or lanes < 1:
        generation, lanes = 4, 16
        said = "nvidia-smi does not say; assumed: PCI Express generation 4 with 16 lanes."
    return Link(
        kind="pcie",
        scope="node",
        bandwidth_bytes_per_s=round(lanes * LANE_BYTES_PER_S[generation] / 1e6) * 1e6,
        efficiency=0.8,
        latency_s=3e-5,
        source=f"{said} {ASSUMED}",
    )


def _socket_link() -> Link:
    return Link(
        kind="socket",
        scope="node",
        bandwidth_bytes_per_s=48e9,
        efficiency=0.6,
        latency_s=4e-5,
        source=f"assumed: one link between CPUs of 48 GB/s each way. {ASSUMED}",
    )


def _network(ports: tuple[Port, ...], count: int) -> Network:
    port = ports[0]
    ethernet = port.kind == "Ethernet"
    leaf = Link(
        kind="ethernet" if ethernet else "infiniband",
        scope="cluster",
        bandwidth_bytes_per_s=port.gigabits_per_s * 1e9 / 8,
        efficiency=0.8 if ethernet else 0.85,
        latency_s=5e-5 if ethernet else 3e-5,
        source=f"/sys/class/infiniband: {port.gigabits_per_s:g} Gb/s a port. {ASSUMED}",
    )
    return Network(nodes_per_leaf=32, rails=count > 1, leaf=leaf)


def _natural(name: str) -> tuple[str, int]:
    """mlx5_10 after mlx5_9."""
    stem, number = re.fullmatch(r"(.*?)(\d*)", name).groups()  # type: ignore[union-attr]
    return stem, int(number or 0)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""

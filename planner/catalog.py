"""The catalog: models, devices, node types and workloads by the names that people type.

One YAML file for each entry, below the folder `catalog` beside this module; its name is the file's.
Names are compared without case, blanks, `-` and `_`. Other spellings, such as hub ids, come from
catalog/model_aliases.yaml for models and from the field `aliases` for devices.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Literal

from planner.hf_config import read_config
from plans.check_layout import workload_problems
from plans.codec import load_file
from plans.errors import InvalidFile, UnknownName, UsageError
from plans.model import Model
from plans.topology import Device, Fabric, Link, NodeType, Topology, Wires, fabric_problems, gpu
from plans.workload import Workload

Kind = Literal["devices", "models", "topologies", "workloads"]

CATALOG = Path(__file__).with_name("catalog")
MODEL_ALIASES = CATALOG / "model_aliases.yaml"
FILE_SUFFIXES = (".yaml", ".yml")
MOST_PER_NODE = 1024
"""Devices of a node; a graph of many more would be built for minutes before it is refused."""


@cache
def names(kind: Kind) -> tuple[str, ...]:
    """Names of all entries of a kind, sorted."""
    return tuple(sorted(path.stem for path in (CATALOG / kind).glob("*.yaml")))


def load_model(name_or_folder: str | Path, *, context_tokens: int | None = None) -> Model:
    """Model of the catalog, or of a checkpoint folder that holds a config.json.

    name_or_folder  a catalog name, an alias, a hub id of the alias table, or a folder; a name wins
                    over a folder of the same name, which `./NAME` reaches
    context_tokens  longest context asked for; decides whether a sliding window is in the way
    raises          UnknownName; InvalidFile for a folder that is missing or not supported
    """
    text = str(name_or_folder)
    name = _resolve(text, _model_spellings())
    if name is not None:
        return load_file(_path("models", name), Model)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return read_config(folder, context_tokens=context_tokens)
    if isinstance(name_or_folder, Path) or text.startswith((".", "/", "~")):
        raise InvalidFile(text, "", "no such folder; a folder with a config.json is needed")
    raise UnknownName("model", text, names("models"))


def hub_id(name: str) -> str | None:
    """First hub id that the alias table has for a model; None where it has none."""
    return next(iter(load_file(MODEL_ALIASES, dict[str, tuple[str, ...]]).get(name, ())), None)


def load_device(name: str) -> Device:
    """Device of the catalog; raises UnknownName."""
    found = _resolve(name, _device_spellings())
    if found is None:
        aliases = (load_file(_path("devices", each), Device).aliases for each in names("devices"))
        raise UnknownName("device", name, (*names("devices"), *chain.from_iterable(aliases)))
    return load_file(_path("devices", found), Device)


def load_node_type(name_or_file: str | Path) -> NodeType:
    """Node type of the catalog, or of a user's topology file; raises UnknownName, InvalidFile."""
    path = _entry_path("topologies", "node type", name_or_file)
    node = load_file(path, NodeType)
    if node.devices_per_node > MOST_PER_NODE:
        problem = f"{node.devices_per_node} are too many; nearest: {MOST_PER_NODE}"
        raise InvalidFile(str(path), "devices_per_node", problem)
    for scope in ("node", "cluster"):
        if sum(link.scope == scope for link in node.links) > 1:
            raise InvalidFile(str(path), "links", f"at most one link has scope {scope}")
    try:
        load_device(node.device)
    except UnknownName as error:
        raise InvalidFile(str(path), "device", str(error)) from None
    if node.fabric is not None:
        if node.links:
            raise InvalidFile(str(path), "links", "stands beside fabric; give one of the two")
        # a file without `nodes` may still be used for one node alone, so its network may be missing
        for field, text in fabric_problems(node.fabric, node.devices_per_node, node.nodes or 1):
            raise InvalidFile(str(path), field, text)
    return node


def load_workload(name_or_file: str | Path) -> Workload:
    """Workload of the catalog or of a YAML file; raises UnknownName, InvalidFile."""
    path = _entry_path("workloads", "workload", name_or_file)
    workload = load_file(path, Workload)
    for field, text in workload_problems(workload):
        raise InvalidFile(str(path), field, text)
    return workload


def topology_for(
    device: Device, gpus: int, node_type: NodeType | str | Path | None = None
) -> Topology:
    """The machine of exactly `gpus` devices, the same number on every node.

    node_type  a node type, its name or a topology file; the device's default node where None. A
               file that says `nodes` must have room; what it has beyond `gpus` is left out.
    layout     the fewest nodes that hold them: 7 GPUs are 1 x 7 and 12 are 2 x 6 on nodes of 8.
               Where the fewest do not divide them, a file's further nodes are tried (9 on 3 x 8
               are 3 x 3); catalog machines are never stretched: nobody has 17 x 1.
    raises     UsageError that names the nearest numbers which fit
    """
    if isinstance(node_type, NodeType):
        node = node_type
    else:
        node = load_node_type(device.default_node if node_type is None else node_type)
    if load_device(node.device).name != device.name:
        raise UsageError(f"node type {node.name} has {node.device}, not {device.name}")
    nodes = _nodes(gpus, node)
    if nodes is None:
        fitting = _nearest_counts(gpus, node)
        raise UsageError(
            f"{gpus} GPUs do not fit on nodes of type {node.name} ({_capacity(node)}) with equally"
            f" many on each; nearest: {' or '.join(str(count) for count in fitting)}"
        )
    per_node = gpus // nodes
    fabric = None
    if node.fabric is not None and gpus > 1:
        fabric = _needed_fabric(node, node.fabric, nodes=nodes, per_node=per_node)
    links = () if node.fabric else _needed_links(node, nodes=nodes, per_node=per_node)
    return Topology(
        device=device.name,
        device_memory_bytes=device.memory_bytes,
        nodes=nodes,
        devices_per_node=per_node,
        links=links,
        fabric=fabric,
    )


def _nodes(gpus: int, node: NodeType) -> int | None:
    """Fewest nodes that hold `gpus` devices evenly, or None."""
    if gpus < 1:
        return None
    fewest = -(-gpus // node.devices_per_node)
    most = fewest if node.nodes is None else node.nodes
    return next((nodes for nodes in range(fewest, most + 1) if gpus % nodes == 0), None)


def _nearest_counts(gpus: int, node: NodeType) -> tuple[int, ...]:
    """The next smaller and the next larger number of devices that fit; some do always."""
    most = None if node.nodes is None else node.nodes * node.devices_per_node
    start = max(gpus, 0) if most is None else min(max(gpus, 0), most + 1)
    below = (count for count in range(start - 1, 0, -1) if _nodes(count, node))
    # one node more, all of them full, is always even
    limit = start + 2 * node.devices_per_node if most is None else most
    above = (count for count in range(start + 1, limit + 1) if _nodes(count, node))
    found = (next(below, None), next(above, None))
    return tuple(count for count in found if count is not None)


def _capacity(node: NodeType) -> str:
    """How many devices a node type has, in words."""
    many = "" if node.nodes is None else f", {node.nodes} nodes"
    return f"{node.devices_per_node} a node{many}"


def _needed_links(node: NodeType, *, nodes: int, per_node: int) -> tuple[Link, ...]:
    """The links that the layout uses; raises UsageError where one is not described."""
    needed = {"node": per_node > 1, "cluster": nodes > 1}
    for scope, used in needed.items():
        if used and all(link.scope != scope for link in node.links):
            raise UsageError(
                f"node type {node.name} describes no link of scope {scope!r}, and {nodes} x"
                f" {per_node} devices need one"
            )
    return tuple(link for link in node.links if needed[link.scope])


def _needed_fabric(node: NodeType, fabric: Fabric, *, nodes: int, per_node: int) -> Fabric:
    """The fabric without the devices left out; raises UsageError where it cannot join the rest."""
    left_out = {gpu(index) for index in range(per_node, node.devices_per_node)}
    wires = tuple(
        Wires(link=each.link, joins=joins)
        for each in fabric.wires
        if (joins := tuple(ends for ends in each.joins if left_out.isdisjoint(ends)))
    )
    used = Fabric(parts=fabric.parts, wires=wires, network=fabric.network if nodes > 1 else None)
    for path, text in fabric_problems(used, per_node, nodes):
        raise UsageError(f"node type {node.name}: {path}: {text} ({nodes} x {per_node} GPUs)")
    return used


def _path(kind: Kind, name: str) -> Path:
    return CATALOG / kind / f"{name}.yaml"


def _entry_path(kind: Kind, what: str, name_or_file: str | Path) -> Path:
    """File of an entry: of the catalog by its name, else the user's own."""
    text = str(name_or_file)
    name = _resolve(text, _own_names(kind))
    if name is not None:
        return _path(kind, name)
    if text.endswith(FILE_SUFFIXES) or Path(text).name != text or Path(text).is_file():
        return Path(text).expanduser()
    raise UnknownName(what, text, names(kind))


def name_key(spelling: str) -> str:
    """What two spellings of one name share."""
    return re.sub(r"[-_ ]", "", spelling.lower())


def _resolve(text: str, spellings: Mapping[str, str]) -> str | None:
    return spellings.get(name_key(text))


def _own_names(kind: Kind) -> dict[str, str]:
    return {name_key(name): name for name in names(kind)}


@cache
def _model_spellings() -> dict[str, str]:
    """Key of every spelling of a model to its name; a hub id counts with and without its owner."""
    table = load_file(MODEL_ALIASES, dict[str, tuple[str, ...]])
    others = {
        name: (*ids, *(each.rpartition("/")[2] for each in ids)) for name, ids in table.items()
    }
    return _spellings("models", others)


@cache
def _device_spellings() -> dict[str, str]:
    """Key of every spelling of a device to its name."""
    return _spellings(
        "devices",
        {name: load_file(_path("devices", name), Device).aliases for name in names("devices")},
    )


def _spellings(kind: Kind, others: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Own names and other spellings; an own name is never taken by another entry."""
    found = {name_key(each): name for name, many in others.items() for each in many}
    return found | _own_names(kind)

"""Row-wise ops that follow or share rows become one op, whose sources are made from them.

Requires  sharded graphs in which projections and attention have taken the row-wise ops that belong
          to them
Ensures   no two row-wise ops of one row index (the leading dims) could be one region any more that
          saves memory: one reads what the other writes, or both read the same columns, nothing that
          stands between them is outside, and all fits a kernel's registers. Cuts of a value are
          columns of it. The numbers are those of the ops apart. Regions that are alike share a
          generated op; those of codegen/rowwise_library.py have its names
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from codegen.graph import COLLECTIVES, Program, call, erase_unused, item, op_name, value_of
from codegen.kernels import KERNELS
from codegen.kernels.base import Value
from codegen.rowwise import ROW_WISE, Builder, Region
from codegen.rowwise_library import LIBRARY
from codegen.rowwise_op import generated
from codegen.rowwise_table import REDUCED, TABLE
from plans.plan import Plan

TILES_MAX = 12
"""Segments that a region reads and writes: more do not stay in registers."""
CLASSES_MAX = 4
NAME_LETTERS_MAX = 30
FLOATS = ("bf16", "fp16", "fp32")


def rowwise(program: Program, plan: Plan) -> int:
    """Makes regions of all graphs; returns how many."""
    ops = _Ops()
    for graph in program.graphs:
        ops.know(graph)
    matches = 0
    for graph in program.graphs:
        found, numbers = _regions(graph), _numbers(graph)
        for members in found:
            _replace(graph, members, numbers, ops)
        erase_unused(graph)
        matches += len(found)
    return matches


@dataclass
class _Ops:
    """The ops of a program's regions by what they compute."""

    by_key: dict[Any, str | Callable[..., Any]] = field(
        default_factory=lambda: {region.key: op for op, region in LIBRARY.items()}
    )
    taken: set[str] = field(default_factory=lambda: {*KERNELS, *COLLECTIVES, *TABLE})

    def know(self, graph: fx.Graph) -> None:
        """Counts the generated ops that a graph has already."""
        for node in graph.nodes:
            region = getattr(node.target, "region", None)
            if region is not None:
                self.by_key[region.key] = node.target
                self.taken.add(node.target.__name__)

    def of(self, region: Region) -> str | Callable[..., Any]:
        """The op of a region: a known one, else a new one, named after its ops."""
        if region.key not in self.by_key:
            stem = "_".join(region.ops)
            if len(stem) > NAME_LETTERS_MAX:
                stem = f"{stem[:NAME_LETTERS_MAX].rpartition('_')[0]}_and_more"
            name, number = stem, 2
            while name in self.taken:
                name, number = f"{stem}_{number}", number + 1
            self.taken.add(name)
            function = generated(name, region)
            function.region = region  # type: ignore[attr-defined]
            self.by_key[region.key] = function
        return self.by_key[region.key]


# --- which ops belong together --------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
    """Columns of a value: what a node is, seen through cuts."""

    base: fx.Node
    first: int
    width: int

    def overlap(self, other: "_Columns") -> bool:
        """Whether both have a column."""
        apart = self.first + self.width <= other.first or other.first + other.width <= self.first
        return self.base is other.base and not apart


def _row_op(node: fx.Node) -> str | None:
    """The op of the table that a node calls; one made for its arguments has a name of its own."""
    return getattr(node.target, "primitive", None) or op_name(node)


def _is_cut(node: fx.Node) -> bool:
    """Whether a node only tells where the columns of a value are."""
    if node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    return op_name(node) == "split"


def _columns(node: fx.Node) -> _Columns:
    width = value_of(node).shape[-1]
    assert isinstance(width, int), "the last dim has a size"
    if node.target is not operator.getitem or not _is_cut(node):
        return _Columns(node, 0, width)
    split, index = node.args
    whole, sizes = split.args  # type: ignore[union-attr]
    outer = _columns(whole)  # type: ignore[arg-type]
    return _Columns(outer.base, outer.first + sum(sizes[:index]), width)  # type: ignore[index,arg-type]


def _rows(node: fx.Node) -> list[fx.Node]:
    """Arguments of a row-wise op that have its rows; those of rms_norm are its first alone."""
    count = 1 if _row_op(node) in ("rms_norm", "cast") else len(node.args)
    found = [each for each in node.args[:count] if isinstance(each, fx.Node)]
    return [each for each in found if len(value_of(each).shape) > 1]


def _numbers(graph: fx.Graph) -> set[fx.Node]:
    """Values that are one number a row, and no rows of one column."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("value")
        if not isinstance(value, Value) or len(value.shape) < 2 or value.shape[-1] != 1:
            continue
        args = _rows(node) if _row_op(node) in ROW_WISE else []
        wider = any(_row_op(user) in TABLE and value_of(user).shape[-1] != 1 for user in node.users)
        made = bool(args) and all(each in found for each in args)
        if _row_op(node) in REDUCED or made or wider:
            found.add(node)
    return found


def _takes(node: fx.Node) -> bool:
    """Whether a region may hold this call."""
    if _row_op(node) not in ROW_WISE:
        return False
    values = [value_of(node), *map(value_of, _rows(node))]
    return all(
        each.dtype in FLOATS and len(each.shape) in (2, 3) and isinstance(each.shape[-1], int)
        for each in values
    )


class _Reach:
    """Which nodes stand before and behind which, while groups of them grow together."""

    def __init__(self, nodes: list[fx.Node]) -> None:
        self.place = {node: at for at, node in enumerate(nodes)}
        self.cuts = sum(1 << at for node, at in self.place.items() if _is_cut(node))
        self.members = [1 << at for at in range(len(nodes))]
        self.before = [0] * len(nodes)
        for node, at in self.place.items():
            for each in node.all_input_nodes:
                self.before[at] |= self.before[self.place[each]] | self.members[self.place[each]]
        self.behind = [0] * len(nodes)
        for at in range(len(nodes) - 1, -1, -1):
            for each in nodes[at].all_input_nodes:
                self.behind[self.place[each]] |= self.behind[at] | self.members[at]

    def convex(self, a: int, b: int) -> bool:
        """Whether nothing but cuts stands between the members of two groups."""
        both = self.members[a] | self.members[b]
        between = (self.before[a] | self.before[b]) & (self.behind[a] | self.behind[b])
        return not between & ~both & ~self.cuts

    def join(self, a: int, b: int) -> None:
        """Makes two groups one: what stands behind one member stands behind all."""
        both = self.members[a] | self.members[b]
        before = (self.before[a] | self.before[b]) & ~both
        behind = (self.behind[a] | self.behind[b]) & ~both
        for at in _bits(both):
            self.members[at], self.before[at], self.behind[at] = both, before, behind
        for at in _bits(before):
            self.behind[at] |= behind | both
        for at in _bits(behind):
            self.before[at] |= before | both


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _regions(graph: fx.Graph) -> list[list[fx.Node]]:
    """Members of each region, in the graph's order."""
    nodes, numbers = list(graph.nodes), _numbers(graph)
    ours = [node for node in nodes if _takes(node)]
    read = {node: [_columns(each) for each in _rows(node)] for node in ours}
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node, columns in read.items():
        for each in columns:
            readers.setdefault(each.base, []).append(node)
    reach = _Reach(nodes)
    grown = True
    while grown:
        grown = False
        for node in ours:
            for other in _partners(node, read, readers):
                a, b = reach.place[node], reach.place[other]
                if reach.members[a] >> b & 1 or not reach.convex(a, b):
                    continue
                both = [nodes[at] for at in _bits(reach.members[a] | reach.members[b])]
                if _fits(both, numbers):
                    reach.join(a, b)
                    grown = True
    found: dict[int, list[fx.Node]] = {}
    for node in ours:
        found.setdefault(reach.members[reach.place[node]], []).append(node)
    return [
        members
        for members in found.values()
        if len(members) > 1
        and any(each.kind == "row" for each in _built(members, numbers)[0].inputs)
    ]


def _partners(
    node: fx.Node,
    read: dict[fx.Node, list[_Columns]],
    readers: dict[fx.Node, list[fx.Node]],
) -> Iterator[fx.Node]:
    """Ops with which a node would share memory: whose result it reads, who reads what it reads."""
    space = value_of(node).shape[:-1]
    for mine in read[node]:
        if mine.base in read:
            yield mine.base
        for other in readers[mine.base]:
            alike = other is not node and value_of(other).shape[:-1] == space
            if alike and any(mine.overlap(theirs) for theirs in read[other]):
                yield other


def _fits(members: list[fx.Node], numbers: set[fx.Node]) -> bool:
    region = _built(members, numbers)[0]
    return region.tiles <= TILES_MAX and len(region.widths) <= CLASSES_MAX


# --- the region as one op -------------------------------------------------------------------------


def _read_outside(node: fx.Node, members: set[fx.Node]) -> bool:
    """Whether anything but members reads a value or columns of it."""
    return any(
        _read_outside(user, members) if _is_cut(user) else user not in members
        for user in node.users
    )


def _built(  # noqa: C901 - one place for all that a region needs
    members: list[fx.Node], numbers: set[fx.Node]
) -> tuple[Region, list[Any], list[fx.Node]]:
    """The region, the arguments of its call, and the nodes that its results replace."""
    rows = Builder()
    place: dict[Any, int] = {}
    args: list[Any] = []

    def argument(arg: Any, kind: str) -> int:
        if arg not in place:
            args.append(arg)
            if kind == "scalar":
                place[arg] = rows.scalar()
            elif kind == "number":
                place[arg] = rows.number()
            else:
                width = _columns(arg).width
                place[arg] = rows.row(width) if kind == "row" else rows.vector(width)
        return place[arg]

    def columns(node: fx.Node) -> int:
        found = _columns(node)
        base = argument(found.base, "row")
        if found == _columns(found.base):
            return base
        cut = ("cut", found)
        if cut not in place:
            place[cut] = rows.cut(base, found.first, found.width)
        return place[cut]

    def operand(arg: Any) -> int:
        if not isinstance(arg, fx.Node):
            return argument(arg, "scalar")
        if len(value_of(arg).shape) == 1:
            return argument(arg, "vector")
        return argument(arg, "number") if arg in numbers else columns(arg)

    for node in members:
        op = _row_op(node)
        assert op is not None, f"{node} calls nothing"
        own = [operand(each) for each in node.args]
        place[node] = rows.step(op, *own)
    inside = set(members)
    leaving = [node for node in members if _read_outside(node, inside)]
    region = rows.region(*(place[node] for node in leaving))
    return region, args, leaving[::-1]  # results come latest first


def _replace(graph: fx.Graph, members: list[fx.Node], numbers: set[fx.Node], ops: _Ops) -> None:
    """Puts the call behind the last member, and what read a result earlier behind the call."""
    region, args, leaving = _built(members, numbers)
    inside = set(members)
    order = [node for node in graph.nodes if node in inside]
    first, last = order[0], order[-1]
    with graph.inserting_after(last):
        made = call(graph, ops.of(region), *args, like=last, name="rows")
    tail = made
    parts = [made]
    if len(leaving) > 1:
        parts = []
        for index, node in enumerate(leaving):
            with graph.inserting_after(tail):
                tail = item(graph, made, index, node.meta["name"])
            parts.append(tail)
    else:
        made.meta["name"] = leaving[0].meta["name"]
    for node, part in zip(leaving, parts, strict=True):
        node.replace_all_uses_with(part, delete_user_cb=lambda user: user not in inside)
    late = {made, *parts}
    node = first
    while node is not made:
        following = node.next
        if node not in inside and any(each in late for each in node.all_input_nodes):
            tail.append(node)
            late.add(node)
            tail = node
        node = following
    for each in reversed(order):
        _erase(graph, each)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Removes a member and the cuts of it, which only members read."""
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)

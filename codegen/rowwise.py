"""Regions of row-wise ops: what one generated kernel computes.

A region is a small program over rows: pointwise ops, reductions of the last dim and cuts of it,
with one row index. Its numbers are those of its ops one after the other; codegen/rowwise_source.py
prints it as torch and as Triton, codegen/passes/rowwise.py finds it in a graph.

Columns: every cut of a value cuts all values that it is combined with, so a value is a row of
segments, and a tile of the kernel is one segment. Segments that are combined with each other are of
one class: they have one width and one column index. A class whose width is a share of an argument's
last dim leaves it open, so that one source serves all widths; others have numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from codegen.kernels import load_spec
from codegen.kernels.base import Value
from codegen.rowwise_table import REDUCED, TABLE

Kind = Literal["row", "vector", "number", "scalar"]
REDUCTIONS = ("rms_norm", *REDUCED)
ROW_WISE = (*TABLE, "silu_mul")
"""Ops that a region may hold; silu_mul is two cuts, silu and mul."""
ARGUMENTS = {
    **{op: ("a", "b") for op, each in TABLE.items() if each.args == 2},
    "cast": ("x", "like"),
    "rms_norm": ("x", "weight", "eps"),
}
"""What arguments are called after the first step that reads them; of others `x`."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """An argument of the call."""

    kind: Kind
    """A row each, one of all rows, a number of each row, or one number."""
    name: str
    classes: tuple[int, ...] = ()
    """Class of each segment; empty for a number."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One op. Arguments are places in `Region.values`: inputs first, then steps."""

    op: str
    """Of rowwise_table.TABLE, or `cut`, which yields segments `first` and following."""
    args: tuple[int, ...]
    name: str
    classes: tuple[int, ...]
    """Class of each segment; empty for a number of each row."""
    first: int = 0


@dataclass(frozen=True, kw_only=True)
class Region:
    """Inputs, steps in order, and which values leave."""

    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    """Places in `values`, the latest first; none is a cut."""
    widths: tuple[int | None, ...]
    """Of each class; None follows from an argument."""

    @property
    def values(self) -> tuple[Input | Step, ...]:
        """What args and outputs count."""
        return (*self.inputs, *self.steps)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for regions that differ by names alone."""
        return (
            tuple((each.kind, each.classes) for each in self.inputs),
            tuple((each.op, each.args, each.classes, each.first) for each in self.steps),
            self.outputs,
            self.widths,
        )

    @property
    def ops(self) -> tuple[str, ...]:
        """Ops of the steps; cuts only say which columns one reads."""
        return tuple(step.op for step in self.steps if step.op != "cut")

    @property
    def reduces(self) -> bool:
        """Whether a row has to be seen whole before it can be written."""
        return any(step.op in REDUCTIONS for step in self.steps)

    @property
    def tiles(self) -> int:
        """Segments of rows that are read or written: what lies in registers, roughly."""
        rows = [each for each in self.inputs if each.kind == "row"]
        return sum(len(each.classes) for each in (*rows, *(self.values[o] for o in self.outputs)))

    def dtype_of(self, place: int) -> int | None:
        """The input whose dtype a value has; None for fp32."""
        value = self.values[place]
        if isinstance(value, Input):
            return place
        if value.op == "to_fp32":
            return None
        if value.op == "cast":
            return self.dtype_of(value.args[1])
        tensors = [each for each in value.args if not self.is_scalar(each)]
        return self.dtype_of(min(tensors, key=self.is_vector))

    def is_vector(self, place: int) -> bool:
        """Whether a value is a row that all rows share: its type decides nothing."""
        value = self.values[place]
        return isinstance(value, Input) and value.kind == "vector"

    def is_scalar(self, place: int) -> bool:
        """Whether a value is one number for all rows."""
        value = self.values[place]
        return isinstance(value, Input) and value.kind == "scalar"

    def keeps_zeros(self, place: int) -> bool:
        """Whether columns that are not there hold zero in a value."""
        value = self.values[place]
        if isinstance(value, Input) or not value.classes:
            return bool(value.classes)
        if value.op in ("cut", "cast", "rms_norm"):
            return self.keeps_zeros(value.args[0])
        return TABLE[value.op].zero and all(map(self.keeps_zeros, value.args))

    def width_source(self, group: int) -> tuple[int, int] | None:
        """A row argument that has only segments of this class, and how many; None for a number."""
        for place, each in enumerate(self.inputs):
            if each.kind == "row" and set(each.classes) == {group}:
                return place, len(each.classes)
        return None

    def widths_for(self, args: Sequence[Any]) -> tuple[int, ...]:
        """Width of each class for these arguments, rows and columns as Value."""
        found = []
        for group, width in enumerate(self.widths):
            source = self.width_source(group)
            if width is None and source is not None:
                size = args[source[0]].shape[-1]
                assert isinstance(size, int), "the last dim has a size"
                assert size % source[1] == 0, f"{size} columns have no {source[1]} equal parts"
                width = size // source[1]  # noqa: PLW2901 - what follows from the argument
            assert width is not None, "a class has a number or an argument"
            found.append(width)
        return tuple(found)

    def infer(self, *args: Any) -> Value | tuple[Value, ...]:
        """The results by the rules of the ops."""
        widths = self.widths_for(args)
        for value, arg in zip(self.inputs, args, strict=True):
            if value.kind == "number":
                assert arg.shape[-1] == 1, f"{value.name} {arg} is no number a row"
            elif value.kind != "scalar":
                size = sum(widths[group] for group in value.classes)
                assert arg.shape[-1] == size, f"{value.name} {arg} is not {size} wide"
        found: list[Any] = list(args)
        for step in self.steps:
            own = [found[place] for place in step.args]
            if step.op == "cut":
                size = sum(widths[group] for group in step.classes)
                found.append(Value(shape=(*own[0].shape[:-1], size), dtype=own[0].dtype))
            elif TABLE[step.op].torch:
                found.append(inferred(step.op, own))
            else:
                found.append(load_spec(step.op).infer(*own))
        results = tuple(found[place] for place in self.outputs)
        return results if len(results) > 1 else results[0]


def inferred(op: str, args: Sequence[Any]) -> Value:
    """The result of an op of the table that has no folder: tensors are of one type."""
    tensors = [each for each in args if isinstance(each, Value)]
    first = tensors[0]
    if op in REDUCED:
        return Value(shape=(*first.shape[:-1], 1), dtype=first.dtype)
    if op == "cast":
        return Value(shape=first.shape, dtype=tensors[1].dtype)
    widest = max(tensors, key=lambda each: (len(each.shape), each.shape[-1] != 1))
    for each in tensors:
        shared = len(each.shape) == 1 and widest.dtype == "fp32"
        assert shared or each.dtype == widest.dtype, f"{op} of {tensors}"
        assert each.shape[:-1] in {widest.shape[:-1], ()}, f"{op} of {tensors}"
        assert each.shape[-1] in {1, widest.shape[-1]}, f"{op} of {tensors}"
    return widest


# --- building -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Raw:
    """A value of a region in plain columns, before they are cut into segments."""

    op: str
    """`row`, `vector`, `scalar`, or as Step.op."""
    args: tuple[int, ...] = ()
    width: int = 0
    first: int = 0
    """Column at which a cut begins."""
    name: str = ""


@dataclass
class Builder:
    """Collects a region, value by value; each method returns the new value's place."""

    raws: list[Raw] = field(default_factory=list)

    def row(self, width: int, name: str = "") -> int:
        """A tensor with one row a row."""
        return self._add(Raw(op="row", width=width, name=name))

    def vector(self, width: int, name: str = "") -> int:
        """A tensor of one row, which all rows share."""
        return self._add(Raw(op="vector", width=width, name=name))

    def number(self, name: str = "") -> int:
        """A tensor with one number a row."""
        return self._add(Raw(op="number", name=name))

    def scalar(self, name: str = "") -> int:
        """A number."""
        return self._add(Raw(op="scalar", name=name))

    def step(self, op: str, *args: int) -> int:
        """One of ROW_WISE."""
        width = max(self.raws[each].width for each in args)
        if op in REDUCED:
            width = 0
        if op == "silu_mul":
            gate = self.step("silu", self.cut(args[0], 0, width // 2))
            return self.step("mul", gate, self.cut(args[0], width // 2, width // 2))
        return self._add(Raw(op=op, args=args, width=width))

    def cut(self, value: int, first: int, width: int) -> int:
        """Columns of a value."""
        return self._add(Raw(op="cut", args=(value,), width=width, first=first))

    def _add(self, raw: Raw) -> int:
        self.raws.append(raw)
        return len(self.raws) - 1

    def region(self, *outputs: int) -> Region:
        """What was collected, inputs first; open widths where they follow from an argument."""
        order = sorted(range(len(self.raws)), key=lambda at: bool(self.raws[at].args))
        place = {at: number for number, at in enumerate(order)}
        points = _points(self.raws)
        groups, sizes = _classes(self.raws, points, order)
        names = _names(self.raws, order)
        inputs, steps = [], []
        for at in order:
            raw, own = self.raws[at], groups[at]
            if not raw.args:
                kind: Any = raw.op
                inputs.append(Input(kind=kind, name=names[at], classes=own))
                continue
            first = points[raw.args[0]].index(raw.first) if raw.op == "cut" else 0
            args = tuple(place[each] for each in raw.args)
            steps.append(Step(op=raw.op, args=args, name=names[at], classes=own, first=first))
        plain = Region(
            inputs=tuple(inputs),
            steps=tuple(steps),
            outputs=tuple(sorted((place[each] for each in outputs), reverse=True)),
            widths=tuple(sizes),
        )
        open_ones = tuple(
            None if plain.width_source(group) is not None else size
            for group, size in enumerate(sizes)
        )
        return Region(
            inputs=plain.inputs, steps=plain.steps, outputs=plain.outputs, widths=open_ones
        )


def _points(raws: Sequence[Raw]) -> list[list[int]]:
    """Columns at which each value's segments begin, and its width."""
    found = [{0, raw.width} for raw in raws]
    before = -1
    while before != sum(map(len, found)):
        before = sum(map(len, found))
        for at, raw in enumerate(raws):
            if raw.op == "cut":
                whole, end = found[raw.args[0]], raw.first + raw.width
                whole |= {raw.first + each for each in found[at]}
                found[at] |= {each - raw.first for each in whole if raw.first <= each <= end}
                continue
            alike = [each for each in (at, *raw.args) if raws[each].width]
            if raw.width:
                union = set().union(*(found[each] for each in alike))
                for each in alike:
                    found[each] |= union
    return [sorted(each) for each in found]


def _classes(
    raws: Sequence[Raw], points: Sequence[Sequence[int]], order: Sequence[int]
) -> tuple[dict[int, tuple[int, ...]], list[int]]:
    """Class of each segment of each value, numbered in `order`, and the classes' widths."""
    parent: dict[tuple[int, int], tuple[int, int]] = {}

    def root(segment: tuple[int, int]) -> tuple[int, int]:
        while parent.setdefault(segment, segment) != segment:
            segment = parent[segment]
        return segment

    for at, raw in enumerate(raws):
        for arg in raw.args:
            if raws[arg].width and raw.width:
                shift = points[arg].index(raw.first) if raw.op == "cut" else 0
                for segment in range(len(points[at]) - 1):
                    parent[root((at, segment))] = root((arg, segment + shift))
    numbers: dict[tuple[int, int], int] = {}
    groups: dict[int, tuple[int, ...]] = {}
    sizes: list[int] = []
    for at in order:
        own = []
        for segment in range(len(points[at]) - 1):
            top = root((at, segment))
            if top not in numbers:
                numbers[top] = len(sizes)
                sizes.append(points[at][segment + 1] - points[at][segment])
            own.append(numbers[top])
        groups[at] = tuple(own)
    return groups, sizes


def _names(raws: Sequence[Raw], order: Sequence[int]) -> dict[int, str]:
    """A name for each value: its own, or after what it is, numbered from the second on."""
    wanted: dict[int, str] = {}
    for raw in raws:
        for arg, name in zip(raw.args, ARGUMENTS.get(raw.op, ("x",)), strict=False):
            wanted.setdefault(arg, name)
    taken: set[str] = set()
    found: dict[int, str] = {}
    for at in order:
        raw = raws[at]
        stem = (
            (TABLE[raw.op].name if raw.op in TABLE else "part")
            if raw.args
            else raw.name or wanted.get(at, "x")
        )
        name, number = stem, 2
        while name in taken:
            name, number = f"{stem}{number}", number + 1
        taken.add(name)
        found[at] = name
    return found

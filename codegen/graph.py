"""The graph of a program: torch.fx over the functional ops, one graph a pipeline stage.

What holds after capture and after every pass, and `verify` checks:

- the nodes are placeholders (what the runtime passes in), get_attr (weights and the rotary
  frequencies), call_function (an op of plans/ops.py, or getitem of an op with several results) and
  one output; definitions stand before uses; nothing but the last node has no use
- node.meta["value"] is what the op's rules say of its arguments (a Value, or a tuple of them)
- node.meta["parameter"] of a weight says which pieces of the checkpoint it is made of
- node.meta["layer"] is the model layer that a node belongs to, None before and behind the layers
- node.meta["name"] is the variable that its result gets in the emitted source
"""

import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from codegen import collectives
from codegen.kernels import KERNELS, load_reference, load_spec
from codegen.kernels.base import Spec, Value
from plans.ops import OPS

COLLECTIVES: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in collectives.COLLECTIVES
}
INV_FREQ = "model.inv_freq_H2"
"""The one get_attr that is no weight: emission writes its numbers into the program."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The call during which a stage holds most."""

    op: str
    layer: int | None
    values: int
    """Bytes of values that live before it and through it."""
    results: int
    inside: int
    """What it allocates besides its results."""

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.values + self.results + self.inside


@dataclass
class Program:
    """The graphs of the stages while passes work on them."""

    graphs: list[fx.Graph]
    target: str = "torch"
    """What the lower pass aims at: "torch", or "triton" or a library where an op has such one."""
    tp: int = 1
    """Ranks that share the weights; set by the shard pass."""
    peaks: list[Peak] = field(default_factory=list)
    """Where each stage holds most, set by the buffers pass."""

    @property
    def peak_bytes(self) -> list[int]:
        """Most bytes that each stage holds."""
        return [peak.bytes for peak in self.peaks]


def op_name(node: fx.Node) -> str | None:
    """Name of the op that a node calls; None for all other nodes, getitem included."""
    if node.op != "call_function" or node.target is operator.getitem:
        return None
    name: str = node.target.__name__  # type: ignore[union-attr]
    return name


def spec_of(node: fx.Node) -> Spec:
    """The rules of the op that a node calls; a generated op brings its own."""
    name = op_name(node)
    assert name is not None, f"{node.format_node()} calls nothing"
    own: Spec | None = getattr(node.target, "spec", None)
    return own or load_spec(name)


def calls(graph: fx.Graph, *ops: str) -> list[fx.Node]:
    """All calls of these ops, in order."""
    return [node for node in graph.nodes if op_name(node) in ops]


def value_of(node: fx.Node) -> Value:
    """The single value of a node."""
    value = node.meta["value"]
    assert isinstance(value, Value), f"{node} yields {value}"
    return value


def infer(node: fx.Node, tp: int) -> Value | tuple[Value, ...]:
    """What a call yields by the rules of its op."""
    args: Any = fx.node.map_arg(node.args, lambda each: each.meta["value"])
    if node.target is operator.getitem:
        parts, index = args
        result: Value | tuple[Value, ...] = parts[index]
        return result
    name = op_name(node)
    assert name is not None, f"{node.format_node()} calls nothing"
    if name in COLLECTIVES:
        return collectives.infer(name, args, tp)
    inferred: Value | tuple[Value, ...] = spec_of(node).infer(*args)
    return inferred


def call(
    graph: fx.Graph,
    op: str | Callable[..., Any],
    *args: Any,
    like: fx.Node,
    name: str,
    tp: int = 1,
) -> fx.Node:
    """Inserts a call of an op at the graph's insertion point, in the layer of the node `like`.

    op  its name, or the function itself where it is a generated one
    """
    function = op
    if isinstance(op, str):
        function = COLLECTIVES.get(op) or load_reference(op)
    assert callable(function), f"{op} is no op"
    node = graph.call_function(function, args)
    node.meta.update(layer=like.meta["layer"], name=name)
    node.meta["value"] = infer(node, tp)
    return node


def item(graph: fx.Graph, parts: fx.Node, index: int, name: str) -> fx.Node:
    """Inserts the access to one of several results."""
    node = graph.call_function(operator.getitem, (parts, index))
    node.meta.update(layer=parts.meta["layer"], name=name, value=parts.meta["value"][index])
    return node


def placeholder(graph: fx.Graph, name: str, value: Value) -> fx.Node:
    """The placeholder of that name, made behind the others if the graph has none."""
    there: list[fx.Node] = list(
        itertools.takewhile(lambda node: node.op == "placeholder", graph.nodes)
    )
    for each in there:
        if each.target == name:
            return each
    # without one to stand behind, fx inserts before the first node
    with graph.inserting_after(there[-1] if there else None):
        node = graph.placeholder(name)
    node.meta.update(layer=None, name=name, value=value)
    return node


def erase_unused(graph: fx.Graph) -> None:
    """Removes what no longer has a use."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op != "output":
            graph.erase_node(node)


def infer_again(graph: fx.Graph, tp: int) -> None:
    """Recomputes the values behind changed weights."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta["value"] = infer(node, tp)


def verify(program: Program) -> None:
    """Asserts the invariants of the module's docstring."""
    for graph in program.graphs:
        seen: set[fx.Node] = set()
        for node in graph.nodes:
            text = node.format_node()
            assert all(each in seen for each in node.all_input_nodes), f"used before: {text}"
            seen.add(node)
            if node.op == "output":
                assert node is list(graph.nodes)[-1], "the output stands last"
                continue
            assert node.users, f"dead: {text}"
            assert {"layer", "name", "value"} <= node.meta.keys(), f"meta is missing: {text}"
            if node.op == "get_attr":
                parameter = node.meta.get("parameter")
                assert parameter or node.target == INV_FREQ, f"no parameter: {text}"
                assert not parameter or parameter.shape == value_of(node).shape, f"shape: {text}"
            elif node.op == "call_function":
                _verify_call(node, program.tp)
            else:
                assert node.op == "placeholder", f"unexpected: {text}"


def _verify_call(node: fx.Node, tp: int) -> None:
    name, text = op_name(node), node.format_node()
    if name is not None and hasattr(node.target, "spec"):
        assert name not in KERNELS, f"a generated op has the name of another: {text}"
        assert name not in COLLECTIVES, f"a generated op has the name of another: {text}"
    elif name is not None:
        assert name in OPS, f"unknown op: {text}"
        assert name in KERNELS or name in COLLECTIVES, f"nothing computes {name}: {text}"
        least, more = len(OPS[name].inputs), len(OPS[name].optional)
        assert len(node.args) in {least, least + more}, f"arity of {name}: {text}"
        assert not node.kwargs, f"keywords: {text}"
    value = infer(node, tp)
    assert value == node.meta["value"], f"{node.meta['value']} should be {value}: {text}"


def text_of(graph: fx.Graph) -> str:
    """The graph as text, one node a line; what golden files and --dump-graph show."""
    number: dict[fx.Node, str] = {}
    return "".join(f"{line}\n" for line in _lines(graph, number))


def _lines(graph: fx.Graph, number: dict[fx.Node, str]) -> Iterator[str]:
    count = itertools.count()
    for node in graph.nodes:
        args = ", ".join(map(str, fx.node.map_arg(node.args, lambda each: _Name(number[each]))))
        if node.op == "output":
            yield f"return {args}"
            continue
        if node.op == "get_attr":
            number[node] = str(node.target)
            continue
        if node.op == "placeholder":
            number[node] = str(node.target)
            yield f"{node.target}: {node.meta['value']}"
            continue
        number[node] = f"%{next(count)}"
        value = node.meta["value"]
        shown = ", ".join(map(str, value if isinstance(value, tuple) else (value,)))
        notes = []
        if "target" in node.meta:
            notes.append(node.meta["target"])
        fused = _fused(node)
        if fused:
            notes.append(f"rows of {' '.join(fused)}")
        if node.meta.get("frees"):
            notes.append("frees " + " ".join(number[each] for each in node.meta["frees"]))
        if "holds" in node.meta and op_name(node):
            notes.append(f"holds {node.meta['holds']}")
        note = f"  # {'; '.join(notes)}" if notes else ""
        yield f"{number[node]} = {op_name(node) or 'item'}({args}): {shown}{note}"


def _fused(node: fx.Node) -> tuple[str, ...]:
    """Ops of the row-wise region that a call stands for."""
    name = op_name(node)
    return () if name is None or name in COLLECTIVES else spec_of(node).fused


class _Name(str):
    """Text that prints without quotes inside a tuple."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)

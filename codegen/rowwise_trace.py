"""Plain torch code of row-wise expressions as a graph of the table's ops.

    graph = traced(lambda x, w: torch.softmax(x * 0.5, -1) * w, x_value, w_value)

torch.fx traces the function; each call becomes one op of codegen/rowwise_table.py, or several:
softmax and the norms are reductions and pointwise ops, in fp32 from where torch computes them so.
The pass codegen/passes/rowwise.py then makes regions of them.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from codegen.graph import call
from codegen.kernels.base import Value
from codegen.rowwise_op import primitive
from codegen.rowwise_table import REDUCED, TABLE
from plans.errors import Infeasible

functional = torch.nn.functional
POINTWISE: Mapping[Any, str] = {
    **dict.fromkeys((operator.add, torch.add, "add"), "plus"),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), "sub"),
    **dict.fromkeys((operator.mul, torch.mul, "mul"), "times"),
    **dict.fromkeys((operator.truediv, torch.div, "div"), "div"),
    **dict.fromkeys((operator.neg, torch.neg, "neg"), "neg"),
    **dict.fromkeys((torch.sigmoid, functional.sigmoid, "sigmoid"), "sigmoid"),
    **dict.fromkeys((torch.tanh, functional.tanh, "tanh"), "tanh"),
    **dict.fromkeys((torch.relu, functional.relu, "relu"), "relu"),
    functional.silu: "silu",
    **{
        target: op
        for op in ("exp", "log", "sqrt", "rsqrt", "maximum", "minimum")
        for target in (getattr(torch, op), op)
    },
}
REDUCTIONS: Mapping[Any, str] = {
    **dict.fromkeys((torch.sum, "sum"), "sum"),
    **dict.fromkeys((torch.mean, "mean"), "mean"),
    **dict.fromkeys((torch.amax, "amax"), "max"),
}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def traced(function: Callable[..., Any], *values: Value) -> fx.Graph:
    """The graph of a function of tensors [.., width], columns [width] and numbers of rows [.., 1].

    raises  Infeasible for a call that is no row-wise op, and for a reduction of another dimension
            than the last, or that drops it
    """
    traced_graph = fx.symbolic_trace(function).graph
    making = _Making(fx.Graph())
    known: dict[fx.Node, Any] = {}
    given = iter(values)
    for node in traced_graph.nodes:
        args = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        if node.op == "placeholder":
            known[node] = making.input(str(node.target), next(given))
        elif node.op == "output":
            results = args[0][0]
            making.graph.output(results if isinstance(results, tuple) else (results,))
        else:
            known[node] = making.add(node.target, *args[0], **args[1])
    return making.graph


class _Making:
    """A graph under construction."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph

    def input(self, name: str, value: Value) -> fx.Node:
        """An argument of the function."""
        node = self.graph.placeholder(name)
        node.meta.update(layer=None, name=name, value=value)
        return node

    def op(self, op: str, *args: Any) -> fx.Node:
        """One op of the table; tensors of several types are taken in fp32, as torch does."""
        tensors = [each for each in args if isinstance(each, fx.Node)]
        values = [each.meta["value"] for each in tensors]
        types = {each.dtype for each in values if len(each.shape) > 1}
        shared = {each.dtype for each in values} if types != {"fp32"} else set()
        if op != "cast" and len(types | shared) > 1:
            args = tuple(self.wide(each) if isinstance(each, fx.Node) else each for each in args)
            tensors = [each for each in args if isinstance(each, fx.Node)]
        if not TABLE[op].torch:
            return call(self.graph, op, *args, like=tensors[0], name=TABLE[op].name)
        widest = max(each.meta["value"].shape[-1] for each in tensors)
        kinds = tuple(_kind(each, op, widest) for each in args)
        target = primitive(op, kinds)
        return call(self.graph, target, *args, like=tensors[0], name=TABLE[op].name)

    def wide(self, x: fx.Node) -> fx.Node:
        """In fp32."""
        return x if x.meta["value"].dtype == "fp32" else self.op("to_fp32", x)

    def as_before(self, wide: fx.Node, x: fx.Node) -> fx.Node:
        """In the type of x."""
        return wide if x.meta["value"].dtype == "fp32" else self.op("cast", wide, x)

    def add(self, target: Any, *args: Any, **options: Any) -> fx.Node:  # noqa: PLR0911 - one a sort
        """What a call of torch is made of."""
        if target in POINTWISE and not any(options.values()):  # such as inplace
            return self.op(POINTWISE[target], *args)
        if target in REDUCTIONS:
            return self.reduced(REDUCTIONS[target], *args, **options)
        if target is functional.gelu:
            kind = options.get("approximate", args[1] if len(args) > 1 else "none")
            return self.op("gelu_tanh" if kind == "tanh" else "gelu", args[0])
        if target in (torch.softmax, functional.softmax, "softmax"):
            return self.softmax(*args, **options)
        if target is functional.layer_norm:
            return self.layer_norm(*args, **options)
        if target is functional.rms_norm:
            return self.rms_norm(*args, **options)
        if target in (torch.square, "square"):
            return self.op("times", args[0], args[0])
        if target in (operator.pow, torch.pow, "pow") and args[1] == 2:
            return self.op("times", args[0], args[0])
        if target in ("float", "to") and self.casts(target, args):
            return self.wide(args[0])
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        raise Infeasible(
            "row-wise", f"{name} is no op of a row, as it is called here", ", ".join(sorted(TABLE))
        )

    def casts(self, target: str, args: tuple[Any, ...]) -> bool:
        """Whether a call makes fp32 of its argument."""
        return target == "float" or DTYPES.get(args[1]) == "fp32"

    def reduced(self, op: str, x: fx.Node, dim: Any = None, keepdim: bool = False) -> fx.Node:  # noqa: FBT001, FBT002 - as torch has it
        """A reduction of the last dimension that stays, with one column."""
        if dim not in (-1, (-1,), [-1]) or not keepdim:
            raise Infeasible("row-wise", f"{op} over {dim}, keepdim={keepdim}", "-1, keepdim=True")
        return self.op(op, x)

    def softmax(self, x: fx.Node, dim: int = -1, **options: Any) -> fx.Node:
        """exp(x - max) over its sum, in fp32."""
        if dim != -1 or any(value is not None for value in options.values()):
            raise Infeasible("row-wise", f"softmax over {dim} with {options}", "dim=-1")
        wide = self.wide(x)
        power = self.op("exp", self.op("sub", wide, self.op("max", wide)))
        return self.as_before(self.op("div", power, self.op("sum", power)), x)

    def layer_norm(
        self,
        x: fx.Node,
        normalized_shape: Any,
        weight: fx.Node | None = None,
        bias: fx.Node | None = None,
        eps: float = 1e-5,
    ) -> fx.Node:
        """(x - mean) / sqrt(variance + eps), times weight, plus bias, in fp32."""
        wide = self.wide(x)
        apart = self.op("sub", wide, self.op("mean", wide))
        variance = self.op("mean", self.op("times", apart, apart))
        found = self.op("times", apart, self.op("rsqrt", self.op("plus", variance, eps)))
        found = found if weight is None else self.op("times", found, weight)
        found = found if bias is None else self.op("plus", found, bias)
        return self.as_before(found, x)

    def rms_norm(
        self,
        x: fx.Node,
        normalized_shape: Any,
        weight: fx.Node | None = None,
        eps: float | None = None,
    ) -> fx.Node:
        """x / sqrt(mean(x^2) + eps), times weight, in fp32."""
        if eps is None:
            eps = float(torch.finfo(torch.float32).eps)
        wide = self.wide(x)
        mean = self.op("mean", self.op("times", wide, wide))
        found = self.op("times", wide, self.op("rsqrt", self.op("plus", mean, eps)))
        found = found if weight is None else self.op("times", found, weight)
        return self.as_before(found, x)


def _kind(arg: Any, op: str, widest: int) -> Any:
    """What an argument of an op is."""
    if not isinstance(arg, fx.Node):
        return "scalar"
    shape = arg.meta["value"].shape
    if len(shape) == 1:
        return "vector"
    return "number" if shape[-1] == 1 and widest != 1 and op not in REDUCED else "row"

"""Traces a model file into one graph over the functional ops.

Requires  the family's forward(token_ids_T, positions_T) calls only ops of plans/ops.py
Ensures   the invariants of graph.py, at tp 1, weights as in the checkpoint; shapes carry the
          letter T, so one graph serves steps of every size. No weight is allocated.
"""

import re
from typing import Any

import torch
from torch import fx

from codegen.graph import INV_FREQ, Program, erase_unused, infer, op_name
from codegen.kernels.base import Value
from codegen.models import load_model
from plans.errors import Infeasible
from plans.model import Model
from plans.ops import Parameter, Source

RUNNABLE = ("bf16", "fp16", "fp32")


class _Tracer(fx.Tracer):
    """Looks into every module: the ops are the leaves."""

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return False


def capture(model: Model) -> Program:
    """The program of a whole model, unsharded and unfused.

    errors  Infeasible for a weight dtype that no op takes; UnknownName for a family
    """
    if model.weight_dtype not in RUNNABLE:
        raise Infeasible(
            "weight dtype",
            f"{model.weight_dtype} weights need a scaled matrix product",
            f"programs run {', '.join(RUNNABLE)}",
            "weight_dtype bf16",
        )
    family = load_model(model.family)
    with torch.device("meta"):
        module = family(model)
    graph = _Tracer().trace(module)
    tensors = {**dict(module.named_parameters()), INV_FREQ: module.get_buffer(INV_FREQ)}
    for node in graph.nodes:
        _describe(node, tensors, model)
    _move_to_first_use(graph)
    erase_unused(graph)
    return Program(graphs=[graph])


def _describe(node: fx.Node, tensors: dict[str, torch.Tensor], model: Model) -> None:
    """Fills node.meta as graph.py says."""
    if node.op == "output":
        return
    layer = _layer(node)
    node.meta = {"layer": layer, "name": str(node.target)}
    if node.op == "placeholder":
        node.meta["value"] = Value(shape=("T",), dtype="int64")
        return
    if node.op == "get_attr":
        name = str(node.target)
        shape = tuple(tensors[name].shape)
        if name == INV_FREQ:
            node.meta.update(name="inv_freq_H2", value=Value(shape=shape, dtype="fp32"))
            return
        dtype = model.weight_dtype
        node.meta["value"] = Value(shape=shape, dtype=dtype)
        node.meta["parameter"] = Parameter(
            name=name, shape=shape, dtype=dtype, sources=(Source(name=name, shape=shape),)
        )
        return
    node.meta["value"] = infer(node, 1)
    node.meta["name"] = _variable(node)


def _layer(node: fx.Node) -> int | None:
    """Layer of a node: of the weights' name, else of the module whose forward made the call."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    path = str(node.target) if node.op == "get_attr" else ".".join(_paths(stack))
    found = re.search(r"\blayers\.(\d+)\b", path)
    return int(found[1]) if found else None


def _paths(stack: dict[str, Any]) -> list[str]:
    """Qualified names of the modules around a call; fx keeps (name, class) of each."""
    return [str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in stack.values()]


def _variable(node: fx.Node) -> str:
    """Name of a result: the residual stream, a norm of it, or what a projection is called."""
    op, first = op_name(node), node.args[0]
    source = str(first.meta["name"]) if isinstance(first, fx.Node) else ""
    fixed = {
        "add": "residual_TD",
        "attention": "out_TNH",
        "embedding": "residual_TD",
        "join_heads": "out_TO",
        "mul": "mlp_TF",
    }
    if op == "rms_norm" and source == "residual_TD":
        return "normed_TD"
    if op == "linear":
        weight = node.args[1]
        assert isinstance(weight, fx.Node), "linear reads a weight"
        return f"{str(weight.target).split('.')[-2].removesuffix('_proj')}_TO"
    if op == "split_heads":
        stem = source.removesuffix("_TO")
        return f"{stem}_T{'N' if stem == 'q' else 'K'}H"
    return fixed.get(str(op), source)


def _move_to_first_use(graph: fx.Graph) -> None:
    """One get_attr of each weight, right before its first use."""
    first: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        name = str(node.target)
        if name in first:
            node.replace_all_uses_with(first[name])
            graph.erase_node(node)
        else:
            first[name] = node

"""Ops that read or write the same memory become one op.

Requires  shapes in node.meta (capture.py); before page_attention, so that only ops of the model
          stand between a projection and its users
Ensures   no two linears read one value; no mul takes a silu of the same projection's other half; no
          silu_mul takes a linear that nothing else reads; no norm takes a sum with an all_reduce
          that nothing else reads. The numbers are those of the ops apart: joined weights give the
          same dot products, and each fused reference is its parts in sequence. Other sums and norms
          are left to rowwise.py
"""

import operator

from torch import fx

from codegen.graph import Program, call, calls, erase_unused, item, op_name, placeholder
from codegen.kernels.base import Value
from plans.ops import Parameter
from plans.plan import Plan


def fuse_projections(program: Program, plan: Plan) -> int:
    """Linears of one value become one linear and a split of its result (qkv, gate and up)."""
    return sum(_fuse_projections(graph) for graph in program.graphs)


def fuse_gate(program: Program, plan: Plan) -> int:
    """silu(first half) * second half of one projection becomes silu_mul."""
    return sum(_fuse_gate(graph) for graph in program.graphs)


def fuse_gate_up(program: Program, plan: Plan) -> int:
    """silu_mul of a projection that nothing else reads becomes gate_up_silu."""
    return sum(_fuse_gate_up(graph) for graph in program.graphs)


def fuse_all_reduce(program: Program, plan: Plan) -> int:
    """rms_norm of a sum with an all_reduce becomes all_reduce_add_rms_norm."""
    return sum(_fuse_all_reduce(graph) for graph in program.graphs)


def _fuse_projections(graph: fx.Graph) -> int:
    matches = 0
    for node in list(graph.nodes):
        linears = sorted(user for user in node.users if op_name(user) == "linear")  # by place
        biased = [linear for linear in linears if linear.args[2] is not None]
        if len(linears) > 1 and len(biased) in (0, len(linears)):
            _join(graph, node, linears)
            matches += 1
    erase_unused(graph)
    return matches


def _join(graph: fx.Graph, x: fx.Node, linears: list[fx.Node]) -> None:
    first = linears[0]
    with graph.inserting_before(first):
        weight = _joined(graph, [linear.args[1] for linear in linears])
        bias = _joined(graph, [linear.args[2] for linear in linears]) if first.args[2] else None
        stem = str(weight.target).split(".")[-2].removesuffix("_proj")
        whole = call(graph, "linear", x, weight, bias, like=first, name=f"{stem}_TO")
        sizes = tuple(linear.meta["value"].shape[-1] for linear in linears)
        parts = call(graph, "split", whole, sizes, like=first, name="parts")
        for index, linear in enumerate(linears):
            linear.replace_all_uses_with(item(graph, parts, index, linear.meta["name"]))


def _joined(graph: fx.Graph, nodes: list[fx.node.Argument]) -> fx.Node:
    """The weight that is the given ones joined on dim 0; q_proj, k_proj, v_proj give qkv_proj."""
    parameters: list[Parameter] = []
    for node in nodes:
        assert isinstance(node, fx.Node), "weights and biases are nodes"
        parameters.append(node.meta["parameter"])
    path, leaf = zip(*(parameter.name.rsplit(".", 2)[::2] for parameter in parameters), strict=True)
    stems = [parameter.name.split(".")[-2].removesuffix("_proj") for parameter in parameters]
    stem = ("" if all(len(each) == 1 for each in stems) else "_").join(stems)
    shape = (sum(each.shape[0] for each in parameters), *parameters[0].shape[1:])
    parameter = Parameter(
        name=f"{path[0]}.{stem}_proj.{leaf[0]}",
        shape=shape,
        dtype=parameters[0].dtype,
        sources=tuple(source for each in parameters for source in each.sources),
    )
    like = nodes[0]
    assert isinstance(like, fx.Node), "weights and biases are nodes"
    joined = graph.create_node("get_attr", parameter.name)
    joined.meta.update(
        layer=like.meta["layer"],
        name=parameter.name,
        parameter=parameter,
        value=Value(shape=shape, dtype=parameter.dtype),
    )
    return joined


def _fuse_gate(graph: fx.Graph) -> int:
    matches = 0
    for product in list(graph.nodes):
        if op_name(product) != "mul":
            continue
        gate, up = product.args
        assert isinstance(gate, fx.Node), "mul takes values"
        assert isinstance(up, fx.Node), "mul takes values"
        if op_name(gate) != "silu":
            continue
        halves = (gate.args[0], up)
        projection = _halved(halves)
        if projection is None:
            continue
        with graph.inserting_before(product):
            fused = call(graph, "silu_mul", projection, like=product, name=product.meta["name"])
        product.replace_all_uses_with(fused)
        matches += 1
    erase_unused(graph)
    return matches


def _halved(halves: tuple[fx.node.Argument, fx.Node]) -> fx.Node | None:
    """The value whose two equal parts these are, in order."""
    splits = []
    for index, half in enumerate(halves):
        if not isinstance(half, fx.Node) or half.target is not operator.getitem:
            return None
        split, at = half.args
        if not isinstance(split, fx.Node) or op_name(split) != "split" or at != index:
            return None
        splits.append(split)
    value, sizes = splits[0].args
    same = splits[0] is splits[1] and isinstance(sizes, tuple) and len(sizes) == 2
    halved = same and sizes[0] == sizes[1]  # type: ignore[index]
    return value if halved and isinstance(value, fx.Node) else None


def _fuse_gate_up(graph: fx.Graph) -> int:
    matches = 0
    for gated in calls(graph, "silu_mul"):
        projection = gated.args[0]
        assert isinstance(projection, fx.Node), "silu_mul takes a value"
        if op_name(projection) != "linear" or len(projection.users) > 1:
            continue
        x, weight, bias = projection.args
        if bias is not None:
            continue
        with graph.inserting_before(gated):
            fused = call(graph, "gate_up_silu", x, weight, like=gated, name=gated.meta["name"])
        gated.replace_all_uses_with(fused)
        matches += 1
    erase_unused(graph)
    return matches


def _fuse_all_reduce(graph: fx.Graph) -> int:
    matches = 0
    for norm in calls(graph, "rms_norm"):
        total = norm.args[0]
        assert isinstance(total, fx.Node), "a norm takes a value"
        terms = _reduced(total)
        # what reads the sum would have to stand behind the one call that yields it
        if terms is None or any(user < norm for user in total.users):
            continue
        _reduce_in(graph, norm, total, terms)
        matches += 1
    erase_unused(graph)
    for node in calls(graph, "all_reduce"):
        if all(user.meta.get("layer") is None for user in node.users):
            node.meta["layer"] = None  # a stage's last sum: no other layer has one left
    return matches


def _reduce_in(
    graph: fx.Graph, norm: fx.Node, total: fx.Node, terms: tuple[fx.Node, fx.Node]
) -> None:
    """Puts the one call in place of a norm and, for all who read it, of its sum."""
    _, weight, eps = norm.args
    op, name = "all_reduce_add_rms_norm", norm.meta["name"]
    comm = placeholder(graph, "comm", Value(shape=(), dtype="comm"))
    with graph.inserting_before(norm):
        fused = call(graph, op, *terms, weight, eps, comm, like=norm, name=name)
        normed = item(graph, fused, 0, name)
        if len(total.users) > 1:
            summed = item(graph, fused, 1, total.meta["name"])
            total.replace_all_uses_with(summed, delete_user_cb=lambda user: user is not norm)
    norm.replace_all_uses_with(normed)


def _reduced(total: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(what the ranks add up, what is added to their sum); None for any other value."""
    if op_name(total) != "add":
        return None
    for reduced, residual in (total.args, total.args[::-1]):
        assert isinstance(reduced, fx.Node), "add takes values"
        assert isinstance(residual, fx.Node), "add takes values"
        if op_name(reduced) == "all_reduce" and len(reduced.users) == 1 and reduced is not residual:
            share = reduced.args[0]
            assert isinstance(share, fx.Node), "all_reduce takes a value"
            return share, residual
    return None

"""When each value's memory is free again, and how much is alive at once.

Requires  the final ops in their final order
Ensures   node.meta["frees"] of every call lists the values that nothing reads behind it, views with
          the value they look into; program.peak_bytes has the largest sum of live values of each
          stage for a step of the plan's largest size, with what fused ops hold inside. Weights and
          cache are not counted; the hidden state that a stage is given is, and lives throughout
"""

import operator

from torch import fx

from codegen.graph import COLLECTIVES, Program, op_name, spec_of
from codegen.kernels.base import Value
from plans.plan import Plan

PAGES = {"kv_write": 2, "qkv_rope_write 1": 7}
"""Results, by op and index, that are pages with new content, and which argument has those."""


def plan_buffers(program: Program, plan: Plan) -> int:
    """Finds lifetimes; returns how many calls free other values than before."""
    sizes = {"T": plan.scheduler.max_step_tokens, "R": plan.limits.sequences, "pages": 0}
    matches = 0
    program.peak_bytes = []
    for graph in program.graphs:
        changed, peak = _plan_graph(graph, sizes)
        matches += changed
        program.peak_bytes.append(peak)
    return matches


def storage(node: fx.Node) -> fx.Node:
    """The node whose memory a value lies in."""
    if node.target is operator.getitem:
        parent, index = node.args
        assert isinstance(parent, fx.Node), "getitem takes a call"
        place = PAGES.get(f"{op_name(parent)} {index}")
        if place is not None:
            return _argument(parent, place)
        return storage(parent) if _is_view(parent) else node
    if _is_view(node):
        return storage(_argument(node, PAGES.get(f"{op_name(node)}", 0)))
    return node


def _argument(node: fx.Node, place: int) -> fx.Node:
    argument = node.args[place]
    assert isinstance(argument, fx.Node), "a view looks into a value"
    return argument


def _is_view(node: fx.Node) -> bool:
    op = op_name(node)
    return op is not None and op not in COLLECTIVES and spec_of(node).view


def _plan_graph(graph: fx.Graph, sizes: dict[str, int]) -> tuple[int, int]:
    last_use: dict[fx.Node, fx.Node] = {}
    lying_in: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            lying_in.setdefault(storage(node), []).append(node)
        for each in node.all_input_nodes:
            last_use[storage(each)] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for root, user in last_use.items():
        if root.op != "call_function" or _is_of_all_layers(root):
            continue
        if user.target is not operator.getitem:
            dying.setdefault(user, []).append(root)
    changed, live, peak = 0, 0, 0
    for node in graph.nodes:
        if node.op == "placeholder" and node.target == "hidden_TD":
            live += node.meta["value"].storage_bytes(sizes)
        if node.op != "call_function":
            continue
        frees = tuple(
            each for root in dying.get(node, ()) for each in lying_in[root] if not _has_parts(each)
        )
        made = _made_bytes(node, sizes)
        peak = max(peak, live + made + _scratch_bytes(node, sizes))
        unused = made - sum(
            value.storage_bytes(sizes) for value in _kept(node) if isinstance(value, Value)
        )
        live += made - unused
        live -= sum(
            each.meta["value"].storage_bytes(sizes) for each in frees if storage(each) is each
        )
        changed += node.meta.get("frees") != frees
        node.meta["frees"] = frees
    return changed, peak


def _is_of_all_layers(node: fx.Node) -> bool:
    """Whether a value is made before the layers for all of them: it lives until the stage ends.

    Freed in the last layer, it would be what tells that layer's source from the others'.
    """
    return node.meta["layer"] is None and len({each.meta.get("layer") for each in node.users}) > 1


def _has_parts(node: fx.Node) -> bool:
    """Whether a node yields several values, which have their own nodes."""
    return isinstance(node.meta["value"], tuple)


def _made_bytes(node: fx.Node, sizes: dict[str, int]) -> int:
    """Bytes that a call allocates for its results."""
    if node.target is operator.getitem or _is_view(node):
        return 0
    value = node.meta["value"]
    values = value if isinstance(value, tuple) else (value,)
    return sum(each.storage_bytes(sizes) for each in values)


def _scratch_bytes(node: fx.Node, sizes: dict[str, int]) -> int:
    """Bytes that a call allocates besides its results."""
    op = op_name(node)
    if op is None or op in COLLECTIVES:
        return 0
    scratch = spec_of(node).scratch
    if scratch is None:
        return 0
    values = scratch(*fx.node.map_arg(node.args, lambda each: each.meta["value"]))
    return sum(value.storage_bytes(sizes) for value in values)


def _kept(node: fx.Node) -> list[Value]:
    """The results of a call that something reads."""
    if node.target is operator.getitem or _is_view(node):
        return []
    value = node.meta["value"]
    if isinstance(value, Value):
        return [value]
    parts: list[Value] = [user.meta["value"] for user in node.users]
    return parts

"""When each value's memory is free again, and how much is alive at once.

Requires  the final ops in their final order, with their targets
Ensures   node.meta["frees"] of every call lists the values that nothing reads behind it, views with
          the value they look into; program.peak_bytes has the most bytes that each stage holds in
          the plan's largest steps: live values, what calls hold inside (Spec.scratch; what torch's
          operations allocate), and what they leave for later calls. Weights, cache and a step's
          inputs are not counted; the hidden state that a stage is given is, and lives throughout.
          node.meta["holds"] has the bytes during each call, program.peaks where they are most
"""

import operator
from typing import Any

from torch import fx

from codegen import collectives
from codegen.graph import COLLECTIVES, Peak, Program, op_name, spec_of
from codegen.kernels.base import Largest, Scratch, Value
from codegen.meta import scratch_bytes
from plans.plan import Plan

PAGES = {"kv_write": 2, "qkv_rope_write 1": 7}
"""Results, by op and index, that are pages with new content, and which argument has those."""


def plan_buffers(program: Program, plan: Plan) -> int:
    """Finds lifetimes; returns how many calls free other values than before."""
    held = _Held(plan)
    matches = 0
    program.peaks = []
    for graph in program.graphs:
        changed, peak = _plan_graph(graph, held)
        matches += changed
        program.peaks.append(peak)
    return matches


def largest_steps(plan: Plan) -> Largest:
    """The steps for which memory is counted."""
    tokens = plan.scheduler.max_step_tokens
    keys = min(plan.limits.context_tokens, plan.kv.tokens_per_kvp_shard)
    chunks = [
        (min(row.chunk_tokens, tokens, keys), min(row.until_tokens, keys))
        for row in plan.prefill.chunks
    ]
    return Largest(
        sizes={"T": tokens, "R": min(plan.limits.sequences, tokens), "pages": 0},
        keys=keys,
        pool=plan.kv.pages_per_rank * plan.kv.page_tokens,
        chunks=tuple(dict.fromkeys(chunks)),
    )


class _Held:
    """Bytes that calls hold, each sort of call counted once."""

    def __init__(self, plan: Plan) -> None:
        self.steps = largest_steps(plan)
        self.mesh = plan.parallelism
        self._scratch: dict[object, int] = {}
        self.leaving: set[Scratch] = set()
        """Of Spec.kept, what has been counted."""

    def of(self, value: Value) -> int:
        """Bytes of a value."""
        return value.storage_bytes(self.steps.sizes)

    def made(self, node: fx.Node) -> int:
        """Bytes that a call allocates for its results."""
        if node.target is operator.getitem or _is_view(node):
            return 0
        value = node.meta["value"]
        values = value if isinstance(value, tuple) else (value,)
        return sum(map(self.of, values))

    def scratch(self, node: fx.Node) -> int:
        """Bytes that a call allocates besides its results."""
        op = op_name(node)
        if op is None:
            return 0
        args = fx.node.map_arg(node.args, lambda each: each.meta["value"])
        key = op, node.meta.get("target"), str(args)
        if key not in self._scratch:
            self._scratch[key] = self._scratch_of(node, op, args)
        return self._scratch[key]

    def kept(self, node: fx.Node) -> int:
        """Bytes that a call leaves for later ones, if it is the first."""
        op = op_name(node)
        if op is None or op in COLLECTIVES:
            return 0
        kept = spec_of(node).kept.get(node.meta.get("target", "torch"))
        if kept is None or kept in self.leaving:
            return 0
        self.leaving.add(kept)
        return kept(self.steps, *fx.node.map_arg(node.args, lambda each: each.meta["value"]))

    def _scratch_of(self, node: fx.Node, op: str, args: Any) -> int:
        if op in COLLECTIVES:
            sizes, mesh = self.steps.sizes, self.mesh
            return collectives.scratch(op, args, sizes, tp=mesh.tp, kvp=mesh.kvp)
        spec, target = spec_of(node), node.meta.get("target", "torch")
        declared = spec.scratch.get(target)
        if declared is not None:
            return declared(self.steps, *args)
        if target != "torch" or spec.view is True:
            return 0
        return scratch_bytes(node.target, args, self.steps.sizes)  # type: ignore[arg-type]


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
    if op is None or op in COLLECTIVES:
        return op in collectives.IN_PLACE
    view = spec_of(node).view
    if isinstance(view, bool):
        return view
    return view(*fx.node.map_arg(node.args, lambda each: each.meta["value"]))


def _plan_graph(graph: fx.Graph, held: _Held) -> tuple[int, Peak]:
    lying_in, dying = _lifetimes(graph)
    held.leaving.clear()
    changed, live, kept = 0, 0, 0
    peak = Peak(op="", layer=None, values=0, results=0, inside=0)
    for node in graph.nodes:
        if node.op == "placeholder" and node.target == "hidden_TD":
            live += held.of(node.meta["value"])
        if node.op != "call_function":
            continue
        frees = tuple(
            each for root in dying.get(node, ()) for each in lying_in[root] if not _has_parts(each)
        )
        made = held.made(node)
        kept += held.kept(node)
        here = Peak(
            op=op_name(node) or "",
            layer=node.meta["layer"],
            values=live + kept,
            results=made,
            inside=held.scratch(node),
        )
        peak = max(peak, here, key=lambda each: each.bytes)
        node.meta["holds"] = here.bytes
        live += sum(held.of(value) for value in _kept(node))
        live -= sum(held.of(each.meta["value"]) for each in frees if storage(each) is each)
        changed += node.meta.get("frees") != frees
        node.meta["frees"] = frees
    return changed, peak


def _lifetimes(
    graph: fx.Graph,
) -> tuple[dict[fx.Node, list[fx.Node]], dict[fx.Node, list[fx.Node]]]:
    """By value, the values that lie in its memory; by call, the values whose last reader it is."""
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
    return lying_in, dying


def _is_of_all_layers(node: fx.Node) -> bool:
    """Whether a value is made before the layers for all of them: it lives until the stage ends.

    Freed in the last layer, it would be what tells that layer's source from the others'.
    """
    return node.meta["layer"] is None and len({each.meta.get("layer") for each in node.users}) > 1


def _has_parts(node: fx.Node) -> bool:
    """Whether a node yields several values, which have their own nodes."""
    return isinstance(node.meta["value"], tuple)


def _kept(node: fx.Node) -> list[Value]:
    """The results of a call that something reads."""
    if node.target is operator.getitem or _is_view(node):
        return []
    value = node.meta["value"]
    if isinstance(value, Value):
        return [value]
    parts: list[Value] = [user.meta["value"] for user in node.users]
    return parts

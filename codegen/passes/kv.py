"""Attention of a whole sequence becomes attention over the paged cache; what feeds it, one op.

Requires  stages cut and sharded
Ensures   no attention is left; each layer writes its keys and values at slots_T and then reads its
          own pages; with kvp > 1 the groups' partial results are merged. Projection, norms,
          rotation and write of a layer are one op where pages have the projection's type or are in
          fp8, and all layers of a stage share its sines and cosines. On a step that holds whole
          sequences the numbers are the same
"""

import operator
from dataclasses import dataclass

from torch import fx

from codegen.graph import (
    INV_FREQ,
    Program,
    call,
    calls,
    erase_unused,
    item,
    op_name,
    placeholder,
    value_of,
)
from codegen.kernels.base import Value
from plans.plan import Plan


def page_attention(program: Program, plan: Plan) -> int:
    """Replaces attention; returns how often."""
    return sum(
        _page_attention(graph, first, plan)
        for graph, (first, _) in zip(program.graphs, plan.stages, strict=True)
    )


def _page_attention(graph: fx.Graph, first: int, plan: Plan) -> int:
    found = calls(graph, "attention")
    for node in found:
        q, k, v, scale = node.args
        assert isinstance(k, fx.Node), "attention takes values"
        heads = value_of(k).shape[1:]
        pages = Value(shape=("pages", plan.kv.page_tokens, *heads), dtype=plan.kv.dtype)
        layer = node.meta["layer"] - first
        cache = [placeholder(graph, f"{side}_pages_{layer}", pages) for side in "kv"]
        scales = []
        if plan.kv.dtype == "fp8":  # a page's keys of a head share one
            scale_of = Value(shape=("pages", heads[0]), dtype="fp32")
            scales = [placeholder(graph, f"{side}_scales_{layer}", scale_of) for side in "kv"]
        slots = placeholder(graph, "slots_T", Value(shape=("T",), dtype="int64"))
        inputs = placeholder(graph, "inputs", Value(shape=(), dtype="inputs"))
        with graph.inserting_before(node):
            written = call(
                graph, "kv_write", k, v, *cache, slots, *scales, like=node, name="written"
            )
            args = (q, *cache, written, inputs, scale, *scales)
            both = call(graph, "paged_attention", *args, like=node, name="both")
            out = item(graph, both, 0, "out_TNH")
            if plan.parallelism.kvp > 1:
                lse = item(graph, both, 1, "lse_TN")
                out = call(graph, "merge", out, lse, like=node, name="out_TNH")
        node.replace_all_uses_with(out)
        graph.erase_node(node)
    assert all(node.target is not operator.getitem or node.users for node in graph.nodes)
    return len(found)


def fuse_qkv_write(program: Program, plan: Plan) -> int:
    """Projection, norms, rotation and write of keys become qkv_rope_write; returns how often."""
    return sum(_fuse_qkv_write(graph) for graph in program.graphs)


@dataclass(frozen=True, kw_only=True)
class _Heads:
    """Queries or keys on their way from a projection to attention."""

    projection: fx.Node
    place: int
    """Of them among its parts."""
    norm: tuple[fx.node.Argument, ...]
    """Weight and eps; empty for none."""
    turn: tuple[fx.node.Argument, ...]
    """Positions, frequencies and scale."""
    turned: fx.Node


def _fuse_qkv_write(graph: fx.Graph) -> int:
    matches = 0
    for write in calls(graph, "kv_write"):
        k, v, *cache = write.args
        keys, values = _turned(k), _part(v)
        if keys is None or values is None:
            continue
        queries = _queries(keys)
        if queries is None or values != (keys.projection, 2):
            continue
        pages = cache[0]
        assert isinstance(pages, fx.Node), "pages are placeholders"
        if value_of(pages).dtype not in {value_of(keys.projection).dtype, "fp8"}:
            continue
        angles = _rotary(graph, keys.turn)
        weights = keys.projection.args
        weight, eps = (None, 0.0) if not keys.norm else keys.norm
        norms = (queries.norm[0] if queries.norm else None, weight, eps)
        with graph.inserting_before(write):
            args = (*weights, *norms, angles, *cache)
            fused = call(graph, "qkv_rope_write", *args, like=write, name="both")
            q = item(graph, fused, 0, queries.turned.meta["name"])
            written = item(graph, fused, 1, write.meta["name"])
        queries.turned.replace_all_uses_with(q)
        write.replace_all_uses_with(written)
        erase_unused(graph)
        matches += 1
    return matches


def _part(node: fx.node.Argument) -> tuple[fx.Node, int] | None:
    """The projection of which these heads are a part, and the part's place."""
    if not isinstance(node, fx.Node) or op_name(node) != "split_heads":
        return None
    part = node.args[0]
    if not isinstance(part, fx.Node) or part.target is not operator.getitem:
        return None
    split, place = part.args
    if not isinstance(split, fx.Node) or op_name(split) != "split" or len(split.users) != 3:
        return None
    projection = split.args[0]
    alone = isinstance(projection, fx.Node) and len(projection.users) == 1
    if not alone or op_name(projection) != "linear":  # type: ignore[arg-type]
        return None
    return projection, place  # type: ignore[return-value]


def _turned(node: fx.node.Argument) -> _Heads | None:
    """Heads that are rotated, and normed before if they are."""
    if not isinstance(node, fx.Node) or op_name(node) != "rope":
        return None
    heads, *turn = node.args
    norm: tuple[fx.node.Argument, ...] = ()
    if isinstance(heads, fx.Node) and op_name(heads) == "rms_norm":
        heads, *rest = heads.args
        norm = tuple(rest)
    found = _part(heads)
    if found is None:
        return None
    return _Heads(projection=found[0], place=found[1], norm=norm, turn=tuple(turn), turned=node)


def _queries(keys: _Heads) -> _Heads | None:
    """The rotated first part of the projection whose second are these keys."""
    split = next(iter(keys.projection.users))
    for node in calls(split.graph, "rope"):
        found = _turned(node)
        if found is not None and found.projection is keys.projection and found.place == 0:
            alike = found.turn == keys.turn and found.norm[1:] == keys.norm[1:]
            return found if alike and keys.place == 1 else None
    return None


def _rotary(graph: fx.Graph, turn: tuple[fx.node.Argument, ...]) -> fx.Node:
    """The sines and cosines of a stage's step, made before its layers."""
    for node in calls(graph, "rotary"):
        if node.args == turn:
            return node
    first = next(node for node in graph.nodes if node.op == "call_function")
    frequencies = next(node for node in graph.nodes if node.target == INV_FREQ)
    first.prepend(frequencies)
    with graph.inserting_before(first):
        made = call(graph, "rotary", *turn, like=frequencies, name="cos_sin_T2H2")
    made.meta["layer"] = None
    return made

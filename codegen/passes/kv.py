"""Attention of a whole sequence becomes attention over the paged cache.

Requires  stages cut and sharded
Ensures   no attention is left; each layer writes its keys and values at slots_T and then reads its
          own pages; with kvp > 1 the groups' partial results are merged. On a step that holds whole
          sequences the numbers are the same
"""

import operator

from torch import fx

from codegen.graph import Program, call, calls, item, placeholder, value_of
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
        slots = placeholder(graph, "slots_T", Value(shape=("T",), dtype="int64"))
        inputs = placeholder(graph, "inputs", Value(shape=(), dtype="inputs"))
        with graph.inserting_before(node):
            written = call(graph, "kv_write", k, v, *cache, slots, like=node, name="written")
            args = (q, *cache, written, inputs, scale)
            both = call(graph, "paged_attention", *args, like=node, name="both")
            out = item(graph, both, 0, "out_TNH")
            if plan.parallelism.kvp > 1:
                lse = item(graph, both, 1, "lse_TN")
                out = call(graph, "merge", out, lse, like=node, name="out_TNH")
        node.replace_all_uses_with(out)
        graph.erase_node(node)
    assert all(node.target is not operator.getitem or node.users for node in graph.nodes)
    return len(found)

"""Tensor parallelism: each rank holds a share of every matrix (arXiv 1909.08053).

Requires  graphs with whole weights, projections not yet fused
Ensures   with tp > 1: matrices that read the residual stream are split by rows of the weight
          (heads, ffn, vocabulary), those that read a split value by columns, behind which an
          all_reduce adds the shares up; KV heads that do not suffice are held by several ranks; the
          embedding and the head are split by vocabulary where tp divides it. All of it follows from
          which values are split, not from names. With tp 1 nothing changes
"""

from torch import fx

from codegen.graph import Program, call, infer_again, op_name, value_of
from codegen.kernels.base import Value
from plans.ops import Parameter, Source
from plans.plan import Plan

WHOLE = (None, "all_gather", "all_reduce")
"""What yields whole values from split ones; None is the output."""


def shard(program: Program, plan: Plan) -> int:
    """Splits weights and inserts collectives; returns the number of products split."""
    program.tp = plan.parallelism.tp
    if program.tp == 1:
        return 0
    return sum(_shard_graph(graph, program.tp) for graph in program.graphs)


def _shard_graph(graph: fx.Graph, tp: int) -> int:
    split: set[fx.Node] = set()
    matches = 0
    for node in list(graph.nodes):
        op = op_name(node)
        if op == "embedding":
            matches += _shard_embedding(graph, node, tp)
        elif op == "linear":
            matches += _shard_linear(graph, node, tp, split)
        elif op not in WHOLE and any(each in split for each in node.all_input_nodes):
            assert op not in ("add", "select_rows", "to_fp32"), f"{op} of a split value"
            split.add(node)
    infer_again(graph, tp)
    return matches


def _share(weight: fx.Node, dim: int, shards: int) -> bool:
    """Makes a weight this rank's piece; False where it is one already."""
    parameter: Parameter = weight.meta["parameter"]
    (source,) = parameter.sources
    if source.shard_dim is not None:
        return False
    size, rest = divmod(source.shape[dim], shards)
    assert rest == 0, f"{shards} ranks share dim {dim} of {source.name} {source.shape}"
    shape = (*source.shape[:dim], size, *source.shape[dim + 1 :])
    piece = Source(name=source.name, shape=source.shape, shard_dim=dim, shards=shards)
    weight.meta["parameter"] = Parameter(
        name=parameter.name, shape=shape, dtype=parameter.dtype, sources=(piece,)
    )
    weight.meta["value"] = Value(shape=shape, dtype=parameter.dtype)
    return True


def _shard_embedding(graph: fx.Graph, node: fx.Node, tp: int) -> int:
    token_ids, weight = node.args
    assert isinstance(weight, fx.Node), "an embedding reads a weight"
    parameter: Parameter = weight.meta["parameter"]
    if parameter.sources[0].shape[0] % tp:
        return 0
    _share(weight, 0, tp)
    name = node.meta["name"]
    with graph.inserting_before(node):
        first = call(graph, "vocab_offset", _rows(weight), like=node, name="first_row")
        part = call(graph, "embedding_share", token_ids, weight, first, like=node, name=name)
        whole = call(graph, "all_reduce", part, like=node, name=name)
    node.replace_all_uses_with(whole)
    graph.erase_node(node)
    return 1


def _rows(weight: fx.Node) -> int:
    """Rows of a weight on this rank."""
    rows = value_of(weight).shape[0]
    assert isinstance(rows, int), "weights have sizes"
    return rows


def _shard_linear(graph: fx.Graph, node: fx.Node, tp: int, split: set[fx.Node]) -> int:
    x, weight, bias = node.args
    assert isinstance(weight, fx.Node), "a linear reads a weight"
    parameter: Parameter = weight.meta["parameter"]
    users = {op_name(user) for user in node.users}
    if x in split:
        assert bias is None, f"{parameter.name}: a bias would be added by every rank"
        if not _share(weight, 1, tp):
            return 0
        _collect(graph, node, "all_reduce")
        return 1
    if users <= {"to_fp32", "all_gather"}:  # the head
        if parameter.sources[0].shape[0] % tp or "all_gather" in users:
            return 0
        _share(weight, 0, tp)
        _collect(graph, node, "all_gather")
        return 1
    split.add(node)
    shards = tp
    for user in node.users:
        if op_name(user) == "split_heads":
            head_dim = user.args[1]
            assert isinstance(head_dim, int), "heads have a size"
            heads = parameter.sources[0].shape[0] // head_dim
            shards = min(tp, heads)
            assert tp % shards == 0, f"{tp} ranks and {heads} heads of {parameter.name}"
    if isinstance(bias, fx.Node):
        _share(bias, 0, shards)
    return int(_share(weight, 0, shards))


def _collect(graph: fx.Graph, node: fx.Node, op: str) -> None:
    """Puts a collective between a product and its users; shapes are inferred again later."""
    with graph.inserting_after(node):
        whole = call(graph, op, node, like=node, name=node.meta["name"])
    node.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)

"""One graph becomes one a pipeline stage, and only sampled rows get logits.

Requires  a captured program: node.meta["layer"] rises along the graph, and between two layers one
          value, the residual stream, is alive
Ensures   graph k holds the layers of plan.stages[k]; every stage but the first takes hidden_TD,
          every stage but the last returns it; the head reads the rows sample_rows_R
"""

from torch import fx

from codegen.graph import Program, call, calls, placeholder, value_of
from codegen.kernels.base import Value
from plans.plan import Plan


def cut_stages(program: Program, plan: Plan) -> int:
    """Cuts between stages, and the one selection of rows; returns their number."""
    matches = 0
    if len(program.graphs) < len(plan.stages):
        program.graphs = _cut(program.graphs[0], plan.stages)
        matches += len(plan.stages) - 1
    return matches + _select_rows(program.graphs[-1])


def _select_rows(graph: fx.Graph) -> int:
    """Puts select_rows before the head and lets its shapes say R instead of T."""
    if calls(graph, "select_rows"):
        return 0
    head = calls(graph, "linear")[-1]
    hidden = head.args[0]
    assert isinstance(hidden, fx.Node), "the head reads the last norm"
    rows = placeholder(graph, "sample_rows_R", Value(shape=("R",), dtype="int64"))
    with graph.inserting_before(head):
        selected = call(graph, "select_rows", hidden, rows, like=head, name="sampled_RD")
    head.replace_input_with(hidden, selected)
    for node in (head, *head.users):
        if node.op == "call_function":
            value = value_of(node)
            node.meta["value"] = Value(shape=("R", *value.shape[1:]), dtype=value.dtype)
            node.meta["name"] = "logits_RV"
    return 1


def _stage_of(graph: fx.Graph, stages: tuple[tuple[int, int], ...]) -> dict[fx.Node, int]:
    """Stage of each call: by its layer; the embedding before and the head behind them."""
    stage_of_layer = {
        layer: stage for stage, (first, end) in enumerate(stages) for layer in range(first, end)
    }
    found: dict[fx.Node, int] = {}
    outside = 0
    for node in graph.nodes:
        if node.op == "call_function":
            layer = node.meta["layer"]
            if layer is not None:
                outside = len(stages) - 1
            found[node] = outside if layer is None else stage_of_layer[layer]
    return found


def _cut(graph: fx.Graph, stages: tuple[tuple[int, int], ...]) -> list[fx.Graph]:
    stage_of = _stage_of(graph, stages)
    output = next(node for node in graph.nodes if node.op == "output")
    copies = []
    for stage in range(len(stages)):
        carried = _carried(stage_of, stage)
        leaving = _carried(stage_of, stage + 1)
        copy = fx.Graph()
        known: dict[fx.Node, fx.Node] = {}
        for node in (node for node, at in stage_of.items() if at == stage):
            for each in node.all_input_nodes:
                if each not in known:
                    known[each] = _enter(copy, each, known, carried)
            known[node] = copy.node_copy(node, known.__getitem__)
        last = leaving or output.args[0]
        assert isinstance(last, fx.Node), "one value leaves a stage"
        if leaving is not None:
            known[last].meta["layer"] = None  # behind the layers, as the last norm is
        copy.output(known[last])
        copies.append(copy)
    return copies


def _enter(
    copy: fx.Graph, node: fx.Node, known: dict[fx.Node, fx.Node], carried: fx.Node | None
) -> fx.Node:
    """Brings a weight, an input or the residual stream into a stage's graph."""
    if node.op == "get_attr":
        return copy.node_copy(node)
    if node.op == "placeholder":
        return placeholder(copy, str(node.target), value_of(node))
    assert node is carried, f"{node} and {carried} both cross a cut"
    hidden = placeholder(copy, "hidden_TD", value_of(node))
    hidden.meta["name"] = node.meta["name"]
    return hidden


def _carried(stage_of: dict[fx.Node, int], stage: int) -> fx.Node | None:
    """The one value made before a stage and used in it or later; None at the program's ends."""
    crossing = [
        node
        for node, at in stage_of.items()
        if at < stage and any(stage_of.get(user, -1) >= stage for user in node.users)
    ]
    assert len(crossing) <= 1, f"{crossing} cross the cut before stage {stage}"
    return crossing[0] if crossing else None

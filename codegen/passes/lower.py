"""Each op gets the kernel that computes it.

Requires  the final ops
Ensures   node.meta["target"] of every compute op is "torch" or "triton"; collectives have none
"""

from torch import fx

from codegen.graph import COLLECTIVES, Program, op_name, value_of
from codegen.kernels import load_spec
from plans.plan import Plan


def lower(program: Program, plan: Plan) -> int:
    """Chooses targets; returns how many ops changed theirs."""
    matches = 0
    for graph in program.graphs:
        for node in graph.nodes:
            op = op_name(node)
            if op is None or op in COLLECTIVES:
                continue
            target = program.target if _takes(node, op, program.target) else "torch"
            matches += node.meta.get("target") != target
            node.meta["target"] = target
    return matches


def _takes(node: fx.Node, op: str, target: str) -> bool:
    """Whether the op's file for the target is made for the shapes and types of this call."""
    spec = load_spec(op)
    if target == "torch" or spec.takes is None:
        return target in spec.targets
    args = [value_of(each) if isinstance(each, fx.Node) else each for each in node.args]
    return target in spec.targets and spec.takes(*args)

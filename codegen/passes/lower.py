"""Each op gets the kernel that computes it.

Requires  the final ops
Ensures   node.meta["target"] of every compute op is "torch", "triton" or one of its libraries, the
          first that takes it of: the program's target, "triton", "torch"; collectives have none
"""

from torch import fx

from codegen.graph import COLLECTIVES, Program, op_name, spec_of, value_of
from plans.plan import Plan


def lower(program: Program, plan: Plan) -> int:
    """Chooses targets; returns how many calls changed theirs.

    All calls of an op have one, since a program holds one file of it. By tokens of a step, the file
    chooses among the ways of spec.ranges.
    """
    found: dict[str, list[fx.Node]] = {}
    for graph in program.graphs:
        for node in graph.nodes:
            op = op_name(node)
            if op is not None and op not in COLLECTIVES:
                found.setdefault(op, []).append(node)
    wanted = ("torch",) if program.target == "torch" else (program.target, "triton")
    matches = 0
    for nodes in found.values():
        taking = (each for each in wanted if all(_takes(node, each) for node in nodes))
        target = next(taking, "torch")
        for node in nodes:
            matches += node.meta.get("target") != target
            node.meta["target"] = target
    return matches


def _takes(node: fx.Node, target: str) -> bool:
    """Whether the op's file for the target is made for the shapes and types of this call."""
    spec = spec_of(node)
    takes = spec.libraries.get(target) or (spec.takes if target == "triton" else None)
    if target not in (*spec.targets, *spec.libraries) or takes is None:
        return target in spec.targets
    args = [value_of(each) if isinstance(each, fx.Node) else each for each in node.args]
    return takes(*args)

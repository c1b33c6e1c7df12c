"""Each op gets the kernel that computes it.

Requires  the final ops
Ensures   node.meta["target"] of every compute op is "torch" or "triton"; collectives have none
"""

from codegen.graph import COLLECTIVES, Program, op_name
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
            target = program.target if program.target in load_spec(op).targets else "torch"
            matches += node.meta.get("target") != target
            node.meta["target"] = target
    return matches

"""Adds the compiled program to a plan: the only planner module that imports codegen and torch."""

import hashlib

from msgspec import structs

from codegen.emit import emit_program
from plans.errors import Infeasible
from plans.plan import Plan


def compile_plan(plan: Plan, *, dump_graph: bool = False) -> tuple[Plan, dict[str, bytes]]:
    """The plan with its kernels and the sha256 of every program file; and the files by path.

    dump_graph  adds graphs/<name>.txt, which the runtime does not need and the plan does not hash
    raises      Infeasible("activations") where the program's buffers exceed what the plan set aside
    """
    program = emit_program(plan, dump_graph=dump_graph)
    most = max(program.peak_activation_bytes)
    if most > plan.memory.activations_bytes:
        raise Infeasible(
            "activations",
            f"the program holds {most} bytes at once in a step of"
            f" {plan.scheduler.max_step_tokens} tokens",
            f"the plan sets {plan.memory.activations_bytes} aside",
        )
    files = dict(sorted(program.files.items()))
    hashes = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    plan = structs.replace(plan, kernels=program.kernels, files=hashes)
    graphs = {f"graphs/{name}.txt": text.encode() for name, text in sorted(program.graphs.items())}
    return plan, files | graphs

"""Adds the compiled program to a plan: the only planner module that imports codegen and torch."""

import hashlib

from codegen.emit import emit_program
from msgspec import structs

from plans.plan import Plan


def compile_plan(plan: Plan, *, dump_graph: bool = False) -> tuple[Plan, dict[str, bytes]]:
    """The plan with its kernels and the sha256 of every program file; and the files by path.

    dump_graph  adds graphs/<stage>.txt, which the runtime does not need and the plan does not hash
    """
    program = emit_program(plan, dump_graph=dump_graph)
    files = dict(sorted(program.files.items()))
    hashes = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    plan = structs.replace(plan, kernels=program.kernels, files=hashes)
    graphs = {f"graphs/{name}.txt": text.encode() for name, text in sorted(program.graphs.items())}
    return plan, files | graphs

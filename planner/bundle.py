"""Adds the compiled program to a plan: the only planner module that imports codegen and torch."""

import hashlib
from importlib.metadata import PackageNotFoundError, version

from msgspec import structs

from codegen.emit import default_target, emit_program
from codegen.kernels import KERNELS, load_spec
from codegen.tune import source_sha256
from planner.tuned import Choice, choose
from plans.check_program import MADE_FOR, made_for
from plans.errors import Infeasible
from plans.plan import Plan


def compile_plan(
    plan: Plan, *, dump_graph: bool = False, attention: str = "ours"
) -> tuple[Plan, dict[str, bytes]]:
    """The plan with its kernels and the sha256 of every program file; and the files by path.

    Kernels get the parameters that were tuned on the plan's device; where none fit, the plan's
    notes say so.

    attention   "flash-attn" lets that package compute attention, where a GPU runs the plan
    dump_graph  adds graphs/<name>.txt, which the runtime does not need and the plan does not hash
    raises      Infeasible("activations") where the program's buffers exceed what the plan set aside
    """
    choice = tuned(plan)
    target = default_target(plan)
    if attention == "flash-attn" and target == "triton":
        target = "flash_attn"
    program = emit_program(plan, target=target, dump_graph=dump_graph, params=choice.params)
    most = max(program.peak_activation_bytes)
    if most > plan.memory.activations_bytes:
        raise Infeasible(
            "activations",
            f"the program holds {most} bytes at once in a step of"
            f" {plan.scheduler.max_step_tokens} tokens",
            f"the plan sets {plan.memory.activations_bytes} aside",
        )
    files = dict(sorted((program.files | {MADE_FOR: made_for(plan)}).items()))
    hashes = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    predicted = structs.replace(plan.predicted, notes=(*plan.predicted.notes, *choice.notes))
    plan = structs.replace(plan, kernels=program.kernels, files=hashes, predicted=predicted)
    graphs = {f"graphs/{name}.txt": text.encode() for name, text in sorted(program.graphs.items())}
    return plan, files | graphs


def tuned(plan: Plan) -> Choice:
    """Parameters for the plan's kernels; none where it runs without ours."""
    if default_target(plan) != "triton":
        return Choice(params={}, notes=())
    try:
        triton = version("triton")
    except PackageNotFoundError:  # planning alone works where no wheel of it exists
        triton = "none"
    return choose(plan, _sha256, triton, space=_space)


def _sha256(op: str) -> str:
    """Of an op's kernel here; of nothing where it has none, which no record equals."""
    has_kernel = op in KERNELS and "triton" in load_spec(op).targets
    return source_sha256(op) if has_kernel else ""


def _space(op: str) -> dict[str, tuple[int, ...]]:
    """Values of the tunables of an op: its defaults, and what any of its searches tries."""
    spec = load_spec(op)
    found = {name: {value} for name, value in spec.params.items()}
    searched = set()
    for search in spec.searches:
        for name, values in search.values.items():
            found[name].update(values)
            searched.add(name)
    return {name: tuple(sorted(each)) if name in searched else () for name, each in found.items()}

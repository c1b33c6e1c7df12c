"""Writes the program of a plan: one readable Python file a stage, and the ops that they call.

A file imports torch, triton and its siblings in the same folder, nothing else of ours, so a bundle
runs without this package. Same plan, same bytes.
"""

from dataclasses import dataclass, field
from typing import Literal

from codegen.capture import capture
from codegen.graph import COLLECTIVES, Program, op_name, text_of, verify
from codegen.kernels import load_spec, source_texts
from codegen.passes import PASSES
from codegen.stage_source import stage_source
from plans.plan import Kernel, Plan

Target = Literal["torch", "triton"]


@dataclass(frozen=True, kw_only=True)
class EmittedProgram:
    """What emission yields."""

    files: dict[str, bytes]
    """Path inside the bundle to content, sorted by path."""
    kernels: tuple[Kernel, ...]
    """One row an op, sorted by op; goes into the plan."""
    peak_activation_bytes: tuple[int, ...]
    """Largest sum of live values of each stage, for scheduler.max_step_tokens and limits.sequences.

    Scratch memory inside an op is not in it."""
    matches: dict[str, int] = field(default_factory=dict)
    """How often each pass changed something, in their order."""
    graphs: dict[str, str] = field(default_factory=dict)
    """The program's graphs after capture and after each pass, by numbered name; only if asked."""


def default_target(plan: Plan) -> Target:
    """Where a program without a named target runs: kernels of ours on a GPU, torch on a CPU."""
    return "torch" if "cpu" in plan.topology.device.lower() else "triton"


def emit_program(
    plan: Plan, *, target: Target | None = None, dump_graph: bool = False
) -> EmittedProgram:
    """Compiles the model of a plan as the plan spreads it.

    target  None takes default_target(plan); "triton" uses our kernels where an op has one
    errors  Infeasible for weights that no op takes; UnknownName for a model family
    """
    program = capture(plan.model)
    program.target = target or default_target(plan)
    verify(program)
    graphs = {"0-capture": _dump(program)} if dump_graph else {}
    matches = {}
    for number, apply in enumerate(PASSES, 1):
        matches[apply.__name__] = apply(program, plan)
        verify(program)
        if dump_graph:
            graphs[f"{number}-{apply.__name__}"] = _dump(program)
    targets = _targets(program)
    files = {
        f"program/{name}.py": text.encode()  # as it stands in this package: written to be copied
        for op, target in targets.items()
        for name, text in source_texts(op, target).items()
    }
    for stage, graph in enumerate(program.graphs):
        text = stage_source(graph, plan=plan, stage=stage, peak_bytes=program.peak_bytes[stage])
        files[f"program/stage_{stage}.py"] = text.encode()
    return EmittedProgram(
        files=dict(sorted(files.items())),
        kernels=tuple(
            Kernel(
                op=op,
                target=target,
                params=dict(load_spec(op).params) if target == "triton" else {},
                file=f"program/{op}.py",
            )
            for op, target in targets.items()
        ),
        peak_activation_bytes=tuple(program.peak_bytes),
        matches=matches,
        graphs=graphs,
    )


def _targets(program: Program) -> dict[str, Target]:
    """Target of each compute op of the program, sorted by op."""
    found: dict[str, Target] = {}
    for graph in program.graphs:
        for node in graph.nodes:
            op = op_name(node)
            if op is not None and op not in COLLECTIVES:
                found[op] = node.meta["target"]
    return dict(sorted(found.items()))


def _dump(program: Program) -> str:
    return "\n".join(
        f"stage {stage}\n{text_of(graph)}" for stage, graph in enumerate(program.graphs)
    )

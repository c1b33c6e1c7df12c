"""Writes the program of a plan: one readable Python file a stage, and the ops that they call.

A file imports torch, triton and its siblings in the same folder, nothing else of ours, so a bundle
runs without this package. Same plan, same bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from codegen.capture import capture
from codegen.graph import COLLECTIVES, Program, op_name, spec_of, text_of, verify
from codegen.kernels import source_texts
from codegen.kernels.base import Range, Spec
from codegen.passes import PASSES
from codegen.stage_source import stage_source
from plans.plan import Kernel, Plan, When

Target = Literal["torch", "triton", "flash_attn"]


@dataclass(frozen=True, kw_only=True)
class EmittedProgram:
    """What emission yields."""

    files: dict[str, bytes]
    """Path inside the bundle to content, sorted by path."""
    kernels: tuple[Kernel, ...]
    """One row an op and range of tokens, sorted by op, fewest tokens first; goes into the plan."""
    peak_activation_bytes: tuple[int, ...]
    """Largest sum of live values of each stage, for scheduler.max_step_tokens and limits.sequences.

    What fused ops hold inside is in it, what others do is not."""
    matches: dict[str, int] = field(default_factory=dict)
    """How often each pass changed something, in their order."""
    graphs: dict[str, str] = field(default_factory=dict)
    """The program's graphs after capture and after each pass, by numbered name; only if asked."""


def default_target(plan: Plan) -> Target:
    """Where a program without a named target runs: kernels of ours on a GPU, torch on a CPU."""
    return "torch" if "cpu" in plan.topology.device.lower() else "triton"


def emit_program(
    plan: Plan,
    *,
    target: Target | None = None,
    dump_graph: bool = False,
    params: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
) -> EmittedProgram:
    """Compiles the model of a plan as the plan spreads it.

    target  None takes default_target(plan); "triton" uses our kernels where an op has one,
            "flash_attn" does too, but for attention, which that package then computes
    params  by op, tuned values of its kernel's params; what is not named keeps its default
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
        for op, (spec, target) in targets.items()
        for name, text in source_texts(op, target, params.get(op, {}), spec.sources).items()
    }
    for stage, graph in enumerate(program.graphs):
        text = stage_source(graph, plan=plan, stage=stage, peak_bytes=program.peak_bytes[stage])
        files[f"program/stage_{stage}.py"] = text.encode()
    return EmittedProgram(
        files=dict(sorted(files.items())),
        kernels=tuple(
            row
            for op, (spec, target) in targets.items()
            for row in _rows(spec, target, {**spec.params, **params.get(op, {})})
        ),
        peak_activation_bytes=tuple(program.peak_bytes),
        matches=matches,
        graphs=graphs,
    )


def _targets(program: Program) -> dict[str, tuple[Spec, Target]]:
    """Rules and target of each compute op of the program, sorted by op."""
    found: dict[str, tuple[Spec, Target]] = {}
    for graph in program.graphs:
        for node in graph.nodes:
            op = op_name(node)
            if op is not None and op not in COLLECTIVES:
                found[op] = spec_of(node), node.meta["target"]
    return dict(sorted(found.items()))


def _rows(spec: Spec, target: Target, params: Mapping[str, int]) -> Iterator[Kernel]:
    """Rows of an op in the plan: one for each range of tokens that its file treats in its own way.

    params  all of the op's, tuned or not
    """
    op, file = spec.op, f"program/{spec.op}.py"
    if target != "triton":
        yield Kernel(op=op, target=target, file=file)
        return
    ranges = spec.ranges or (Range(target="triton", params=tuple(params)),)
    for each in ranges:
        yield Kernel(
            op=op,
            when=When(tokens_max=params[each.tokens_max] if each.tokens_max else None),
            target=each.target,
            params={name: params[name] for name in each.params},
            file=file,
        )


def _dump(program: Program) -> str:
    return "\n".join(
        f"stage {stage}\n{text_of(graph)}" for stage, graph in enumerate(program.graphs)
    )

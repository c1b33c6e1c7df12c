"""Writes the program of a plan: one readable Python file a stage, and the ops that they call.

A file imports torch, triton and its siblings in the same folder, nothing else of ours, so a bundle
runs without this package. Same plan, same bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from codegen.capture import capture
from codegen.dump import Dump
from codegen.graph import COLLECTIVES, Program, op_name, spec_of, verify
from codegen.kernels import load_spec, source_texts
from codegen.kernels.base import Range, Spec
from codegen.passes import PASSES
from codegen.stage_source import stage_source
from plans.plan import Kernel, Plan, When

Target = Literal["torch", "triton", "flash_attn"]
SAMPLER = "sample"
"""Op that draws tokens, for the last stage of a program with kernels of ours."""
EXCHANGE = ("kvp_pack", "kvp_merge")
"""Ops between which the runtime swaps bytes, for every stage of such a program whose kvp groups
merge heads that they take."""


@dataclass(frozen=True, kw_only=True)
class EmittedProgram:
    """What emission yields."""

    files: dict[str, bytes]
    """Path inside the bundle to content, sorted by path."""
    kernels: tuple[Kernel, ...]
    """One row an op and range of tokens, sorted by op, fewest tokens first; goes into the plan."""
    peak_activation_bytes: tuple[int, ...]
    """Most bytes that each stage holds in the plan's largest steps (codegen/passes/buffers.py):
    without weights, pages, a step's inputs and what libraries take for themselves."""
    matches: dict[str, int] = field(default_factory=dict)
    """How often each pass changed something, in their order."""
    graphs: dict[str, str] = field(default_factory=dict)
    """The program's graphs after capture and after each pass, by numbered name, and `summary` with
    all passes' matches and where the stages hold most; only if asked."""


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
    dump = Dump(program) if dump_graph else None
    matches = {}
    for apply in PASSES:
        matches[apply.__name__] = apply(program, plan)
        verify(program)
        if dump is not None:
            dump.add(apply.__name__, matches[apply.__name__])
    targets = _targets(program)
    samples = program.target != "torch"
    exchange = EXCHANGE if samples and _exchanges(program) else ()
    # not of the graph: one draws from what the last stage returns, the others are comm.merge's
    for op in (*exchange, *([SAMPLER] if samples else [])):
        targets[op] = load_spec(op), "triton"
    targets = dict(sorted(targets.items()))
    files = {
        f"program/{name}.py": text.encode()  # as it stands in this package: written to be copied
        for op, (spec, target) in targets.items()
        for name, text in source_texts(op, target, params.get(op, {}), spec.sources).items()
    }
    for stage, graph in enumerate(program.graphs):
        last = stage == len(program.graphs) - 1
        text = stage_source(
            graph,
            plan=plan,
            stage=stage,
            peak_bytes=program.peak_bytes[stage],
            sampler=SAMPLER if samples and last else None,
            exchange=exchange,
        )
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
        graphs=dump.texts(plan) if dump is not None else {},
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


def _exchanges(program: Program) -> bool:
    """Whether kvp groups merge heads that the kernels of EXCHANGE are made for."""
    takes = load_spec(EXCHANGE[0]).takes
    assert takes is not None, "the spec says which heads"
    return any(
        op_name(node) == "merge" and takes(*(each.meta["value"] for each in node.all_input_nodes))
        for graph in program.graphs
        for node in graph.nodes
    )


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
        if each.tokens_max and not params[each.tokens_max]:
            continue  # no step is that small
        yield Kernel(
            op=op,
            when=When(tokens_max=params[each.tokens_max] if each.tokens_max else None),
            target=each.target,
            params={name: params[name] for name in each.params},
            file=file,
        )

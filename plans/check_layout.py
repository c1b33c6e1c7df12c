"""Invariants of what a plan places where: machine, ranks, layers, workload and program files.

Each function yields (path, message) for every place that breaks it; plans/check.py runs them.
"""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import PurePosixPath

from plans.mesh import axis_ranks
from plans.plan import Plan
from plans.topology import Topology, fabric_problems
from plans.workload import Quantile, Workload

ATTENTION = "program/paged_attention.py"
"""File of an op that no compiled program is without."""
SHARE_TOLERANCE = 1e-6
"""Absolute: shares are written with a few digits, such as 0.333333."""


def devices(plan: Plan) -> Iterator[tuple[str, str]]:
    mesh, machine = plan.parallelism, plan.topology
    if mesh.idle < 0:
        yield "parallelism.idle", f"{mesh.idle} devices idle, at least 0 are"
    if mesh.ranks + mesh.idle != machine.devices:
        yield (
            "parallelism",
            (
                f"tp {mesh.tp} x spp {mesh.spp} x kvp {mesh.kvp} x replicas {mesh.replicas} + idle "
                f"{mesh.idle} = {mesh.ranks + mesh.idle} devices, the topology has nodes "
                f"{machine.nodes} x devices_per_node {machine.devices_per_node} = {machine.devices}"
            ),
        )


def fabric(plan: Plan) -> Iterator[tuple[str, str]]:
    machine = plan.topology
    if machine.fabric is None:
        yield from _missing_links(machine)
        return
    if machine.links:
        yield "topology.links", "is not empty, and topology.fabric says what joins the devices"
    for path, text in fabric_problems(machine.fabric, machine.devices_per_node, machine.nodes):
        yield f"topology.{path}", text


def _missing_links(machine: Topology) -> Iterator[tuple[str, str]]:
    """Without one, whatever crosses it would cost nothing."""
    across = {
        "node": (machine.devices_per_node, "devices of a node"),
        "cluster": (machine.nodes, "nodes"),
    }
    for scope, (count, what) in across.items():
        if count > 1 and machine.link(scope) is None:
            yield "topology.links", f"none has scope {scope}, and {count} {what} need one"


def rank_map(plan: Plan) -> Iterator[tuple[str, str]]:
    mesh, machine, placement = plan.parallelism, plan.topology, plan.placement
    sizes = (("rank_map", placement.rank_map, mesh.ranks), ("idle", placement.idle, mesh.idle))
    for field, devices, wanted in sizes:
        if len(devices) != wanted:
            yield f"placement.{field}", f"has {len(devices)} devices, parallelism has {wanted}"
        for row, (node, device) in enumerate(devices):
            if not (0 <= node < machine.nodes and 0 <= device < machine.devices_per_node):
                yield (
                    f"placement.{field}[{row}]",
                    (
                        f"[{node}, {device}] is outside {machine.nodes} nodes of "
                        f"{machine.devices_per_node} devices"
                    ),
                )
    uses = Counter([*placement.rank_map, *placement.idle])
    for (node, device), times in uses.items():
        if times > 1:
            yield "placement", f"device [{node}, {device}] stands {times} times, each stands once"


def tp_in_node(plan: Plan) -> Iterator[tuple[str, str]]:
    for rank in range(0, plan.parallelism.ranks, plan.parallelism.tp):
        group = axis_ranks(plan.parallelism, rank, "tp")
        nodes = sorted({plan.placement.rank_map[each][0] for each in group})
        if len(nodes) > 1:
            yield (
                f"placement.rank_map[{rank}]",
                f"tp group of ranks {group[0]} to {group[-1]} spans nodes {nodes}, one is allowed",
            )


def heads(plan: Plan) -> Iterator[tuple[str, str]]:
    model = plan.model
    if model.heads % model.kv_heads:
        yield "model.heads", f"{model.heads} is no multiple of kv_heads {model.kv_heads}"
    if model.latent is not None and model.kv_heads != model.heads:
        yield "model.kv_heads", f"{model.kv_heads} with latent attention, which has {model.heads}"
    if model.latent is not None and model.head_dim != model.latent.nope_dim + model.latent.rope_dim:
        yield "model.head_dim", f"{model.head_dim} is not latent.nope_dim + latent.rope_dim"
    if model.head_dim % 2:
        yield "model.head_dim", f"{model.head_dim} is odd, RoPE turns pairs"


def tensor_split(plan: Plan) -> Iterator[tuple[str, str]]:
    model, tp = plan.model, plan.parallelism.tp
    widths = {"heads": model.heads, "vocab": model.vocab}
    if model.dense_layers:
        widths["ffn"] = model.ffn
    if model.experts is not None:
        widths |= {"experts.ffn": model.experts.ffn, "experts.shared_ffn": model.experts.shared_ffn}
    for field, width in widths.items():
        if width % tp:
            yield f"model.{field}", f"{width} does not divide by tp {tp}"
    if model.kv_heads % tp and tp % model.kv_heads:
        yield "model.kv_heads", f"{model.kv_heads} and tp {tp}: neither divides the other"


def stages(plan: Plan) -> Iterator[tuple[str, str]]:
    stages, layers = plan.stages, plan.model.layers
    if len(stages) != plan.parallelism.spp:
        yield "stages", f"has {len(stages)} stages, parallelism.spp is {plan.parallelism.spp}"
    at = 0
    for row, (first, end) in enumerate(stages):
        if first != at:
            yield f"stages[{row}]", f"starts at layer {first}, the one before ends at {at}"
        if end <= first:
            yield f"stages[{row}]", f"[{first}, {end}] holds no layer"
        at = end
    if at != layers:
        yield "stages", f"end at layer {at}, the model has {layers} layers"


def context(plan: Plan) -> Iterator[tuple[str, str]]:
    model, wanted = plan.model, plan.limits.context_tokens
    if wanted <= model.context_limit:
        return
    scaling = model.rope.scaling
    rule = f"{wanted} exceeds model.context_limit {model.context_limit}"
    if scaling is None:
        yield "limits.context_tokens", f"{rule} and model.rope has no scaling"
        return
    reach = scaling.factor * scaling.original_context_tokens
    if reach < wanted:
        yield (
            "limits.context_tokens",
            (
                f"{rule}; rope.scaling reaches factor {scaling.factor} x original_context_tokens "
                f"{scaling.original_context_tokens} = {reach:.0f}"
            ),
        )
    if not scaling.assumed:
        yield "model.rope.scaling.assumed", f"is false, but limits.context_tokens {rule}"


def _quantiles(table: tuple[Quantile, ...], path: str) -> Iterator[tuple[str, str]]:
    if len(table) < 2 or table[0][0] != 0.0 or table[-1][0] != 1.0:
        yield path, "starts at quantile 0 and ends at quantile 1, or lengths have no bounds"
    for row, ((below_q, below), (at_q, at)) in enumerate(pairwise(table), start=1):
        if at_q <= below_q:
            yield f"{path}[{row}]", f"quantile {at_q} does not exceed the row before it ({below_q})"
        if at < below:
            yield f"{path}[{row}]", f"{at} tokens are fewer than in the row before it ({below})"


def workload(plan: Plan) -> Iterator[tuple[str, str]]:
    for path, text in workload_problems(plan.workload):
        yield f"workload.{path}", text


def workload_problems(given: Workload) -> Iterator[tuple[str, str]]:
    """(path, message) for each rule that a workload breaks, in a plan or in a file of its own."""
    if not given.classes:
        yield "classes", "is empty, at least one class is needed"
        return
    for row, each in enumerate(given.classes):
        yield from _quantiles(each.input_tokens, f"classes[{row}].input_tokens")
        yield from _quantiles(each.output_tokens, f"classes[{row}].output_tokens")
    for name, times in Counter(each.name for each in given.classes).items():
        if times > 1:
            yield "classes", f"{name!r} names {times} classes"
    total = sum(each.share for each in given.classes)
    if abs(total - 1) > SHARE_TOLERANCE:
        terms = " + ".join(str(each.share) for each in given.classes)
        yield "classes", f"shares {terms} = {total}, not 1"


def targets(plan: Plan) -> Iterator[tuple[str, str]]:
    known = [each.name for each in plan.workload.classes]
    for name in plan.targets.classes:
        if name not in known:
            yield f"targets.classes.{name}", f"no class of the workload; known: {', '.join(known)}"


def files(plan: Plan) -> Iterator[tuple[str, str]]:
    for name, digest in plan.files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name:
            yield (
                f'files["{name}"]',
                "is no plain path inside the bundle, such as program/stage_0.py",
            )
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            yield f'files["{name}"]', f"{digest!r} is no sha256 of 64 hex digits"


def kernels(plan: Plan) -> Iterator[tuple[str, str]]:
    """Rows agree with each other, with the files and with the device; no file is read."""
    if ATTENTION in plan.files and not plan.kernels:
        yield "kernels", f"is empty, and files has ops of a program, such as {ATTENTION}"
    on_cpu = "cpu" in plan.topology.device.lower()
    for row, kernel in enumerate(plan.kernels):
        here = f"kernels[{row}]"
        if kernel.file not in plan.files:
            yield f"{here}.file", f"{kernel.file!r} is not among files"
        if kernel.file != (own := f"program/{kernel.op}.py"):
            yield f"{here}.file", f"{kernel.file!r} is not that of op {kernel.op!r}, {own}"
        if on_cpu and kernel.target != "torch":
            where = f"topology.device is {plan.topology.device}"
            yield f"{here}.target", f"{kernel.target} needs a GPU, {where}; nearest: torch"
        for name, value in kernel.params.items():
            if value < 0:
                yield f"{here}.params.{name}", f"{value} is negative"
    yield from _ranges(plan)


def _ranges(plan: Plan) -> Iterator[tuple[str, str]]:
    """Each op has one row for any number of tokens: bounds rise, the last row has none."""
    bounds: dict[str, int | None] = {}
    for row, kernel in enumerate(plan.kernels):
        most, before = kernel.when.tokens_max, bounds.get(kernel.op, 0)
        if before is None:
            yield f"kernels[{row}].op", f"{kernel.op!r} again; a row above is for all its steps"
        elif most is not None and most <= before:
            yield (
                f"kernels[{row}].when.tokens_max",
                f"{most} does not exceed {before} of a row above",
            )
        bounds[kernel.op] = most
    for op, bound in bounds.items():
        if bound is not None:
            yield "kernels", f"{op!r} has no row for steps of more than {bound} tokens"

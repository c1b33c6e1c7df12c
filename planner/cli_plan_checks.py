"""Flags of medha-plan that would change nothing, or destroy something: refused before the work."""

from pathlib import Path

from planner.folder import check_inputs, check_target
from planner.question import Question
from plans.errors import UsageError
from plans.model import Model
from plans.topology import Device


def check_attention(ask: Question, device: Device, model: Model, *, kernels: bool) -> None:
    """Raises UsageError where the flag would change nothing."""
    if ask.attention == "ours":
        return
    flag = f"--attention {ask.attention}"
    if device.kind == "cpu":
        raise UsageError(f"{flag}: {device.name} has no GPU; nearest: ours")
    if not kernels:
        raise UsageError(f"{flag}: --no-kernels makes no program; leave one of the two out")
    dtype = ask.weight_dtype if ask.weight_dtype in {"bf16", "fp8"} else model.weight_dtype
    if gaps := model.unsupported_with(dtype):
        bf16 = " or --weight-dtype bf16" if gaps == ("fp8 weights",) else ""
        names = " and ".join(gaps)
        raise UsageError(f"{flag}: {names} cannot be run yet; nearest: --attention ours{bf16}")


def check_graphs(model: Model, *, kernels: bool, dump_graph: bool) -> None:
    """Raises UsageError where there would be no graph to add."""
    why = "--no-kernels makes no program; leave one of the two out"
    if kernels and model.unsupported:
        why = f"{' and '.join(model.unsupported)} cannot be run yet, so there is no program"
    if dump_graph and (not kernels or model.unsupported):
        raise UsageError(f"--dump-graph: {why}")


def check_out(folder: Path, ask: Question, *, overwrite: bool) -> None:
    """Raises UsageError where the folder may not be written, or holds what is asked about."""
    inputs = {"--model": ask.model, "--topology": ask.topology, "--workload": ask.workload}
    check_inputs(folder, inputs)
    check_target(folder, overwrite=overwrite)

"""medha-plan: searches, explains, writes the bundle; or evaluates a plan that was edited."""

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from planner.question import (
    DEFAULT_HARDWARE,
    DEFAULT_WORKLOAD,
    Question,
    rate,
    seconds,
    tokens,
)
from plans.errors import InvalidFile, MedhaError, UsageError
from runtime.interrupts import INTERRUPTED, loading, started, unwinding

if TYPE_CHECKING:
    from planner.search import NoPlan
    from planner.world import World
    from plans.plan import Plan
    from plans.topology import Device, Topology

MOST_GPUS = 16384
"""What --gpus takes at most, and where the search for a sufficient number ends."""
WITH_A_PLAN = {"plan_file", "prompt_tokens", "format_", "export_"}
"""Parameters that mean something when a plan is given."""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def plan(  # noqa: PLR0917 (typer reads one parameter a flag)
    context: typer.Context,
    plan_file: Annotated[
        Path | None,
        typer.Argument(metavar="[PLAN.yaml]", help="Check and evaluate this plan instead."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Catalog name, hub id, or folder with a config.json.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs in total, not per node.")] = None,
    hardware: Annotated[str, typer.Option(help="Device of the catalog.")] = DEFAULT_HARDWARE,
    topology: Annotated[
        Path | None,
        typer.Option(
            metavar="NAME|FILE", help="Node type, as --detect prints it, instead of the device's."
        ),
    ] = None,
    max_context: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Longest prompt and answer; k and m are 1024-based. [default: the workload's]",
        ),
    ] = None,
    workload: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Lengths of requests.")
    ] = DEFAULT_WORKLOAD,
    ttft_slo: Annotated[
        str | None,
        typer.Option(
            metavar="S",
            help="Hard limit on the first token of a lone prompt at the 90th percentile of the"
            " short classes (of all where none is short); 2, 2s or 500ms.",
        ),
    ] = None,
    tbt_slo: Annotated[
        str | None,
        typer.Option(metavar="S", help="Hard limit on the time between tokens at full context."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Candidates to print.")] = 5,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Bundle folder. [default: the plan's name]")
    ] = None,
    objective: Annotated[
        Literal["goodput", "latency", "max-context", "min-gpus"],
        typer.Option(help="What the best plan has most, or least, of."),
    ] = "goodput",
    rate_: Annotated[
        str | None,
        typer.Option("--rate", metavar="R", help="Requests a second that the plan must sustain."),
    ] = None,
    weight_dtype: Annotated[
        Literal["auto", "bf16", "fp8"] | None,
        typer.Option(help="Instead of the model's; auto: whichever plans better."),
    ] = None,
    kv_dtype: Annotated[
        Literal["auto", "bf16", "fp8"] | None,
        typer.Option(help="Of the KV cache, instead of the activations'."),
    ] = None,
    attention: Annotated[
        Literal["ours", "flash-attn"],
        typer.Option(help="flash-attn: by that package, which the GPUs' machine must have."),
    ] = "ours",
    effort: Annotated[
        Literal["quick", "full"],
        typer.Option(help="quick: three short replays; full: long ones, and capacity measured."),
    ] = "quick",
    format_: Annotated[
        Literal["table", "json"], typer.Option("--format", help="json prints one object.")
    ] = "table",
    no_kernels: Annotated[
        bool, typer.Option("--no-kernels", help="Plan only, no program.")
    ] = False,
    dump_graph: Annotated[
        bool, typer.Option("--dump-graph", help="Add the lowered graphs to the bundle.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a bundle that is there.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Recorded in the plan.")] = 0,
    prompt_tokens: Annotated[
        str | None,
        typer.Option(metavar="N", help="With PLAN.yaml: also predict a prompt of this length."),
    ] = None,
    export_: Annotated[
        Literal["sglang", "torchrun", "vllm"] | None,
        typer.Option("--export", help="Also launch scripts; with PLAN.yaml, print them."),
    ] = None,
    detect: Annotated[
        bool, typer.Option("--detect", help="Print this machine as a topology YAML.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of plans.")
    ] = False,
) -> None:
    """Plans the serving of a model on a number of GPUs and writes the bundle that runs it."""
    try:
        if schema:
            _refuse_other_flags(context, {"schema"}, "--schema stands alone")
            _print_schema()
        elif detect:
            _refuse_other_flags(context, {"detect"}, "--detect stands alone")
            _print_this_machine()
        elif plan_file is not None:
            rule = "only --prompt-tokens, --export and --format go with it"
            _refuse_other_flags(context, WITH_A_PLAN, f"PLAN.yaml says it all; {rule}")
            _evaluate(plan_file, prompt_tokens, format_, export_)
        else:
            if prompt_tokens is not None:
                raise UsageError("--prompt-tokens goes with PLAN.yaml")
            if model is None or gpus is None:
                missing = "--model" if model is None else "--gpus"
                raise UsageError(
                    f"{missing} is missing, as in: medha-plan --model llama3-70b --gpus 16"
                )
            if not 1 <= gpus <= MOST_GPUS:
                raise UsageError(f"--gpus {gpus}: must be from 1 to {MOST_GPUS}")
            if topology is not None and not _is_given(context, "hardware"):
                from planner.catalog import load_node_type

                hardware = load_node_type(topology).device
            ask = Question(
                model=model,
                gpus=gpus,
                hardware=hardware,
                topology=topology,
                workload=workload,
                context_tokens=None
                if max_context is None
                else tokens("--max-context", max_context),
                ttft_slo_s=None if ttft_slo is None else seconds("--ttft-slo", ttft_slo),
                tbt_slo_s=None if tbt_slo is None else seconds("--tbt-slo", tbt_slo),
                objective=objective,
                rate_rps=None if rate_ is None else rate("--rate", rate_),
                weight_dtype=weight_dtype,
                kv_dtype=kv_dtype,
                attention=attention,
                effort=effort,
                seed=seed,
            )
            _search(
                ask,
                top=top,
                out=out,
                format_=format_,
                kernels=not no_kernels,
                dump_graph=dump_graph,
                overwrite=overwrite,
                engine=export_,
            )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter stands on the command line."""
    return str(context.get_parameter_source(name)).endswith("COMMANDLINE")


def _refuse_other_flags(context: typer.Context, allowed: set[str], rule: str) -> None:
    """A flag that decides a search would be ignored beside a plan, and the answer misread."""
    given = [
        "PLAN.yaml" if parameter.name == "plan_file" else max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.name not in allowed and _is_given(context, str(parameter.name))
    ]
    if given:
        raise UsageError(f"{', '.join(given)}: not here, {rule}")


def _print_this_machine() -> None:
    from planner.detect import detect

    print(detect(), end="")


def _print_schema() -> None:
    from plans.codec import json_schema
    from plans.plan import Plan

    print(json.dumps(json_schema(Plan), indent=2))


def _search(
    ask: Question,
    *,
    top: int,
    out: Path | None,
    format_: str,
    kernels: bool,
    dump_graph: bool,
    overwrite: bool,
    engine: str | None,
) -> None:
    from planner import cli_plan_tables as tables
    from planner.answer import answer
    from planner.catalog import load_device, load_model, load_workload, topology_for
    from planner.cli_plan_checks import check_attention, check_graphs, check_out
    from planner.explain import as_json
    from planner.export import export
    from planner.failure import NoPlan
    from planner.folder import (
        PLAN_FILE,
        alternatives_csv,
        readme,
        write_folder,
    )
    from planner.report import REPORT_FILE, report_html
    from planner.world import asked_dtypes, make_world
    from plans.codec import dumps
    from plans.plan import MadeBy

    device = load_device(ask.hardware)
    loaded = load_model(ask.model, context_tokens=ask.context_tokens)
    check_attention(ask, device, loaded, kernels=kernels)
    check_graphs(loaded, kernels=kernels, dump_graph=dump_graph)
    machine = topology_for(device, ask.gpus, ask.topology)

    def world_of(context_tokens: int | None) -> "World":
        return make_world(
            model=loaded,
            device=device,
            topology=machine,
            workload=load_workload(ask.workload),
            context_tokens=context_tokens,
            ttft_slo_s=ask.ttft_slo_s,
            tbt_slo_s=ask.tbt_slo_s,
            objective=ask.objective,
            rate_rps=ask.rate_rps,
            weight_dtypes=asked_dtypes(ask.weight_dtype),
            kv_dtypes=asked_dtypes(ask.kv_dtype),
        )

    short = min((device.name, *device.aliases), key=len)
    world = world_of(ask.context_tokens)
    folder = out if out is not None else Path(f"{loaded.name}-{ask.gpus}x{short}")
    check_out(folder, ask, overwrite=overwrite)  # before the work, and again when it is written
    try:
        given = answer(
            world,
            name=lambda asked: f"{loaded.name}-{asked.gpus}x{short}",
            made_by=MadeBy(medha=_version(), effort=ask.effort, seed=ask.seed, command=ask.command),
            machines=lambda count: topology_for(device, count, ask.topology),
            remake=world_of,
        )
    except NoPlan as error:
        _explain_failure(world, error, device, ask.topology)
        raise
    found, plan = given.found, given.plan
    check_attention(ask, device, plan.model, kernels=kernels)  # in the dtype chosen
    folder = out if out is not None else Path(plan.name)  # fewer GPUs may be enough
    check_out(folder, ask, overwrite=overwrite)
    files: dict[str, bytes] = {}
    kernels = kernels and not plan.model.unsupported  # the plan's notes say why
    if kernels:
        with loading():
            from planner.bundle import compile_plan

        plan, files = compile_plan(plan, dump_graph=dump_graph, attention=ask.attention)
    _check_whole(plan, files)
    files |= {
        PLAN_FILE: dumps(plan).encode(),
        "alternatives.csv": alternatives_csv(found),
        REPORT_FILE: report_html(found, plan),
        "README.md": readme(
            plan, run_commands(".", program=kernels), program=kernels, engine=engine
        ),
    }
    launch = export(plan, engine) if engine else None
    write_folder(folder, files | (launch.files if launch else {}), overwrite=overwrite)
    commands = run_commands(str(folder), program=kernels)
    if format_ == "json":
        report = as_json(plan, found=found, bundle=str(folder), commands=commands, top=top)
        print(json.dumps(report | (launch.builtins if launch else {}), indent=2))
    else:
        tables.print_found(plan, found, folder, commands, top)
        if launch:
            tables.listed(tuple(f"bash {shlex.quote(str(folder / name))}" for name in launch.files))
            tables.say(*launch.lost_lines)


def _check_whole(plan: "Plan", files: dict[str, bytes]) -> None:
    """The finished plan once more, now with its program; raises for a bug of the planner."""
    from planner.selfcheck import check_files
    from plans.check import check_plan

    check_plan(plan, where=f"{plan.name} (a bug of the planner)")
    check_files(plan, files)


def run_commands(folder: str, *, program: bool) -> tuple[str, ...]:
    """Commands that serve the bundle: its own workload in virtual time, and requests of a file."""
    bundle = shlex.quote(folder)
    run = f"medha-run {bundle} --weights random --requests REQUESTS.jsonl --out ANSWERS.jsonl"
    return (f"medha-sim {bundle}", *([run] if program else []))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("medha")
    except PackageNotFoundError:  # run from the source tree
        return "source"


def _explain_failure(
    world: "World", error: "NoPlan", device: "Device", node_type: Path | None
) -> None:
    """Prints the ledger by constraint, and adds the number of GPUs that would do to the error."""
    from planner.explain import ledger_lines
    from planner.search import smallest_fitting

    for line in ledger_lines(error.ledger):
        print(line, file=sys.stderr)
    if error.constraint == "memory":
        gpus = smallest_fitting(world, _bigger_machines(device, world.gpus, node_type))
        if gpus is not None:
            more = f"--gpus {gpus}"
            nearest = f"{error.nearest} or {more}" if error.nearest else more
            error.args = (str(error).partition("; nearest: ")[0] + f"; nearest: {nearest}",)


def _bigger_machines(device: "Device", gpus: int, node_type: Path | None) -> Iterator["Topology"]:
    from planner.catalog import topology_for

    for power in range(1, MOST_GPUS.bit_length()):
        for count in (1 << power, 3 << (power - 1)):  # 16, 24, 32, 48: whole nodes of 8
            if gpus < count <= MOST_GPUS and count not in {3, 6, 12}:
                try:
                    yield topology_for(device, count, node_type)
                except UsageError:  # the user's machine ends here
                    return


def _evaluate(path: Path, prompt_tokens: str | None, format_: str, engine: str | None) -> None:
    from planner import cli_plan_tables as tables
    from planner.answer import reevaluated
    from planner.explain import as_json
    from planner.export import export
    from planner.given import has_program, load_given
    from plans.check import check_plan
    from runtime.scheduler import load_policy

    given, where = load_given(path)
    asked = None if prompt_tokens is None else tokens("--prompt-tokens", prompt_tokens)
    if asked is not None and asked > given.limits.context_tokens:
        raise UsageError(
            f"--prompt-tokens {asked}: exceeds limits.context_tokens {given.limits.context_tokens}"
        )
    try:
        load_policy(given.scheduler.policy, given.scheduler)
    except UsageError as error:
        raise InvalidFile(str(where), "scheduler.policy", str(error)) from None
    plan = reevaluated(given, asked)
    check_plan(plan, where=str(where))
    program = has_program(given, where)
    commands = run_commands(str(where.parent), program=program)
    launch = export(plan, engine) if engine else None
    if format_ == "json":
        print(
            json.dumps(
                as_json(plan, commands=commands) | (launch.builtins if launch else {}), indent=2
            )
        )
        return
    if launch is None:
        tables.print_evaluated(given, plan, commands, program=program)
        return
    for name, text in launch.files.items():
        print(f"# --- {name}\n{text.decode()}", end="")
    print("\n".join(launch.lost_lines), file=sys.stderr)


def main() -> None:
    """Entry point: errors go to stderr, the status is the error's."""
    try:
        with unwinding():
            app()
    except MedhaError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_status) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    started(lambda: main)

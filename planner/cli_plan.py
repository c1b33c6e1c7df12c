"""medha-plan: searches, explains, writes the bundle; or evaluates a plan that was edited."""

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from planner.question import DEFAULT_HARDWARE, DEFAULT_WORKLOAD, Question, seconds, tokens
from plans.errors import InvalidFile, MedhaError, UsageError
from runtime.interrupts import INTERRUPTED, loading

if TYPE_CHECKING:
    from planner.explain import Table
    from planner.search import Found, NoPlan
    from planner.world import World
    from plans.plan import Plan
    from plans.topology import Device, Topology

MOST_GPUS = 16384
"""What --gpus takes at most, and where the search for a sufficient number ends."""
WITH_A_PLAN = {"plan_file", "prompt_tokens", "format_"}
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
        Path | None, typer.Option(help="YAML of a node type, instead of the device's own.")
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
    effort: Annotated[str, typer.Option(help="quick: by formula, without replay.")] = "quick",
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
    seed: Annotated[int, typer.Option(help="Recorded in the plan.")] = 0,
    prompt_tokens: Annotated[
        str | None,
        typer.Option(metavar="N", help="With PLAN.yaml: also predict a prompt of this length."),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of plans.")
    ] = False,
) -> None:
    """Plans the serving of a model on a number of GPUs and writes the bundle that runs it."""
    try:
        if schema:
            _print_schema()
        elif plan_file is not None:
            _refuse_flags_of_a_search(context)
            _evaluate(plan_file, prompt_tokens, format_)
        else:
            if prompt_tokens is not None:
                raise UsageError("--prompt-tokens goes with PLAN.yaml")
            if effort != "quick":
                raise UsageError(f"--effort {effort}: only quick is available")
            if model is None or gpus is None:
                missing = "--model" if model is None else "--gpus"
                raise UsageError(
                    f"{missing} is missing, as in: medha-plan --model llama3-70b --gpus 16"
                )
            if not 1 <= gpus <= MOST_GPUS:
                raise UsageError(f"--gpus {gpus}: must be from 1 to {MOST_GPUS}")
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
            )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _refuse_flags_of_a_search(context: typer.Context) -> None:
    """A flag that decides a search would be ignored beside a plan, and the answer misread."""
    given = [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.name not in WITH_A_PLAN
        and str(context.get_parameter_source(str(parameter.name))).endswith("COMMANDLINE")
    ]
    if given:
        raise UsageError(
            f"{', '.join(given)}: not beside PLAN.yaml, which says it all; only --prompt-tokens"
            " and --format go with it"
        )


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
) -> None:
    from planner.assemble import to_plan
    from planner.catalog import load_device, load_model, load_workload, topology_for
    from planner.explain import as_json
    from planner.folder import PLAN_FILE, alternatives_csv, check_target, readme, write_folder
    from planner.search import NoPlan, search
    from planner.world import make_world
    from plans.check import check_plan
    from plans.codec import dumps
    from plans.plan import MadeBy

    device = load_device(ask.hardware)
    loaded = load_model(ask.model, context_tokens=ask.context_tokens)
    machine = topology_for(device, ask.gpus, ask.topology)
    world = make_world(
        model=loaded,
        device=device,
        topology=machine,
        workload=load_workload(ask.workload),
        context_tokens=ask.context_tokens,
        ttft_slo_s=ask.ttft_slo_s,
        tbt_slo_s=ask.tbt_slo_s,
    )
    short = min((device.name, *device.aliases), key=len)
    name = f"{loaded.name}-{ask.gpus}x{short}"
    folder = out if out is not None else Path(name)
    check_target(folder, overwrite=overwrite)  # before the work, and again when it is written
    try:
        found = search(world)
    except NoPlan as error:
        _explain_failure(world, error, device, ask.topology)
        raise
    plan = to_plan(
        world,
        found.ranked[0],
        name=name,
        made_by=MadeBy(medha=_version(), effort=ask.effort, seed=ask.seed, command=ask.command),
        notes=found.notes,
    )
    files: dict[str, bytes] = {}
    if kernels:
        with loading():
            from planner.bundle import compile_plan

        plan, files = compile_plan(plan, dump_graph=dump_graph)
    check_plan(plan, where=f"{name} (a bug of the planner)")
    commands = run_commands(".", program=kernels)
    files |= {
        PLAN_FILE: dumps(plan).encode(),
        "alternatives.csv": alternatives_csv(found),
        "README.md": readme(plan, commands, program=kernels),
    }
    write_folder(folder, files, overwrite=overwrite)
    commands = run_commands(str(folder), program=kernels)
    if format_ == "json":
        report = as_json(plan, found=found, bundle=str(folder), commands=commands, top=top)
        print(json.dumps(report, indent=2))
    else:
        _print_found(plan, found, folder, commands, top)


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


def _evaluate(path: Path, prompt_tokens: str | None, format_: str) -> None:
    from planner.assemble import evaluate
    from planner.explain import as_json
    from plans.check import check_plan
    from plans.codec import load_file
    from plans.plan import Plan
    from runtime.scheduler import load_policy

    where = path / "plan.yaml" if path.is_dir() else path
    given = load_file(where, Plan)
    asked = None if prompt_tokens is None else tokens("--prompt-tokens", prompt_tokens)
    if asked is not None and asked > given.limits.context_tokens:
        raise UsageError(
            f"--prompt-tokens {asked}: exceeds limits.context_tokens {given.limits.context_tokens}"
        )
    _check_given(given, where)
    try:
        load_policy(given.scheduler.policy, given.scheduler)
    except UsageError as error:
        raise InvalidFile(str(where), "scheduler.policy", str(error)) from None
    plan = evaluate(given, asked)
    check_plan(plan, where=str(where))
    commands = run_commands(str(where.parent), program=bool(plan.files))
    if format_ == "json":
        print(json.dumps(as_json(plan, commands=commands), indent=2))
    else:
        _print_evaluated(given, plan, commands)


def _check_given(given: "Plan", where: Path) -> None:
    """Refuses what no new prediction can repair: everything but predicted numbers."""
    from plans.check import failures

    derived = ("chunk-seconds", "predicted", "predicted-bounds")
    found = [each for each in failures(given) if each.name not in derived]
    if found:
        first, *rest = found
        more = "".join(f"\n{where}: {each.path}: {each.message}" for each in rest)
        raise InvalidFile(str(where), first.path, f"{first.message} [check {first.name}]{more}")


def _print_found(
    plan: "Plan", found: "Found", folder: Path, commands: tuple[str, ...], top: int
) -> None:
    from planner import explain

    _say(explain.arithmetic(plan), f"best by: {found.objective}", "")
    _draw(explain.ranking(found, plan.limits.context_tokens, top))
    _say(explain.LEGEND, "")
    _draw(explain.schedule(plan))
    _say("", *explain.facts(plan), explain.rejected_line(found), "")
    _say(f"bundle: {folder}")
    _list(commands)


def _print_evaluated(given: "Plan", plan: "Plan", commands: tuple[str, ...]) -> None:
    from planner import explain

    _say(explain.arithmetic(plan), "")
    _draw(explain.times(plan))
    _say("")
    _draw(explain.schedule(plan))
    _say("", *explain.facts(plan))
    stale = given.prefill != plan.prefill
    _say(
        "prefill.chunks[].predicted_s in the file is not what step_time gives; the times above are"
        if stale
        else "valid: every check passes",
        "",
    )
    _list(commands)


def _list(commands: tuple[str, ...]) -> None:
    """One a line and never wrapped, so that they can be pasted."""
    for command in commands:
        print(command)


def _say(*lines: str) -> None:
    """Prose, wrapped at words to the terminal's width (80 columns in a pipe)."""
    from rich.console import Console

    for line in lines:
        Console(highlight=False, markup=False, emoji=False).print(line)


def _draw(table: "Table") -> None:
    from rich.console import Console
    from rich.table import Table as Grid

    grid = Grid(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in table.columns:
        grid.add_column(column, justify="left" if column in {"memory", "bound by"} else "right")
    for row in table.rows:
        grid.add_row(*row)
    Console(highlight=False, markup=False, emoji=False).print(grid)


def main() -> None:
    """Entry point: errors go to stderr, the status is the error's."""
    try:
        app()
    except MedhaError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_status) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()

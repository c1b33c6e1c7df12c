"""`medha-run`: generates answers for a file of requests, one process for each rank of the plan.

On one machine it starts them itself; for several nodes, start this module by torchrun on each.

Order: flags, bundle, ranks, tokenizer, requests, then weights, so that whatever is wrong is said
before anything large is loaded. Results go to stdout or --out, everything else to stderr.
"""

import logging
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plans.errors import InvalidFile, MedhaError, UsageError
from runtime.interrupts import INTERRUPTED, loading, started
from runtime.outputs import bundle_inputs, check_outputs

if TYPE_CHECKING:
    from plans.plan import Plan
    from runtime.offline import Job, OfflineRun, Result
    from runtime.offline import Progress as RunProgress
    from runtime.parallel.launch import Torchrun
    from runtime.program import Bundle
    from runtime.scheduler import Scheduling
    from runtime.tokenizer import Tokenizer

RANDOM, NONE = "random", "none"

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def run(
    *,
    bundle: Annotated[Path, typer.Argument(help="Folder that medha-plan wrote.")],
    weights: Annotated[
        str, typer.Option(help="Folder with a Hugging Face checkpoint, or `random`.")
    ],
    requests: Annotated[Path, typer.Option(help="JSON lines, one request each.")],
    out: Annotated[
        Path | None,
        typer.Option(help="File for the results, JSON lines; default stdout, also named `-`."),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Scheduling policy; default the plan's.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder with tokenizer.json, or `none`; default the weights folder."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random weights.")] = 0,
    graphs: Annotated[
        bool, typer.Option("--graphs/--no-graphs", help="Run decode steps as CUDA graphs.")
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no table.")] = False,
) -> None:
    """Generates an answer for every request of a file."""
    with loading():
        from runtime.offline import OfflineRun, read_jobs
        from runtime.parallel.launch import check_launch, torchrun_place, torchrun_setup
        from runtime.parallel.worker import worker_main
        from runtime.program import load_bundle
        from runtime.scheduler import load_policy

    logging.basicConfig(format="%(message)s", level=logging.ERROR if quiet else logging.WARNING)
    loaded = load_bundle(bundle)
    plan = loaded.plan
    place = torchrun_place(os.environ)
    check_launch(plan, place)
    if place is not None and place.rank > 0:
        worker_main(torchrun_setup(str(bundle), plan, weights, seed, place))
    scheduling = load_policy(policy or plan.scheduler.policy, plan.scheduler)
    if str(out) == "-":
        out = None
    _check_files(out, bundle=bundle, requests=requests, weights=weights, tokenizer=tokenizer)
    reader = _tokenizer(tokenizer, weights, plan.model.vocab)
    jobs = read_jobs(requests, plan, reader, end_tokens=_end_tokens(reader, weights))
    try:
        with _progress(plan.name, quiet=quiet) as show:
            offline = OfflineRun(jobs, reader, on_progress=show)
            results = _generate(
                loaded,
                offline,
                scheduling,
                weights=weights,
                seed=seed,
                place=place,
                graphs=graphs,
            )
    except KeyboardInterrupt:
        print("interrupted; no results were written", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    _deliver(out, results)
    if offline.error is not None:
        lost = sum(result.finish_reason == "failed" for result in results)
        raise MedhaError(f"{lost} of {len(results)} requests failed: {offline.error}")
    if not quiet:
        _print_table(plan, jobs, results, offline)


def _check_files(
    out: Path | None, *, bundle: Path, requests: Path, weights: str, tokenizer: str | None
) -> None:
    """Raises UsageError where a folder is not there, or the results have no place of theirs."""
    if out is None and sys.stdout is None:
        raise UsageError("stdout is closed; name a file for the results with --out")
    inputs = {"BUNDLE": bundle_inputs(bundle), "--requests": [requests]}
    for flag, name, other in (("--weights", weights, RANDOM), ("--tokenizer", tokenizer, NONE)):
        if name is None or name == other:
            continue
        if not Path(name).is_dir():
            raise InvalidFile(name, "", f"no such folder; {flag} names a folder, or `{other}`")
        try:
            files = [each for each in Path(name).iterdir() if each.is_file()]
        except OSError as error:
            raise InvalidFile(name, "", f"cannot be read: {error.strerror}") from None
        # results of an earlier run may lie beside the weights
        inputs[flag] = [each for each in files if each.suffix != ".jsonl"]
    check_outputs({"--out": out}, inputs)


def _deliver(out: Path | None, results: "list[Result]") -> None:
    """Writes the results; hours of work go to a temporary file where their place refuses them."""
    from runtime.offline import result_line, write_results

    try:
        if out is not None:
            write_results(out, results)
            return
        for result in results:
            sys.stdout.buffer.write(result_line(result))
        sys.stdout.buffer.flush()
    except MedhaError as error:
        raise MedhaError(f"{error}\n{_kept(results)}") from None


def _kept(results: "list[Result]") -> str:
    """Where the results are now, instead of nowhere."""
    from runtime.offline import result_line

    try:
        with tempfile.NamedTemporaryFile(
            prefix="medha-run-", suffix=".jsonl", delete=False
        ) as file:
            file.writelines(map(result_line, results))
    except OSError as error:
        return f"and no temporary file takes the results: {error.strerror}"
    return f"the results are in {file.name}"


def _tokenizer(choice: str | None, weights: str, vocab: int) -> "Tokenizer | None":
    """The tokenizer asked for; with random weights there is none by default."""
    from runtime.tokenizer import check_vocab, load_tokenizer

    folder = choice or (NONE if weights == RANDOM else weights)
    if folder == NONE:
        return None
    if choice is None and not (Path(folder) / "tokenizer.json").is_file():
        raise InvalidFile(
            folder, "", "holds no tokenizer.json; name its folder with --tokenizer, or send "
            "token_ids with --tokenizer none"
        )  # fmt: skip
    tokenizer = load_tokenizer(folder)
    check_vocab(tokenizer, vocab, folder)
    return tokenizer


def _end_tokens(tokenizer: "Tokenizer | None", weights: str) -> frozenset[int]:
    """Tokens that end an answer, as the tokenizer's folder and the weights folder name them."""
    from runtime.tokenizer import end_tokens

    own = frozenset() if tokenizer is None else tokenizer.end_tokens
    return own if weights == RANDOM else own | end_tokens(weights)


def _generate(
    bundle: "Bundle",
    offline: "OfflineRun",
    scheduling: "Scheduling",
    *,
    weights: str,
    seed: int,
    place: "Torchrun | None",
    graphs: bool,
) -> "list[Result]":
    """Loads what is large, and runs: here, or on the ranks of the plan."""
    from runtime.clock import WallClock
    from runtime.executor.live import LiveExecutor, device_for
    from runtime.garbage import settle
    from runtime.parallel.devices import warning
    from runtime.parallel.executor import ParallelExecutor
    from runtime.parallel.launch import running_workers
    from runtime.weights import load_weights, random_weights

    plan, clock = bundle.plan, WallClock()
    if said := warning(plan):
        print(said, file=sys.stderr)
    if plan.parallelism.ranks > 1:
        with running_workers(
            str(bundle.folder), plan, weights, seed, place, graphs=graphs
        ) as replicas:
            executors = [ParallelExecutor(plan, workers, clock) for workers in replicas]
            settle()
            return offline.run(plan, executors, clock, scheduling)
    device = device_for(plan)
    program = bundle.load_stage(0)
    tensors = (
        random_weights(program.parameters, seed=seed, device=device)
        if weights == RANDOM
        else load_weights(weights, program.parameters, device=device)
    )
    executor = LiveExecutor(plan, program, tensors, clock=clock, graphs=graphs)
    executor.warm_up()
    settle()
    return offline.run(plan, [executor], clock, scheduling)


@contextmanager
def _progress(name: str, *, quiet: bool) -> "Iterator[Callable[[RunProgress], None]]":
    """Live progress on stderr; only on a terminal, so that logs stay short."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} prompt tokens"),
        TextColumn("{task.fields[more]}"),
        TimeElapsedColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task(f"{name}: loading", total=None, more="")

        def show(now: "RunProgress") -> None:
            running = now.started - now.finished
            waiting = now.requests - now.started
            bar.update(
                task,
                description=name,
                total=now.prompt_tokens,
                completed=now.prefilled_tokens,
                more=f"{now.generated_tokens} generated, {running} running, {waiting} waiting",
            )

        yield show


def _print_table(
    plan: "Plan", jobs: "Sequence[Job]", results: "Sequence[Result]", offline: "OfflineRun"
) -> None:
    """Predicted beside measured times, by class."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{plan.name}: predicted alone, measured together (median, worst)")
    for column in ("class", "requests", "prompt tokens"):
        table.add_column(column, justify="right" if column != "class" else "left")
    for quantity in ("TTFT", "TBT"):
        table.add_column(f"{quantity} predicted", justify="right")
        table.add_column(f"{quantity} measured", justify="right")
    rows = list(zip(jobs, results, offline.records, strict=True))
    for name, is_long in (("short", False), ("long", True)):
        chosen = [
            row for row in rows
            if (len(row[0].prompt) >= plan.scheduler.long_tokens) == is_long
        ]  # fmt: skip
        if not chosen:
            continue
        ttft_s = [result.ttft_s for _, result, _ in chosen if result.ttft_s is not None]
        gaps = [result.tbt_s for _, result, _ in chosen if result.tbt_s.max is not None]
        contexts = [len(job.prompt) + len(result.token_ids) for job, result, _ in chosen]
        alone_s = plan.step_time.step_s(decode_kv_tokens=[round(statistics.median(contexts))])
        table.add_row(
            name,
            str(len(chosen)),
            f"{statistics.median(len(job.prompt) for job, _, _ in chosen):g}",
            _seconds(statistics.median(record.work_s for _, _, record in chosen)),
            f"{_seconds(statistics.median(ttft_s))}, {_seconds(max(ttft_s))}",
            _seconds(alone_s),
            f"{_seconds(statistics.median(gap.p50 or 0.0 for gap in gaps))}, "
            f"{_seconds(max(gap.max or 0.0 for gap in gaps))}"
            if gaps
            else "one token each",
        )
    console = Console(stderr=True)
    console.print(table)
    evictions = sum(result.evictions for result in results)
    if evictions:
        console.print(f"{evictions} evictions; what was lost was computed again")


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def main() -> None:
    """Runs the command and turns the user's errors into their exit status."""
    try:
        app()
    except MedhaError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_status) from None


if __name__ == "__main__":  # as torchrun starts it
    started(lambda: main)

"""medha-sim: serves a trace, or the plan's own workload, in virtual time and says how it went."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from plans.errors import InvalidFile, MedhaError, UsageError

if TYPE_CHECKING:
    from rich.progress import Progress

    from plans.plan import Plan
    from runtime.arrivals import Load, Offered
    from runtime.metrics import ClassSummary, Spread, Summary
    from runtime.simulate import Run
    from runtime.timeline import Recorder

SHARE_OF_CAPACITY = 0.7
"""Rate of the plan's own workload where --qps is not given, over the predicted capacity."""
REFRESH_S = 0.1
"""Real seconds between two updates of the progress bar."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Served(NamedTuple):
    """One policy under one seed."""

    policy: str
    seed: int
    offered: "Offered"
    run: "Run"
    summary: "Summary"


@app.command()
def simulate_plan(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE|PLAN.yaml", help="Folder of medha-plan, or a plan.")
    ],
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="CSV or JSON lines (or .gz), quantile table, or ServeGen archive; without it the"
            " plan's own workload is served.",
        ),
    ] = None,
    qps: Annotated[
        float | None,
        typer.Option(
            metavar="Q",
            help="Mean requests a second. Stretches a trace's own times; needed where it has none;"
            " 70 % of the predicted capacity for the plan's own workload.",
        ),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="Serve what arrives in the first S seconds, to its end. A workload without an end"
            " is offered for 300.",
        ),
    ] = None,
    arrivals: Annotated[
        Literal["trace", "poisson", "burst"] | None,
        typer.Option(
            help="When requests arrive; the trace's own times where it has them, else poisson."
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,chunk=N]",
            help="Scheduling policy, the plan's by default; repeat it to compare several.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of arrivals, order and lengths.")] = 0,
    seeds: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Repeat with N seeds from --seed on and show the spread."
        ),
    ] = 1,
    json: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|-", help="Write the figures as one JSON object; - prints nothing else."
        ),
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Chrome trace events of a single run, for Perfetto."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="TTFT distributions as .png, .svg or .pdf."),
    ] = None,
) -> None:
    """Serve requests in virtual time, by the plan's own step times, without any GPU."""
    from plans.check import load_plan
    from runtime.arrivals import Load, offer

    plan = load_plan(bundle / "plan.yaml" if bundle.is_dir() else bundle)
    policies = list(dict.fromkeys(policy or [plan.scheduler.policy]))
    _check_flags(plan, policies, runs=len(policies) * seeds, timeline=timeline, plot=plot)
    load = Load(qps=qps, duration_s=duration, seed=seed, arrivals=arrivals)
    if trace is None and qps is None:
        load = _default_load(plan, load)
    served: list[Served] = []
    recorders: list[Recorder] = []
    with _progress() as progress:
        for each in range(seed, seed + seeds):
            source = plan.workload if trace is None else trace
            load = _seeded(load, each)
            offered = offer(source, load, context_tokens=plan.limits.context_tokens)
            for name in policies:
                label = f"{name}, seed {each}" if seeds > 1 else name
                run = _simulate(
                    plan, offered, name, progress, label, recorders if timeline else None
                )
                summary = _summary(plan, offered, run, name)
                served.append(Served(name, each, offered, run, summary))
    if timeline is not None:
        from runtime.timeline import write_timeline

        _write(timeline, lambda path: write_timeline(path, recorders))
    if plot is not None:
        _plot(plot, plan, served)
    if json is not None:
        text = _json(plan, load, served)
        if json == "-":
            print(text)
            return
        _write(Path(json), lambda path: path.write_text(text + "\n"))
    _print_tables(plan, load, served)


def _check_flags(
    plan: "Plan", policies: list[str], *, runs: int, timeline: Path | None, plot: Path | None
) -> None:
    """Refuses before anything long starts."""
    from runtime.plot import check_format
    from runtime.scheduler import load_policy

    for name in policies:
        load_policy(name, plan.scheduler)
    if timeline is not None and runs > 1:
        raise UsageError(f"--timeline shows one run; this would be {runs}: one policy, one seed")
    if plot is not None:
        check_format(plot)


def _default_load(plan: "Plan", load: "Load") -> "Load":
    import msgspec

    qps = float(f"{SHARE_OF_CAPACITY * plan.predicted.capacity_rps:.3g}")
    return msgspec.structs.replace(load, qps=qps)


def _seeded(load: "Load", seed: int) -> "Load":
    import msgspec

    return msgspec.structs.replace(load, seed=seed)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except OSError as error:
        raise InvalidFile(str(path), "", f"cannot be written: {error.strerror}") from None


# --- running ------------------------------------------------------------------------------------


def _progress() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} requests, {task.fields[virtual]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


class _Watcher:
    """Engine observer that moves the progress bar and passes everything on to a recorder."""

    def __init__(self, progress: "Progress", task: Any, recorder: "Recorder | None") -> None:
        self._progress = progress
        self._task = task
        self._recorder = recorder
        self._finished = 0
        self._shown_s = 0.0

    def arrived(self, sequence: Any, now_s: float) -> None:
        """Nothing to show."""

    def submitted(self, step: Any, now_s: float) -> None:
        """A good moment to redraw."""
        if self._recorder is not None:
            self._recorder.submitted(step, now_s)
        wall_s = time.monotonic()
        if wall_s - self._shown_s >= REFRESH_S:
            self._shown_s = wall_s
            self.show(now_s)

    def collected(self, result: Any) -> None:
        """For the recorder."""
        if self._recorder is not None:
            self._recorder.collected(result)

    def ended(self, record: Any, now_s: float) -> None:
        """One more."""
        self._finished += 1
        if self._recorder is not None:
            self._recorder.ended(record, now_s)

    def show(self, now_s: float) -> None:
        """Moves the bar."""
        self._progress.advance(self._task, self._finished)
        self._progress.update(self._task, virtual=f"{now_s:.0f} virtual s")
        self._finished = 0


def _simulate(
    plan: "Plan",
    offered: "Offered",
    policy: str,
    progress: "Progress",
    label: str,
    recorders: "list[Recorder] | None",
) -> "Run":
    from runtime.simulate import simulate
    from runtime.timeline import Recorder

    task = progress.add_task(label, total=len(offered.requests), virtual="0 virtual s")
    watchers: list[_Watcher] = []

    def observe(replica: int) -> _Watcher:
        recorder = None
        if recorders is not None:
            recorder = Recorder(stages=plan.parallelism.spp, replica=replica)
            recorders.append(recorder)
        watchers.append(_Watcher(progress, task, recorder))
        return watchers[-1]

    run = simulate(plan, offered.requests, policy, observe=observe)
    end_s = max((record.finished_s for record in run.records), default=0.0)
    for watcher in watchers:
        watcher.show(end_s)
    return run


def _summary(plan: "Plan", offered: "Offered", run: "Run", policy: str) -> "Summary":
    from runtime.metrics import summarise

    return summarise(
        run.records,
        offered=offered.requests,
        policy=policy,
        targets=plan.targets,
        long_tokens=plan.scheduler.long_tokens,
        short_gaps_s=run.short_gaps_s,
        long_gaps_s=run.long_gaps_s,
        wall_s=run.wall_s,
    )


# --- results ------------------------------------------------------------------------------------


def _json(plan: "Plan", load: "Load", served: list[Served]) -> str:
    """The summary of the one run; with several, `runs` holds one for each policy and seed."""
    import msgspec

    from plans.codec import content_hash
    from runtime.metrics import to_json

    first = served[0].offered
    about = {
        "plan": plan.name,
        "plan_hash": content_hash(plan),
        "source": first.source,
        "arrivals": first.arrivals,
        "qps": load.qps,
        "duration_s": load.duration_s,
        "long_tokens": plan.scheduler.long_tokens,
        "notes": first.notes,
        "simulated": True,
    }
    runs = [{**msgspec.structs.asdict(each.summary), "seed": each.seed} for each in served]
    return to_json({**about, **runs[0]} if len(runs) == 1 else {**about, "runs": runs})


def _plot(path: Path, plan: "Plan", served: list[Served]) -> None:
    import math

    import numpy as np

    from runtime.plot import draw_ttft

    classes: dict[str, dict[str, Any]] = {}
    for policy in dict.fromkeys(each.policy for each in served):
        split: dict[str, list[float]] = {"short": [], "long": []}
        for each in served:
            if each.policy == policy:
                by_number = {one.request.number: one.ttft_s for one in each.run.records}
                for request in each.offered.requests:
                    long = request.prompt_tokens >= plan.scheduler.long_tokens
                    ttft_s = by_number.get(request.number, math.inf)
                    split["long" if long else "short"].append(ttft_s)
        for name, samples in split.items():
            if samples:
                classes.setdefault(name, {})[policy] = np.array(samples)
    title = f"{plan.name}, {served[0].offered.source} (simulated)"
    _write(path, lambda to: draw_ttft(to, classes, title=title))


def _print_tables(plan: "Plan", load: "Load", served: list[Served]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    offered = served[0].offered
    last_s = offered.requests[-1].arrival_s
    rate = f", {load.qps:g} requests/s" if load.qps is not None else ""
    console.print(
        f"[bold]{plan.name}[/]: {len(offered.requests)} requests of {offered.source} in"
        f" {last_s:.0f} s ({offered.arrivals}{rate}, seed {served[0].seed}), in virtual time",
        highlight=False,
    )
    for note in offered.notes:
        console.print(f"  {note}", style="dim", highlight=False)
    policies = list(dict.fromkeys(each.policy for each in served))
    names = ["short", "long"] if any(_class(each, "long").requests for each in served) else ["all"]
    for name in names:
        table = Table(title=_title(name, plan), title_justify="left")
        table.add_column("")
        for policy in policies:
            table.add_column(policy, justify="right")
        for label, read in _class_rows():
            table.add_row(
                label,
                *(
                    _cell([read(_class(each, name)) for each in served if each.policy == policy])
                    for policy in policies
                ),
            )
        console.print(table)
    table = Table(title="all together", title_justify="left")
    table.add_column("")
    for policy in policies:
        table.add_column(policy, justify="right")
    for label, show in _run_rows():
        table.add_row(
            label,
            *(
                _cell([show(each.summary) for each in served if each.policy == policy])
                for policy in policies
            ),
        )
    console.print(table)
    if len({each.seed for each in served}) > 1:
        console.print("median over seeds (least to most)", style="dim")


def _class(served: Served, name: str) -> "ClassSummary":
    return served.summary.classes[name]


def _title(name: str, plan: "Plan") -> str:
    limit = f"{plan.scheduler.long_tokens:,} prompt tokens"
    return {"short": f"short: below {limit}", "long": f"long: from {limit} on"}.get(name, name)


Cell = tuple[float | None, str]
"""A figure and its format: `count`, `share`, `s` or `rate`."""


def _class_rows() -> "list[tuple[str, Callable[[ClassSummary], Cell]]]":
    def of(quantity: str, field: str) -> "Callable[[ClassSummary], Cell]":
        def read(summary: "ClassSummary") -> Cell:
            spread: Spread = getattr(summary, quantity)
            return getattr(spread, field), "s"

        return read

    return [
        ("requests", lambda each: (each.requests, "count")),
        ("finished", lambda each: (each.finished, "count")),
        *[
            (f"{label} {field}", of(quantity, field))
            for label, quantity, fields in (
                ("TTFT", "ttft_s", ("p50", "p90", "p99", "max")),
                ("TBT", "tbt_s", ("p50", "p99", "max")),
                ("end to end", "e2e_s", ("p50", "p99")),
            )
            for field in fields
        ],
        ("met their SLO", lambda each: (each.slo_attainment, "share")),
    ]


def _run_rows() -> "list[tuple[str, Callable[[Summary], Cell]]]":
    return [
        ("goodput, requests/s", lambda each: (each.goodput_rps, "rate")),
        ("output tokens/s", lambda each: (each.output_tokens_per_s, "rate")),
        ("makespan", lambda each: (each.makespan_s, "s")),
        ("evictions", lambda each: (each.evictions, "count")),
        ("recomputed tokens", lambda each: (each.recomputed_tokens, "count")),
        ("simulated in", lambda each: (each.wall_s, "s")),
    ]


def _cell(cells: list[Cell]) -> str:
    """The median over seeds, and where there are several, the least and the most."""
    values = [value for value, _ in cells if value is not None]
    kind = cells[0][1]
    if not values:
        return "-"
    shown = _show(median(values), kind)
    if len(values) > 1:
        shown += f" ({_show(min(values), kind)} to {_show(max(values), kind)})"
    return shown


def _show(value: float, kind: str) -> str:
    if value == float("inf"):
        return "never"
    if kind == "count":
        return f"{value:,.0f}"
    if kind == "share":
        return f"{value:.1%}"
    if kind == "s":
        return f"{value * 1000:.1f} ms" if value < 1 else f"{value:,.2f} s"
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def main() -> None:
    """Entry point of the command."""
    try:
        app()
    except MedhaError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_status) from None


if __name__ == "__main__":
    main()

"""medha-sim: serves a trace, or the plan's own workload, in virtual time and says how it went."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from plans.errors import MedhaError, UsageError
from runtime.interrupts import INTERRUPTED, loading, started, unwinding
from runtime.outputs import bundle_inputs, check_outputs, written_whole

if TYPE_CHECKING:
    from rich.progress import Progress

    from plans.plan import Plan
    from runtime.arrivals import Load, Offered
    from runtime.cli_sim_tables import Served
    from runtime.metrics import Summary
    from runtime.simulate import Run
    from runtime.timeline import Recorder

SHARE_OF_CAPACITY = 0.7
"""Rate of the plan's own workload where --qps is not given, over the predicted capacity."""
REFRESH_S = 0.1
"""Real seconds between two updates of the progress bar."""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def simulate_plan(  # noqa: PLR0917 (typer reads one parameter a flag)
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
    decisions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the decision log of a single run, JSON lines."),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Decide a decision log again and compare; serves nothing else."
        ),
    ] = None,
) -> None:
    """Serve requests in virtual time, by the plan's own step times, without any GPU."""
    with loading():  # an interrupt inside numpy's start-up code can be lost
        from plans.check import load_plan
        from runtime.arrivals import Load, offer
        from runtime.cli_sim_tables import Served, print_tables
        from runtime.decisions import decision_log
        from runtime.simulate import packs_ahead, simulate

    plan = load_plan(bundle / "plan.yaml" if bundle.is_dir() else bundle)
    outputs = [timeline, plot, decisions]
    if replay is not None:
        _replay(plan, replay, [trace, qps, duration, arrivals, policy, json, *outputs])
        return
    policies = list(dict.fromkeys(policy or [plan.scheduler.policy]))
    single = {"--timeline": timeline, "--decisions": decisions}
    _check_flags(plan, policies, runs=len(policies) * seeds, single=single, plot=plot)
    figures = None if json is None or json == "-" else Path(json)
    read = {"BUNDLE": bundle_inputs(bundle), "--trace": [] if trace is None else [trace]}
    check_outputs({**single, "--plot": plot, "--json": figures}, read, prints=True)
    load = Load(qps=qps, duration_s=duration, seed=seed, arrivals=arrivals)
    if trace is None and qps is None:
        load = _default_load(plan, load)
    served: list[Served] = []
    recorders: list[Recorder] = []
    with _interruptible(), _progress() as progress:
        for each in range(seed, seed + seeds):
            source = plan.workload if trace is None else trace
            load = _seeded(load, each)
            offered = offer(source, load, context_tokens=plan.limits.context_tokens)
            if served and offered.requests == served[-1].offered.requests:
                raise UsageError(
                    f"--seeds {seeds}: {offered.source} at its own times has nothing random;"
                    " use --arrivals poisson, or one seed"
                )
            for name in policies:
                label = f"{name}, seed {each}" if seeds > 1 else name
                watch = _Watch(progress, label, offered, plan, keep=timeline is not None)
                ahead = packs_ahead(plan, name)
                with decision_log(decisions, plan, name, learn=ahead, ahead=ahead) as log:
                    run = simulate(plan, offered.requests, name, observe=watch.replica, log=log)
                watch.done(run)
                recorders += watch.recorders
                summary = _summary(plan, offered, run, name)
                served.append(
                    Served(policy=name, seed=each, offered=offered, run=run, summary=summary)
                )
    if timeline is not None:
        from runtime.timeline import write_timeline

        with written_whole(timeline) as partial:
            write_timeline(partial, recorders)
    if plot is not None:
        _plot(plot, plan, served)
    if json is not None:
        text = _json(plan, load, served)
        if json == "-":
            print(text)
            return
        with written_whole(Path(json)) as partial:
            partial.write_text(text + "\n")
    print_tables(plan, load, served)


@contextmanager
def _interruptible() -> "Iterator[None]":
    """Ctrl-C ends with a word and 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _check_flags(
    plan: "Plan",
    policies: list[str],
    *,
    runs: int,
    single: dict[str, Path | None],
    plot: Path | None,
) -> None:
    """Refuses before anything long starts."""
    from runtime.plot import check_format
    from runtime.scheduler import load_policy

    for name in policies:
        load_policy(name, plan.scheduler)
    for flag, path in single.items():
        if path is not None and runs > 1:
            raise UsageError(f"{flag} holds one run; this would be {runs}: one policy, one seed")
    if single["--decisions"] is not None and plan.parallelism.replicas > 1:
        raise UsageError(
            f"--decisions holds one engine; {plan.name} has {plan.parallelism.replicas} replicas"
        )
    if plot is not None:
        check_format(plot)


def _replay(plan: "Plan", path: Path, others: list[object]) -> None:
    if any(other is not None for other in others):
        raise UsageError(
            "--replay decides a log again and serves nothing: no other flag goes with it"
        )
    from runtime.decisions import read_log, replay

    done = replay(plan, read_log(path), str(path))
    print(f"{path}: {done.steps} steps, {len(done.records)} requests, decided alike")


def _default_load(plan: "Plan", load: "Load") -> "Load":
    import msgspec

    qps = float(f"{SHARE_OF_CAPACITY * plan.predicted.capacity_rps:.3g}")
    return msgspec.structs.replace(load, qps=qps)


def _seeded(load: "Load", seed: int) -> "Load":
    import msgspec

    return msgspec.structs.replace(load, seed=seed)


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


class _Watch:
    """The progress bar of one run, and the recorders of its replicas where a timeline is wanted."""

    def __init__(
        self, progress: "Progress", label: str, offered: "Offered", plan: "Plan", *, keep: bool
    ) -> None:
        self.recorders: list[Recorder] = []
        self._progress = progress
        self._stages = plan.parallelism.spp
        self._keep = keep
        total = len(offered.requests)
        self._task = progress.add_task(label, total=total, virtual="0 virtual s")

    def replica(self, replica: int) -> "_Watcher":
        """The observer of one replica."""
        from runtime.timeline import Recorder

        recorder = Recorder(stages=self._stages, replica=replica) if self._keep else None
        if recorder is not None:
            self.recorders.append(recorder)
        return _Watcher(self, recorder)

    def show(self, ended: int, now_s: float) -> None:
        """Moves the bar by the requests that ended."""
        self._progress.advance(self._task, ended)
        self._progress.update(self._task, virtual=f"{now_s:.0f} virtual s")

    def done(self, run: "Run") -> None:
        """Fills the bar."""
        end_s = max((record.finished_s for record in run.records), default=0.0)
        self._progress.update(self._task, completed=len(run.records))
        self.show(0, end_s)


class _Watcher:
    """Engine observer that moves the bar now and then and passes everything on to a recorder."""

    def __init__(self, watch: _Watch, recorder: "Recorder | None") -> None:
        self._watch = watch
        self._recorder = recorder
        self._ended = 0
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
            self._watch.show(self._ended, now_s)
            self._ended = 0

    def collected(self, result: Any) -> None:
        """For the recorder."""
        if self._recorder is not None:
            self._recorder.collected(result)

    def ended(self, record: Any, now_s: float) -> None:
        """One more."""
        self._ended += 1
        if self._recorder is not None:
            self._recorder.ended(record, now_s)


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


def _json(plan: "Plan", load: "Load", served: "list[Served]") -> str:
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


def _plot(path: Path, plan: "Plan", served: "list[Served]") -> None:
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
    with written_whole(path) as partial:
        draw_ttft(partial, classes, title=title)


def main() -> None:
    """Entry point of the command."""
    try:
        with unwinding():
            app()
    except MedhaError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_status) from None


if __name__ == "__main__":
    started(lambda: main)

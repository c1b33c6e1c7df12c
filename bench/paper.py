"""The scheduling experiments of arXiv 2409.17264, in virtual time: `python -m bench.paper --help`.

    plan       writes the plan that all runs share
    run        serves mixes, rates, policies and seeds under one protocol, a line of CSV each
    capacity   the highest rate with 90 % of the requests in time, by bisection over common seeds
    report     tables and plots from the CSV files; runs nothing

A run whose line is in the output already is not repeated, so an interrupted grid goes on.
"""

import itertools
import math
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from bench.paper_capacity import CAPACITY_SHARE, highest_power, rate
from bench.paper_report import write_report
from bench.paper_run import Case, Protocol, run_case
from bench.paper_setup import MIXES, POLICIES, RATES, WINDOW_S, paper_plan
from bench.paper_table import append, origin, read
from plans.codec import content_hash, dump_file
from plans.plan import Plan
from runtime.scheduler import load_policy

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Traces = Annotated[Path, typer.Option(help="Folder of medha_mix_*pct_long.csv.")]
Commit = Annotated[
    str | None, typer.Option(help="Of the code that runs, where that is no checkout.")
]
Out = Annotated[Path, typer.Option(help="CSV file that lines are added to.")]


@app.command()
def plan(out: Annotated[Path, typer.Argument(help="File to write.")]) -> None:
    """Writes the plan of the experiments: 8B on 16 A100 at TP8 x SPP2."""
    dump_file(out, paper_plan())


@app.command()
def run(  # noqa: PLR0917 (typer reads one parameter a flag)
    out: Out,
    protocol: Annotated[Literal["fair", "harness"], typer.Option()] = "fair",
    mix: Annotated[list[int], typer.Option()] = list(MIXES),  # noqa: B006 (typer copies it)
    qps: Annotated[list[float], typer.Option()] = list(RATES),  # noqa: B006
    policy: Annotated[list[str], typer.Option()] = list(POLICIES),  # noqa: B006
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    seeds: Annotated[int, typer.Option(help="How many.")] = 1,
    window: Annotated[float, typer.Option(help="Seconds of arrivals.")] = WINDOW_S,
    traces: Traces = TRACES,
    commit: Commit = None,
) -> None:
    """Serves every combination that the output lacks."""
    runner = _Runner(out, traces, commit)
    for name in policy:
        load_policy(name, runner.plan.scheduler)  # refuses before anything long starts
    combinations = itertools.product(range(seed, seed + seeds), mix, qps, policy)
    for each_seed, each_mix, each_qps, name in combinations:
        runner.serve(
            Case(
                protocol=protocol,
                mix=each_mix,
                qps=each_qps,
                policy=name,
                seed=each_seed,
                window_s=window,
            )
        )


@app.command()
def capacity(  # noqa: PLR0917
    out: Out,
    protocol: Annotated[Literal["fair", "harness"], typer.Option()] = "fair",
    mix: Annotated[int, typer.Option()] = 5,
    policy: Annotated[list[str], typer.Option()] = list(POLICIES),  # noqa: B006
    seeds: Annotated[int, typer.Option()] = 2,
    window: Annotated[float, typer.Option()] = 1200.0,
    figure: Annotated[
        str, typer.Option(help="all_attained: TTFT in time; all_met: and mean TBT in time.")
    ] = "all_attained",
    traces: Traces = TRACES,
    commit: Commit = None,
) -> None:
    """Bisects the rate of each policy; every probe becomes a line of the output."""
    runner = _Runner(out, traces, commit)
    for name in policy:
        rate = runner.capacity_rps(
            name, protocol=protocol, mix=mix, seeds=seeds, window_s=window, figure=figure
        )
        print(f"{name}: {rate:.3g} requests/s", flush=True)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="CSV files of run and capacity.")],
    out: Annotated[Path, typer.Option(help="Markdown file; plots lie beside it.")],
    traces: Traces = TRACES,
) -> None:
    """Makes tables and plots of what was run."""
    write_report(read(runs), out, traces)


class _Runner:
    """Runs cases that the output lacks and adds them to it."""

    def __init__(self, out: Path, traces: Path, commit: str | None) -> None:
        self.plan: Plan = paper_plan()
        self._out = out
        self._traces = traces
        self._made = origin(content_hash(self.plan), commit)
        self._known = {
            row.case: row for row in read([out]) if row.origin.plan_hash == self._made.plan_hash
        }

    def serve(self, case: Case) -> None:
        """Runs a case, unless it is known."""
        if case in self._known:
            return
        label = (
            f"{case.protocol} {case.mix} % {case.qps:g}/s {case.policy} seed {case.seed}"
            f" {case.window_s:g} s"
        )

        def show(now_s: float) -> None:
            if sys.stderr.isatty():
                print(f"\r{label}: {now_s:.0f} virtual s", end="", file=sys.stderr, flush=True)

        outcome, _ = run_case(self.plan, case, self._traces, progress=show)
        append(self._out, outcome, self._made)
        self._known |= {row.case: row for row in read([self._out]) if row.case == case}
        short, every = outcome.classes["short"], outcome.classes["all"]
        print(
            f"{label}: short TTFT P50 {short.get('ttft_p50', math.nan):.3g},"
            f" P99 {short.get('ttft_p99', math.nan):.3g} s, in time"
            f" {every.get('attained', math.nan):.1%}, {outcome.wall_s:.0f} s",
            flush=True,
        )

    def capacity_rps(
        self, policy: str, *, protocol: Protocol, mix: int, seeds: int, window_s: float, figure: str
    ) -> float:
        """Highest rate of the grid at which the mean share over the seeds reaches 90 %."""

        def enough(power: int) -> bool:
            shares = []
            for seed in range(seeds):
                case = Case(
                    protocol=protocol,
                    mix=mix,
                    qps=rate(power),
                    policy=policy,
                    seed=seed,
                    window_s=window_s,
                )
                self.serve(case)
                shares.append(self._known[case][figure])
                if sum(shares) + seeds - len(shares) < CAPACITY_SHARE * seeds:
                    return False  # the other seeds cannot change it
            return True

        return rate(highest_power(enough))


if __name__ == "__main__":
    app()

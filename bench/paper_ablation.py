"""Why relative slack loses where it loses: one change at a time, on the 5 % mix.

    python -m bench.paper_ablation run --out FILE.csv [--qps 0.75] [--window 1200] [--seeds 2]
    python -m bench.paper_ablation table FILE.csv --out FILE.md

A row carries the variant in the column `policy`; its plan hash differs where the plan does.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from msgspec import structs

from bench.paper import TRACES
from bench.paper_run import Case, run_case
from bench.paper_setup import paper_plan
from bench.paper_table import append, origin, read
from plans.codec import content_hash
from plans.plan import Plan
from plans.workload import TtftTarget
from runtime.scheduler import Scheduling
from runtime.scheduler.policy import LEAST_S, Policy, Prefills, Ranked, slack_s

HEAD = (
    "variant",
    "requests/s, arrivals",
    "seed (load)",
    "short TTFT P50 / P90 / P99, s",
    "long TTFT P50 / P90, s",
    "long end to end, mean s",
    "in time: short / long",
    "TPOT P99, ms",
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Relative:
    """Relative slack with each part of ours by itself."""

    def __init__(
        self,
        *,
        demote: bool = False,
        lead: float = 0.0,
        late_by_work: bool = False,
        always_yield: float | None = None,
        most: float = 0.4,
    ) -> None:
        """demote       a late request becomes best effort
        lead            of the prefill in progress, in the key
        late_by_work    best effort by remaining work instead of by the key
        always_yield    share that a long leaves whatever its slack; else min(max(key, 0), most)
        """
        self._demote = demote
        self._lead = lead
        self._late_by_work = late_by_work
        self._always_yield = always_yield
        self._most = most

    def rank(self, waiting: Prefills, *, now_s: float) -> Ranked:
        """Keys of the variant."""
        slack = slack_s(waiting, now_s)
        rho = slack / np.maximum(waiting.work_s, LEAST_S)
        late = (slack < 0) & self._demote
        keys = rho - self._lead * waiting.recent
        if self._late_by_work:
            keys = np.where(late, waiting.remaining_s, keys)
        yields = np.clip(rho, 0.0, self._most)
        if self._always_yield is not None:
            yields = np.full(len(rho), self._always_yield)
        return Ranked(keys=keys, yields=yields * waiting.long, demoted=late)


class Lanes:
    """Two lanes with weights of slack and with or without the share of the slower one."""

    def __init__(
        self,
        *,
        weight: float = 0.5,
        late: float = 0.005,
        express_s: float = 0.5,
        share: bool = True,
        by_remaining: bool = False,
    ) -> None:
        """As in runtime/scheduler/lars_lanes.py; `late` weighs what is beyond one deadline late."""
        self._weight = weight
        self._late = late
        self._express_s = express_s
        self._share = share
        self._by_remaining = by_remaining

    def rank(self, waiting: Prefills, *, now_s: float) -> Ranked:
        """Keys of the variant."""
        work_s = waiting.remaining_s if self._by_remaining else waiting.work_s
        express = work_s <= self._express_s
        slack = slack_s(waiting, now_s)
        lost = np.minimum(slack + waiting.deadline_s, 0.0)
        keys = waiting.remaining_s + self._weight * (slack - lost) + self._late * lost
        if not self._share:
            keys = keys - 1e9 * express  # first by key instead of by class
        return Ranked(
            keys=keys,
            yields=np.zeros(len(keys)),
            demoted=~express & self._share,
        )


def variants(plan: Plan) -> Iterator[tuple[str, Plan, Policy]]:
    """(name, plan, policy)."""
    published, ours = Relative(), Relative(demote=True, lead=0.02)
    yield "published", plan, published
    yield "published + demotion", plan, Relative(demote=True)
    yield "published + lead 0.02", plan, Relative(lead=0.02)
    yield "lars = both", plan, ours
    yield "lars, max_yield 0", plan, Relative(demote=True, lead=0.02, most=0.0)
    yield "lars, max_yield 0.2", plan, Relative(demote=True, lead=0.02, most=0.2)
    yield "lars, max_yield 0.8", plan, Relative(demote=True, lead=0.02, most=0.8)
    yield "lars, yields 0.8 always", plan, Relative(demote=True, lead=0.02, always_yield=0.8)
    yield "lars, late by work", plan, Relative(demote=True, lead=0.02, late_by_work=True)
    scheduler = plan.scheduler
    for tokens in (8192, 262144):
        changed = structs.replace(plan, scheduler=structs.replace(scheduler, long_tokens=tokens))
        yield f"lars, long from {tokens}", changed, ours
    for budget_s in (0.02, 0.05):
        changed = structs.replace(
            plan, scheduler=structs.replace(scheduler, step_budget_s=budget_s)
        )
        yield f"lars, step {budget_s * 1e3:.0f} ms", changed, ours
    for multiplier, floor_s in ((1.25, 0.5), (3.0, 0.5), (1.5, 0.2), (1.5, 1.0)):
        ttft = TtftTarget(multiplier=multiplier, floor_s=floor_s)
        changed = structs.replace(plan, targets=structs.replace(plan.targets, ttft=ttft))
        yield f"lars, deadline {multiplier} x, {floor_s} s", changed, ours
    yield "lars-lanes", plan, Lanes()
    for weight in (0.0, 0.1, 0.5, 1.0):
        yield f"lanes, weight {weight} for ever", plan, Lanes(weight=weight, late=weight)
    for weight in (0.2, 1.0):
        yield f"lanes, weight {weight}", plan, Lanes(weight=weight)
    yield "lanes, no share", plan, Lanes(share=False)
    yield "lanes, by remaining work", plan, Lanes(by_remaining=True)
    yield "lanes, express 0.1 s", plan, Lanes(express_s=0.1)
    yield "lanes, express 2 s", plan, Lanes(express_s=2.0)


@app.command()
def run(  # noqa: PLR0917 (typer reads one parameter a flag)
    out: Annotated[Path, typer.Option(help="CSV file that lines are added to.")],
    qps: float = 0.75,
    window: float = 1200.0,
    seeds: int = 2,
    only: Annotated[list[str] | None, typer.Option(help="Variants; all by default.")] = None,
    traces: Path = TRACES,
    commit: str | None = None,
) -> None:
    """Serves every variant that the output lacks."""
    base = paper_plan()
    known = {row.case for row in read([out])}
    for seed in range(seeds):
        for name, plan, policy in variants(base):
            case = Case(protocol="fair", mix=5, qps=qps, policy=name, seed=seed, window_s=window)
            if case in known or (only and name not in only):
                continue
            scheduling = Scheduling(name=name, policy=policy, chunk_tokens=None)
            outcome, _ = run_case(plan, case, traces, scheduling=scheduling)
            append(out, outcome, origin(content_hash(plan), commit))
            short, long = outcome.classes["short"], outcome.classes["long"]
            print(
                f"{name}, seed {seed}: short TTFT P50 {short['ttft_p50']:.3g}, P99"
                f" {short['ttft_p99']:.3g} s, long end to end {long['e2e_mean']:.4g} s,"
                f" {outcome.wall_s:.0f} s",
                flush=True,
            )


@app.command()
def table(
    runs: Annotated[Path, typer.Argument(help="CSV file of run.")],
    out: Annotated[Path, typer.Option(help="Markdown file.")],
) -> None:
    """Writes the variants in the order in which they ran."""
    rows = read([runs])
    first = rows[0]
    about = f"""8B on 16 A100 at TP8 x SPP2, 5 % mix, fair protocol as in `bench/paper_run.py`,
virtual time, no GPU. Run on {first.origin.date}, code {first.origin.commit}, Python
{first.origin.python}, numpy {first.origin.numpy}; plan {first.origin.plan_hash[:12]} where the
variant does not change it. Command: `python -m bench.paper_ablation run`. Load is predicted lone
prefill seconds a second."""
    lines = [
        "# One change at a time, simulated",
        "",
        about,
        "",
        f"| {' | '.join(HEAD)} |",
        "|" + "---|" * len(HEAD),
    ]
    for row in rows:
        times = [row[f"short_ttft_{figure}"] for figure in ("p50", "p90", "p99")]
        cells = [
            row.case.policy,
            f"{row.case.qps:g}, {row.case.window_s:g} s",
            f"{row.case.seed} ({row['load']:.2f})",
            " / ".join(f"{each:.3g}" for each in times),
            f"{row['long_ttft_p50']:.3g} / {row['long_ttft_p90']:.3g}",
            f"{row['long_e2e_mean']:.4g}",
            f"{row['short_attained']:.1%} / {row['long_attained']:.1%}",
            f"{row['all_tpot_p99'] * 1e3:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app()

"""The tables of medha-sim: one a class of requests, a column a policy."""

from collections.abc import Callable
from statistics import median

from msgspec import Struct
from rich import box
from rich.console import Console
from rich.table import Table

from plans.plan import Plan
from runtime.arrivals import Load, Offered
from runtime.metrics import ClassSummary, Spread, Summary
from runtime.simulate import Run


class Served(Struct, frozen=True, kw_only=True):
    """One policy under one seed."""

    policy: str
    seed: int
    offered: Offered
    run: Run
    summary: Summary


def print_tables(plan: Plan, load: Load, served: list[Served]) -> None:
    """Prints what was offered and one column a policy."""
    console = Console()
    offered = served[0].offered
    last_s = offered.requests[-1].arrival_s
    rate = f", {load.qps:g} requests/s" if load.qps is not None else ""
    console.print(
        f"[bold]{plan.name}[/]: {len(offered.requests)} requests of {offered.source} in"
        f" {last_s:.0f} s ({offered.arrivals}{rate}, seed {served[0].seed}), in virtual time",
        highlight=False,
        soft_wrap=True,
    )
    for note in offered.notes:
        console.print(f"  {note}", style="dim", highlight=False, soft_wrap=True)
    long = any(each.summary.classes["long"].requests for each in served)
    for name in ["short", "long"] if long else ["all"]:
        console.print(_class_table(name, plan, served))
    console.print(_run_table(served))
    if len({each.seed for each in served}) > 1:
        console.print("  median over the seeds (least to most)", style="dim")


def _class_table(name: str, plan: Plan, served: list[Served]) -> Table:
    limit = f"{plan.scheduler.long_tokens:,} prompt tokens"
    title = {"short": f"short: below {limit}", "long": f"long: from {limit} on"}.get(name, name)
    rows = [
        (label, [(each.policy, read(each.summary.classes[name])) for each in served])
        for label, read in _class_rows()
    ]
    return _table(title, rows)


def _run_table(served: list[Served]) -> Table:
    rows = [
        (label, [(each.policy, read(each.summary)) for each in served])
        for label, read in _run_rows()
    ]
    return _table("short and long together", rows)


def _table(title: str, rows: "list[tuple[str, list[tuple[str, Cell]]]]") -> Table:
    """A column a policy, in the order of their first run."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    policies = list(dict.fromkeys(policy for policy, _ in rows[0][1]))
    for policy in policies:
        table.add_column(policy, justify="right", no_wrap=True)
    for label, cells in rows:
        shown = [_cell([cell for name, cell in cells if name == policy]) for policy in policies]
        table.add_row(label, *shown)
    return table


Cell = tuple[float | None, str]
"""A figure and how it is shown: `count`, `share`, `s`, `ms` or `rate`."""


def _class_rows() -> list[tuple[str, Callable[[ClassSummary], Cell]]]:
    def of(quantity: str, field: str, unit: str) -> Callable[[ClassSummary], Cell]:
        def read(summary: ClassSummary) -> Cell:
            spread: Spread = getattr(summary, quantity)
            return getattr(spread, field), unit

        return read

    return [
        ("requests", lambda each: (each.requests, "count")),
        ("finished", lambda each: (each.finished, "count")),
        *[
            (f"{label} {field}, {unit}", of(quantity, field, unit))
            for label, quantity, unit, fields in (
                ("TTFT", "ttft_s", "s", ("p50", "p90", "p99", "max")),
                ("TBT", "tbt_s", "ms", ("p50", "p99", "max")),
                ("end to end", "e2e_s", "s", ("p50", "p99")),
            )
            for field in fields
        ],
        ("met their SLO", lambda each: (each.slo_attainment, "share")),
    ]


def _run_rows() -> list[tuple[str, Callable[[Summary], Cell]]]:
    return [
        ("goodput, requests/s", lambda each: (each.goodput_rps, "rate")),
        ("output tokens/s", lambda each: (each.output_tokens_per_s, "rate")),
        ("makespan, s", lambda each: (each.makespan_s, "s")),
        ("evictions", lambda each: (each.evictions, "count")),
        ("recomputed tokens", lambda each: (each.recomputed_tokens, "count")),
        ("simulated in, s", lambda each: (each.wall_s, "s")),
    ]


def _cell(cells: list[Cell]) -> str:
    """The median over seeds, and where there are several, the least and the most."""
    values = [value for value, _ in cells if value is not None]
    kind = cells[0][1]
    if not values:
        return "-"
    shown = _show(median(values), kind)
    if min(values) < max(values):
        shown += f" ({_show(min(values), kind)}..{_show(max(values), kind)})"
    return shown


def _show(value: float, kind: str) -> str:
    if value == float("inf"):
        return "never"
    if kind == "count":
        return f"{value:,.0f}"
    if kind == "share":
        return f"{value:.1%}"
    if kind == "ms":
        return f"{value * 1000:,.1f}"
    if kind == "s":
        return f"{value:.3f}" if value < 10 else f"{value:,.1f}"
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"

"""Plots of result rows: TTFT of short requests over the rate, and what it costs the long ones."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.paper_table import Row

FIGURES = (
    ("short_ttft_p50", "short TTFT P50, s"),
    ("short_ttft_p99", "short TTFT P99, s"),
    ("long_e2e_mean", "long end to end, mean s"),
)
MARKS = "osv^<>DPXd*h+x1234"


def draw(rows: Sequence[Row], stem: Path) -> list[tuple[str, Path]]:
    """Writes an SVG for each protocol, mix and window; returns titles and files."""
    drawn = []
    for key in sorted({(row.case.protocol, row.case.mix, row.case.window_s) for row in rows}):
        protocol, mix, window_s = key
        group = [row for row in rows if (row.case.protocol, row.case.mix, row.case.window_s) == key]
        path = stem.with_name(f"{stem.name}-{protocol}-{mix}pct-{window_s:g}s.svg")
        title = f"{protocol}, {mix} % long, {window_s:g} s of arrivals (simulated)"
        _panels(group, path, title)
        drawn.append((title, path))
    return drawn


def _panels(rows: Sequence[Row], path: Path, title: str) -> None:
    with mpl.rc_context({"svg.hashsalt": "medha"}):  # the same rows draw the same bytes
        figure = Figure(figsize=(14, 4.6), layout="constrained")
        panels = figure.subplots(1, len(FIGURES), squeeze=False)[0]
        policies = sorted({row.case.policy for row in rows})
        for panel, (column, label) in zip(panels, FIGURES, strict=True):
            for mark, policy in zip(MARKS * 2, policies, strict=False):
                points = _points(rows, policy, column)
                if points:
                    panel.plot(*zip(*points, strict=True), marker=mark, label=policy, linewidth=1)
            panel.set(xlabel="requests/s", ylabel=label, yscale="log")
            panel.grid(visible=True, alpha=0.3)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", fontsize="small")
        figure.suptitle(title)
        figure.savefig(path, metadata={"Date": None})


def _points(rows: Sequence[Row], policy: str, column: str) -> list[tuple[float, float]]:
    """(rate, mean over the seeds) where every seed has a finite value."""
    by_rate: dict[float, list[float]] = {}
    for row in rows:
        if row.case.policy == policy:
            by_rate.setdefault(row.case.qps, []).append(row[column])
    return [
        (qps, fmean(values))
        for qps, values in sorted(by_rate.items())
        if all(math.isfinite(each) and each > 0 for each in values)
    ]

"""What each part contributes: policies in a ladder, each step changing one thing."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from bench.paper_setup import MIXES, RATES, mix_file, paper_plan
from bench.paper_table import Row
from planner.schedule import rows_of
from plans.chunks import WorkTable
from runtime.traces import Trace, read_trace

LADDER = (
    ("fcfs-whole", "whole prompts one at a time, 8,192 tokens a step"),
    ("fcfs,chunk=2048", "2,048 tokens a step, decodes beside them"),
    ("fcfs,chunk=512", "512 tokens a step"),
    ("fcfs", "steps of equal time (adaptive chunks)"),
    ("lars-paper", "relative slack, yield up to 0.4"),
    ("lars", "late requests demoted, lead of the prefill in progress"),
    ("lars-lanes", "express lane; long ones by work and slack"),
)
FIGURES = ("short_ttft_p50", "short_ttft_p90", "short_ttft_p99", "long_e2e_mean")
HEAD = (
    "policy",
    "what changes",
    "short TTFT P50",
    "P90",
    "P99",
    "long end to end, mean",
    "in time",
    "TPOT P99, ms",
)
STATIC = (512, 2048, 8192)


def ladder(rows: Sequence[Row]) -> str:
    """Table of one protocol, mix, window and rate; each line over the one before."""
    lines = [
        f"| {' | '.join(HEAD)} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    before: dict[str, float] = {}
    for policy, change in LADDER:
        found = [row for row in rows if row.case.policy == policy]
        if not found:
            lines.append(f"| `{policy}` | {change} | not run | | | | | |")
            continue
        now = {figure: fmean(row[figure] for row in found) for figure in FIGURES}
        cells = " | ".join(_cell(now[figure], before.get(figure)) for figure in FIGURES)
        attained = fmean(row["all_attained"] for row in found)
        tpot_ms = 1e3 * fmean(row["all_tpot_p99"] for row in found)
        lines.append(f"| `{policy}` | {change} | {cells} | {attained:.1%} | {tpot_ms:.0f} |")
        before = now
    return "\n".join(lines)


def _cell(value: float, before: float | None) -> str:
    if not math.isfinite(value):
        return "never"
    if before is None or not math.isfinite(before):
        return f"{value:.3g} s"
    return f"{value:.3g} s (/ {before / value:.3g})"


def load_table(traces: Path) -> str:
    """Mean lone prefill by chunk, and the load that follows at the paper's rates."""
    plan = paper_plan()
    lines = [
        "| mix | chunk | mean lone prefill, s | "
        + " | ".join(f"load at {qps:g}/s" for qps in RATES)
        + " |",
        "|---|---|---|" + "---|" * len(RATES),
    ]
    for mix in MIXES:
        trace = read_trace(mix_file(traces, mix))
        assert isinstance(trace, Trace)
        context = plan.limits.context_tokens
        schedules = [("by the plan", plan.prefill.chunks)]
        schedules += [(f"{chunk:,}", rows_of(((context, chunk),))) for chunk in STATIC]
        for name, chunks in schedules:
            work = WorkTable(chunks, plan.step_time, plan.kv.tokens_per_kvp_shard)
            mean_s = fmean(work.solo_s(row.input_tokens) for row in trace.rows)
            loads = " | ".join(f"{mean_s * qps:.2f}" for qps in RATES)
            lines.append(f"| {mix} % | {name} | {mean_s:.3f} | {loads} |")
    return "\n".join(lines)

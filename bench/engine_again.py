"""Predicts the loads of a measured engine again, with what the prediction has learnt since.

    python -m bench.engine_again bench/results/engine_plan_h100_202611.yaml \
        bench/results/engine_h100_202611.csv

The same plan, arrivals and budgets in virtual time, by what launches took for lone prompts: as
the packer of that run cut chunks, which ended anywhere in a tile of queries, then as today's does.
Prints a table; measures nothing.
"""

import argparse
import csv
from pathlib import Path

from bench.engine_load import (
    burst_load,
    burst_row,
    mixed_load,
    mixed_row,
    packed_as,
    predicted,
    with_budget,
    with_host,
)
from plans.codec import load_file
from plans.plan import Plan
from runtime.executor.simulated import Host

MIXED = {
    "short_ttft_p50_s": 1e3,
    "short_ttft_p90_s": 1e3,
    "short_ttft_p99_s": 1e3,
    "tbt_p50_ms": 1,
    "tbt_p99_ms": 1,
    "long_ttft_s": 1,
}
BURST = {"tokens_per_s": 1, "ttft_p50_s": 1, "ttft_p99_s": 1}
"""Figures that are compared, and what they are shown times."""


def main() -> None:
    """Prints the table."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("plan", type=Path)
    flags.add_argument("csv", type=Path)
    given = flags.parse_args()
    plan = load_file(given.plan, Plan)
    with given.csv.open() as file:
        rows = list(csv.DictReader(file))
    lone = next(each for each in rows if each["part"] == "alone")
    host = Host(
        decide_s=float(lone["decide_ms"]) / 1e3,
        chunk_s=float(lone["submit_chunk_ms"]) / 1e3,
        decode_s=float(lone["submit_decode_ms"]) / 1e3,
    )
    print("| load | figure | measured | predicted | error | with today's packer |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        if row.get("kind") != "measured":
            continue
        here = with_budget(plan, float(row["step_budget_s"]))
        if row["part"] == "burst":
            load, figures, shown = burst_load(int(row["requests"])), BURST, burst_row
        else:
            load = mixed_load(int(row["seed"]), int(row["long_tokens"]), float(row["load_s"]))
            figures, shown = MIXED, mixed_row
        executor = with_host(here, host)
        with packed_as(row.get("chunks_end") or "anywhere"):
            then = shown(predicted(here, load, row["policy"], executor))
        now = shown(predicted(here, load, row["policy"], executor))
        name = f"{row['part']}, {1e3 * float(row['step_budget_s']):.0f} ms"
        for figure, times in figures.items():
            measured, again = float(row[figure]), float(then[figure])
            unit = "_ms" if times == 1e3 else ""
            label = figure.removesuffix("_s") + unit if unit else figure
            print(
                f"| {name} | {label} | {times * measured:.4g} | {times * again:.4g} | "
                f"{100 * (again / measured - 1):+.1f} % | {times * float(now[figure]):.4g} |"
            )


if __name__ == "__main__":
    main()

"""Tables of an engine's results as the page beside them shows them, from the CSV file.

    python -m bench.engine_tables bench/results/engine_h100_202611.csv

Measured beside predicted; and beside vLLM 0.25.1 on an H200 (2026-11-22), as its page has it.
"""

import argparse
import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.engine_load import BY_HOST, BY_PLAN, BY_RUN, PREDICTED

Text = Mapping[str, str]

PEER_TTFT_S = {1000: 0.037, 8000: 0.213, 32000: 1.198, 128000: 10.04, 256000: 35.28}
PEER_TBT_MS = {1000: 5.03, 8000: 5.29, 32000: 6.06, 128000: 8.99, 256000: 12.88}
"""Of vLLM, by prompt tokens."""
KINDS = ("measured", PREDICTED, BY_PLAN, BY_HOST, BY_RUN)
BURST = {
    "tokens/s": ("tokens_per_s", 1.0),
    "all of it, s": ("seconds", 1.0),
    "TTFT P50, s": ("ttft_p50_s", 1.0),
    "P99, s": ("ttft_p99_s", 1.0),
    "TBT P50, ms": ("tbt_p50_ms", 1.0),
    "P99, ms": ("tbt_p99_ms", 1.0),
    "steps": ("steps", 1.0),
    "device, s": ("device_s", 1.0),
    "launch, ms": ("submit_chunk_ms", 1.0),
}
MIXED = {
    "short TTFT P50, ms": ("short_ttft_p50_s", 1e3),
    "P90": ("short_ttft_p90_s", 1e3),
    "P99": ("short_ttft_p99_s", 1e3),
    "TBT P50, ms": ("tbt_p50_ms", 1.0),
    "TBT P99": ("tbt_p99_ms", 1.0),
    "max": ("tbt_max_ms", 1.0),
    "long TTFT, s": ("long_ttft_s", 1.0),
    "device, s": ("device_s", 1.0),
    "launch, ms": ("submit_chunk_ms", 1.0),
}
"""Heading, column and scale."""


def seconds(value: float) -> str:
    """With the unit that suits it."""
    return f"{value:.4g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def alone(rows: Sequence[Text]) -> Iterator[str]:
    """Prompts one at a time."""
    peer = "vLLM, H200"
    yield f"| prompt tokens | repeats | TTFT | predicted | {peer} | TBT | predicted | {peer} |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda each: int(each["prompt_tokens"])):
        tokens = int(row["prompt_tokens"])
        peer = seconds(PEER_TTFT_S[tokens]) if tokens in PEER_TTFT_S else "-"
        spread = f"{seconds(float(row['ttft_min_s']))} to {seconds(float(row['ttft_max_s']))}"
        yield (
            f"| {tokens:,} | {row['repeats']} | {seconds(float(row['ttft_s']))} ({spread}) |"
            f" {seconds(float(row['ttft_predicted_s']))} | {peer} |"
            f" {float(row['tbt_ms']):.3g} ms | {float(row['tbt_predicted_ms']):.3g} ms |"
            f" {PEER_TBT_MS.get(tokens, '-')} ms |"
        )


def loads(rows: Sequence[Text], columns: Mapping[str, tuple[str, float]]) -> Iterator[str]:
    """A load a budget, as measured and in each way in which it is predicted."""
    yield "| steps of | " + " | ".join(["", *columns]) + " |"
    yield "|" + "---|" * (len(columns) + 2)
    runs = dict.fromkeys((row["step_budget_s"], row.get("seed", "")) for row in rows)
    for budget_s, seed in runs:
        run = [
            row for row in rows if (row["step_budget_s"], row.get("seed", "")) == (budget_s, seed)
        ]
        for row in sorted(run, key=lambda each: KINDS.index(each.get("kind") or "measured")):
            cells = [
                f"{scale * float(row[name]):.4g}" if row.get(name) else ""
                for name, scale in columns.values()
            ]
            of = f"{1e3 * float(budget_s):.3g} ms" if budget_s else "as planned"
            of += f", seed {seed}" if seed else ""
            yield f"| {of} | {row.get('kind', '')} | " + " | ".join(cells) + " |"


def main() -> None:
    """Prints the tables."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("file", type=Path)
    with flags.parse_args().file.open(newline="") as file:
        found = [row for row in csv.DictReader(file) if not row.get("failed")]
    for title, part, lines in (
        ("One prompt at a time", "alone", alone),
        ("Burst", "burst", lambda rows: loads(rows, BURST)),
        ("Mixed load", "mixed", lambda rows: loads(rows, MIXED)),
    ):
        rows = [row for row in found if row["part"] == part]
        if rows:
            print("\n".join([f"## {title}", "", *lines(rows), ""]))


if __name__ == "__main__":
    main()

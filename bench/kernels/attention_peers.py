"""Our attention beside other libraries', alternately in one process, on this GPU.

    PYTHONPATH=. python bench/kernels/attention_peers.py [--out DIR] [--rows chunk,decode]
                                                         [--peers "fa3,sdpa flash,flashinfer"]

`--rows decode,chunk32,again` measures a part, which `attention_plot.py --with` puts into the
figures of all. FlashInfer's kernels are compiled before anything is timed, those for chunks only if
there are chunks; without FlashInfer among the peers a run starts at once.

Each candidate is checked against fp32 first and not timed if it is off. Figures are medians over
rounds in which every candidate runs once, and ratios are medians of the rounds' ratios: the chip is
power-limited, so rates drift by more than candidates differ. Writes attention_peers.csv and .md.
Ours and FlashInfer read pages in random order, the others dense keys. Our work list is built once a
step for all layers of a model, so it is not part of a call; its own time is the column `list_us`.
"""

import argparse
import csv
import dataclasses
import datetime as dt
import gc
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton

from bench.kernels.attention_cases import (
    Case,
    Problem,
    make,
    ours,
    portable,
    relative_error,
)
from bench.kernels.attention_libraries import LIBRARIES, Unsuited, compile_all
from codegen.kernels.paged_attention import triton as kernel

K = 1024
PREFILL = [Case(name="prefill", queries=n * K, keys=n * K, heads=heads)
           for n in (8, 32, 128) for heads in (32, 64)]  # fmt: skip
CHUNKS = [Case(name="chunk", queries=n, keys=keys * K, heads=heads)
          for heads in (32, 64) for keys in (128, 1024) for n in (32, 128, 512, 2048)]  # fmt: skip
DECODES = [Case(name="decode", queries=1, keys=keys * K, batch=batch, heads=heads, graph=graph)
           for heads in (32, 64)
           for batch, keys, graph in ((1, 4, True), (1, 128, False), (32, 4, False),
                                      (1, 1024, False))]  # fmt: skip
CHUNK32 = [case for case in CHUNKS if case.queries == 32]
GRAPHS = [case for case in DECODES if case.graph]
AGAIN = [
    *(case for case in DECODES if (case.batch, case.heads) == (32, 32)),
    *(case for case in CHUNKS if (case.keys, case.heads) == (128 * K, 32) and case.queries <= 512),
]
"""Rows of 2026-11-27 that a compiler beside them disturbed."""
ROWS = {
    "prefill": PREFILL,
    "chunk": CHUNKS,
    "decode": DECODES,
    "chunk32": CHUNK32,
    "again": AGAIN,
    "graphs": GRAPHS,
}
DECODE_BESIDE = "our decode"
"""One query over the same pages, in the rounds of a chunk of 32."""
FIELDS = ["case", "queries", "keys", "batch", "heads", "page", "graph", "candidate", "us", "p20",
          "p80", "rounds", "tflops", "tb_s", "floor_us", "of_floor", "of_fa3", "error", "list_us",
          "of_decode", "measured", "card"]  # fmt: skip
PORTABLE = [("prefill", 8 * K, 32), ("prefill", 32 * K, 32), ("chunk", 512, 32)]
PAGED = {"ours", "portable Triton", "flashinfer"}
TOLERANCE = 6e-3
"""As in attention_check.py."""
RATES = {"H100": (787e12, 3.02e12), "H200": (790e12, 4.28e12)}
"""The best rates seen of a bf16 product, and of a copy, bytes read and written, by card."""


def card_rates() -> tuple[float, float]:
    """(FLOP/s, bytes/s) of this card; those of an H200 where it is unknown."""
    name = torch.cuda.get_device_name()
    return next((rates for card, rates in RATES.items() if card in name), RATES["H200"])


def timed(run: Callable[[], Any], repeats: int) -> float:
    """Microseconds of a call, from device events around several."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / repeats


def cleared(run: Callable[[], Any], flush: torch.Tensor) -> Callable[[], float]:
    """A measurement with a cold L2: the flush runs before the first event."""

    def measure() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    return measure


def replayed(runs: list[Callable[[], Any]]) -> Callable[[], float]:
    """A measurement of one call as part of a CUDA graph that calls each of `runs` in turn."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return lambda: timed(graph.replay, 8) / len(runs)


def candidates_of(
    case: Case, problems: list[Problem], peers: list[str]
) -> dict[str, list[Callable[[], Any]]]:
    """By name, a call for each copy of the data."""
    found = {"ours": [ours(each, kernel) for each in problems]}
    if (case.name, case.queries, case.heads) in PORTABLE and case.keys <= 128 * K:
        found["portable Triton"] = [portable(each, kernel) for each in problems]
    for name in peers:
        try:
            runs = [LIBRARIES[name](case, each) for each in problems]
            runs[0]()
            torch.cuda.synchronize()
            found[name] = runs
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory for {case}", flush=True)
        except (ImportError, Unsuited) as error:
            print(f"no {name}: {error}", flush=True)
        except Exception as error:  # noqa: BLE001 - whatever a library raises; the others go on
            print(f"{name} fails on {case}: {error!r}"[:400], flush=True)
    return found


def list_time_us(problem: Problem) -> float:
    """What a step's first layer takes the host more than the others: median of five."""
    times = []
    for _ in range(5):
        problem.inputs.memo.clear()
        torch.cuda.synchronize()
        began = time.perf_counter()
        ours(problem, kernel)
        first = time.perf_counter()
        ours(problem, kernel)
        times.append(1e6 * (2 * first - began - time.perf_counter()))
    return statistics.median(times)


def decode_of(problem: Problem) -> Problem:
    """The first query of a chunk alone, over all of its keys."""
    inputs = problem.inputs
    host = SimpleNamespace(query_starts=[0, 1], kv_lens=inputs.host.kv_lens, causal=[True])
    starts = torch.tensor([0, 1], dtype=torch.int32, device=problem.q_TNH.device)
    alone = {"slots_T": inputs.slots_T[:1], "query_starts_B1": starts, "host": host, "memo": {}}
    one = SimpleNamespace(**{**vars(inputs), **alone})
    return dataclasses.replace(problem, q_TNH=problem.q_TNH[:1].contiguous(), inputs=one)


def measure(case: Case, rounds: int, peers: list[str]) -> list[dict[str, Any]]:
    """A row a candidate."""
    problems = [make(case, seed) for seed in range(6 if case.graph else 1)]
    candidates = candidates_of(case, problems, peers)
    rows, clocks = [], {}
    measured = f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M}"
    # takes longer than the host takes to launch, so that a launch is not part of the time
    flush = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    for name, runs in candidates.items():
        error = relative_error(case, problems[0], runs[0](), rows=3 if case.keys > 200 * K else 8)
        rows.append(
            {
                "case": case.name,
                "queries": case.queries,
                "keys": case.keys,
                "batch": case.batch,
                "heads": f"{case.heads}/{case.kv_heads}",
                "page": case.page_tokens if name in PAGED else "dense",
                "graph": case.graph,
                "candidate": name,
                "error": f"{error:.1e}",
                "measured": measured,
                "card": torch.cuda.get_device_name(),
            }
        )
        if error <= TOLERANCE:  # NaN is no pass
            clocks[name] = replayed(runs) if case.graph else cleared(runs[0], flush)
    if case.queries == 32 and case.batch == 1:  # a goal is a ratio to our decode of as many keys
        clocks[DECODE_BESIDE] = cleared(ours(decode_of(problems[0]), kernel), flush)
    for each in clocks.values():
        each()
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for number in range(rounds):
        for name in clocks if number % 2 == 0 else reversed(clocks):
            times[name].append(clocks[name]())
    for row in rows:
        row.update(figures(case, times.get(row["candidate"], []), times.get("fa3", [])))
        if DECODE_BESIDE in times and row["candidate"] == "ours":
            ratios = [a / b for a, b in zip(times["ours"], times[DECODE_BESIDE], strict=True)]
            row["of_decode"] = round(statistics.median(ratios), 3)
    rows[0]["list_us"] = round(list_time_us(problems[0]))
    return rows


def figures(case: Case, times: list[float], peer: list[float]) -> dict[str, Any]:
    """Median, spread and ratios; the peer's times are of the same rounds."""
    if not times:
        return {"us": "wrong"}
    us = statistics.median(times)
    low, high = (sorted(times)[int(share * (len(times) - 1))] for share in (0.2, 0.8))
    flops, bytes_s = card_rates()
    floor_us = 1e6 * case.floor_s(flops=flops, bytes_s=bytes_s)
    found = {
        "us": round(us, 1),
        "p20": round(low, 1),
        "p80": round(high, 1),
        "rounds": len(times),
        "tflops": round(case.flops / us / 1e6),
        "tb_s": round(case.kv_bytes / us / 1e6, 2),
        "floor_us": round(floor_us, 1),
        "of_floor": round(floor_us / us, 3),
    }
    if peer:
        ratios = [theirs / own for theirs, own in zip(peer, times, strict=True)]
        found["of_fa3"] = round(statistics.median(ratios), 3)
    return found


def rounds_for(case: Case, *, fast: bool) -> int:
    """Enough for a median, and less than a second or two a candidate."""
    expected_s = case.floor_s(flops=500e12, bytes_s=3e12)
    most = 15 if fast else 41
    return max(5, min(most, math.ceil((0.5 if fast else 2.0) / max(expected_s, 1e-4))))


def environment() -> list[str]:
    """What the figures depend on."""
    query = "name,power.limit,driver_version,clocks.max.sm"
    asked = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    card = "none"
    if shutil.which(asked[0]):
        card = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return [
        f"date: {dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC",
        f"command: python {' '.join(sys.argv)}",
        f"card, power limit, driver, max SM clock: {card}",
        f"torch {torch.__version__}, triton {triton.__version__}, Python {sys.version.split()[0]}",
    ]


def table(rows: list[dict[str, Any]], fields: list[str]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(fields) + " |", "|" + "---|" * len(fields)]
    lines += ["| " + " | ".join(str(row.get(name, "")) for name in fields) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Runs the rows asked for; what was measured is written after each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--rows", default="decode,chunk,prefill")
    parser.add_argument("--page", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=480.0, help="starts no case after these")
    parser.add_argument("--peers", default=",".join(LIBRARIES))
    parser.add_argument("--fast", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    skipped: list[Case] = []
    chosen_rows = {case: None for name in options.rows.split(",") for case in ROWS[name]}
    if "flashinfer" in options.peers:
        compile_all({1 if case.queries == 1 else 64 for case in chosen_rows})
        print(f"FlashInfer compiled after {time.monotonic() - began:.0f} s", flush=True)
    for case in chosen_rows:
        chosen = dataclasses.replace(case, page_tokens=options.page)
        if time.monotonic() - began > options.seconds:
            skipped.append(chosen)
            continue
        try:
            rounds = rounds_for(chosen, fast=options.fast)
            found = measure(chosen, rounds, options.peers.split(","))
        except torch.OutOfMemoryError:
            found = [{**dataclasses.asdict(chosen), "case": chosen.name, "us": "out of memory"}]
        rows += found
        for row in found:
            print({name: row.get(name) for name in FIELDS if name in row}, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        text = [*environment(), "", table(rows, FIELDS), ""]
        text += [f"not run: {each}" for each in skipped]
        (options.out / "attention_peers.md").write_text("\n".join(text))
        with (options.out / "attention_peers.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=FIELDS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    if skipped:
        print(f"not run for lack of time: {skipped}")


if __name__ == "__main__":
    main()

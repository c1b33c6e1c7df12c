"""How far predictions are off: per op on rows that no fit saw, and end to end on our own engine.

    python -m bench.prediction_error [--device h200] [--out bench/results]

Per op: every row of role `check` of the device's profile (planner/catalog/profiles), predicted from
the others; they lie between the fitted points or on shapes of other models, drawn before anything
was measured. Attention stands there twice: by the law of a call, and as the step-time formula of a
plan has it, which knows no tiles. Beside them what the tuner measured at the same points in another
run on the same card, and spreads within a run: no prediction can be closer.

End to end: bench/results/engine_*_202611.csv, which bench/engine_gpu.py measured with CUDA graphs
on, beside what a plan made now predicts. Lone prompts and lone decodes follow from the formula; a
burst and a mixed load are served again in virtual time by the same engine and policy. The column
`roofline` is the same prediction by the data sheet alone, on the same chunks. No figure of an
engine is used in any fit.

Writes prediction_error_<device>_202611.csv and .md; asserts nothing.
"""

import argparse
import csv
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from msgspec.structs import replace

from planner import cost, measured, profiles
from planner.assemble import to_plan
from planner.catalog import CATALOG, load_device, load_model, load_workload, topology_for
from planner.price import price
from planner.residuals import Residual, table_residuals
from planner.space import Candidate, cut_layers
from planner.world import make_world
from plans.chunks import WorkTable
from plans.mesh import Parallelism
from plans.plan import MadeBy, Plan
from plans.steptime import StepTime
from runtime.request import Request
from runtime.simulate import Run, simulate

RESULTS = Path(__file__).with_name("results")
ENGINE_FILES = re.compile(r"engine_(h100|h200)[a-z0-9_]*_202611\.csv")
NEW_TOKENS, SHORT, RATE_RPS, LOAD_S, LONG_AT_S = 64, 1000, 4.0, 60.0, 5.0
"""As bench/engine_gpu.py."""
IN_FORMULA, TWICE, SPREAD = "(in a plan's formula)", "(measured twice)", "(spread of rounds)"
Row = dict[str, Any]
GOALS = "wanted: median 5 %, P90 15 %; end to end 10 %, better 5 %"


def share(values: Iterable[float], quantile: float) -> float:
    """A quantile of absolute values."""
    ordered = sorted(abs(each) for each in values)
    return ordered[min(int(quantile * len(ordered)), len(ordered) - 1)]


def percent(value: float) -> str:
    """With sign where it has one."""
    return f"{100 * value:.1f} %"


# --- per op ---------------------------------------------------------------------------------------


def op_of(residual: Residual) -> str:
    """What a row is listed under; products of measured shapes apart from those of others."""
    if residual.table in {"gemm", "links", "rows"}:
        return f"{residual.table} {residual.key[0]}"
    return residual.table


def op_rows(device: str) -> list[Row]:
    """Error of each op of a device's profile."""
    profile = profiles.load_profile(device)
    if profile is None:
        return []
    ready = measured.prepare(profile)
    found: dict[str, list[Residual]] = {}
    for each in table_residuals(profile, ready.fits):
        found.setdefault(op_of(each), []).append(each)
        found.setdefault("all", []).append(each)
    for each in table_residuals(profile, ready.fits, formula=True):
        if each.table.startswith("attention"):
            found.setdefault(f"{each.table} {IN_FORMULA}", []).append(each)
    rows = []
    last = {"all": 2}
    for op, residuals in sorted(
        found.items(), key=lambda pair: (last.get(pair[0], int(IN_FORMULA in pair[0])), pair[0])
    ):
        errors = [each.error for each in residuals]
        worst = max(residuals, key=lambda each: abs(each.error))
        rows.append(
            {
                "what": op,
                "points": len(errors),
                "median": share(errors, 0.5),
                "p90": share(errors, 0.9),
                "bias": statistics.median(errors),
                "worst": worst.error,
                "worst_at": " ".join(map(str, worst.key)),
            }
        )
    return rows


# --- what a measurement is worth ------------------------------------------------------------------


def key_of(op: str, sizes: dict[str, int]) -> tuple[str, profiles.Key] | None:
    """Table and key of a tuned problem; None where a profile has no such table.

    The tuner counts a chunk's own keys, a profile those before it: half a per cent of 131,072.
    """
    if op == "paged_attention":
        heads = (sizes["heads"], sizes["kv_heads"], sizes["head_dim"])
        if "tokens" in sizes:
            return "attention_chunk", (*heads, sizes["tokens"], sizes["keys"])
        return "attention_decode", (*heads, sizes["batch"], sizes["keys"])
    if "n" in sizes:
        return "gemm", (op, sizes["n"], sizes["k"], sizes["tokens"])
    width = sizes.get("width", sizes.get("heads", 0) * sizes.get("head_dim", 0))
    return ("rows", (op, width, sizes["tokens"])) if width and "tokens" in sizes else None


def twice_rows(device: str) -> list[Row]:
    """Points that the tuner measured too: how far its default's time is from the profile's."""
    profile = profiles.load_profile(device)
    if profile is None:
        return []
    known = {
        (table, row.key): row.us for table in profile.tables for row in profile.rows(table, None)
    }
    apart: dict[str, list[float]] = {}
    for path in sorted((CATALOG / "tuned" / device).glob("*.yaml")):
        text = yaml.safe_load(path.read_text(encoding="utf-8"))
        for bucket in text["buckets"]:
            at = key_of(text["op"], bucket["when"])
            if at in known:
                off = bucket["default_us"] / known[at] - 1
                for name in (at[0], "all"):
                    apart.setdefault(name, []).append(off)
    return [
        {
            "what": f"{name} {TWICE}",
            "points": len(off),
            "median": share(off, 0.5),
            "p90": share(off, 0.9),
            "worst": max(off, key=abs),
        }
        for name, off in sorted(apart.items(), key=lambda pair: (pair[0] == "all", pair[0]))
    ]


def spread_rows(device: str) -> list[Row]:
    """Spread of the middle three fifths of a point's own rounds."""
    profile = profiles.load_profile(device)
    if profile is None:
        return []
    found = []
    for table in profile.tables:
        off = [row.spread_us / row.us for row in profile.rows(table, None)]
        found.append(
            {
                "what": f"{table} {SPREAD}",
                "points": len(off),
                "median": share(off, 0.5),
                "p90": share(off, 0.9),
                "worst": max(off),
            }
        )
    return found


# --- end to end -----------------------------------------------------------------------------------


def plans_for(model: str, hardware: str, context: int) -> tuple[Plan, StepTime]:
    """The planner's plan for one GPU, and its step time by the data sheet alone."""
    device = load_device(hardware)
    world = make_world(
        model=load_model(model),
        device=device,
        topology=topology_for(device, 1),
        workload=load_workload("chat"),
        context_tokens=context,
    )
    stages = cut_layers(world.model.layers, 1)
    candidate = Candidate(parallelism=Parallelism(), stages=stages)
    made_by = MadeBy(medha="bench", effort="quick", seed=0, command="bench.prediction_error")
    priced = price(world, candidate)
    plan = to_plan(world, priced, name="one", made_by=made_by)
    return plan, cost.roofline(priced.world, candidate, priced.placement)


def compared(what: str, size: str, seen_s: float, predicted_s: float, roofline_s: float) -> Row:
    """One line of the end-to-end table."""
    return {
        "what": what,
        "tokens": size,
        "measured_ms": 1e3 * seen_s,
        "predicted_ms": 1e3 * predicted_s,
        "error": predicted_s / seen_s - 1,
        "roofline": roofline_s / seen_s - 1,
    }


def engine_rows(path: Path, model: str, hardware: str) -> list[Row]:
    """An engine's results beside the prediction."""
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    alone = [row for row in found if row["part"] == "alone" and row["ttft_s"]]
    if not alone:
        return []
    longest = max(int(row["prompt_tokens"]) for row in alone)
    plan, roofline = plans_for(model, hardware, longest + 2 * NEW_TOKENS)
    times = (plan.step_time, roofline)
    shard = plan.kv.tokens_per_kvp_shard
    works = [WorkTable(plan.prefill.chunks, time, shard) for time in times]
    rows = []
    for row in alone:
        tokens = int(row["prompt_tokens"])
        rows.append(
            compared(
                "TTFT",
                row["prompt_tokens"],
                float(row["ttft_s"]),
                *(work.solo_s(tokens) for work in works),
            )
        )
        rows.append(
            compared(
                "TBT",
                row["prompt_tokens"],
                float(row["tbt_ms"]) / 1e3,
                *(time.step_s(decode_kv_tokens=[tokens]) for time in times),
            )
        )
    plans = [replace(plan, step_time=time) for time in times]
    for row in found:
        if row["part"] == "burst" and row.get("seconds"):
            rows += burst_rows(row, plans)
        if row["part"] == "mixed" and row.get("long_ttft_s"):
            rows += mixed_rows(row, plans, longest)
    return rows


def with_budget(plan: Plan, row: dict[str, str]) -> Plan:
    """The plan with the step budget of a measured run."""
    if not row.get("step_budget_s"):
        return plan
    budget_s = float(row["step_budget_s"])
    idle_s = max(plan.scheduler.idle_budget_s, budget_s)
    how = replace(plan.scheduler, step_budget_s=budget_s, idle_budget_s=idle_s)
    return replace(plan, scheduler=how)


def served(plan: Plan, row: dict[str, str], requests: list[Request]) -> Run:
    """The requests in virtual time."""
    return simulate(with_budget(plan, row), requests, plan.scheduler.policy)


def request(number: int, arrival_s: float, tokens: int) -> Request:
    """As bench/engine_gpu.py asks."""
    return Request(number=number, arrival_s=arrival_s, prompt_tokens=tokens, max_tokens=NEW_TOKENS)


def burst_rows(row: dict[str, str], plans: Sequence[Plan]) -> list[Row]:
    """All at once: how long until the last token, and to the first ones."""
    requests = [request(number, 0.0, SHORT) for number in range(int(row["requests"]))]
    runs = [served(plan, row, requests) for plan in plans]
    label = f"{row['requests']} x {SHORT}, budget {row['step_budget_s'] or 'default'}"
    ends = [max(each.finished_s for each in run.records) for run in runs]
    firsts = [share((each.ttft_s for each in run.records), 0.5) for run in runs]
    return [
        compared("burst, all", label, float(row["seconds"]), *ends),
        compared("burst, TTFT p50", label, float(row["ttft_p50_s"]), *firsts),
    ]


def mixed_rows(row: dict[str, str], plans: Sequence[Plan], longest: int) -> list[Row]:
    """Short prompts by a Poisson process, and a long one."""
    draw = np.random.default_rng(int(row["seed"]))
    arrivals = np.cumsum(draw.exponential(1 / RATE_RPS, int(2 * RATE_RPS * LOAD_S)))
    requests = [
        request(number, float(at_s), SHORT)
        for number, at_s in enumerate(arrivals[arrivals < LOAD_S])
    ]
    requests.append(request(len(requests), LONG_AT_S, longest))
    runs = [served(plan, row, requests) for plan in plans]
    label = f"{len(requests) - 1} x {SHORT} and {longest}, seed {row['seed']}"
    shorts = [
        [each.ttft_s for each in run.records if each.request.prompt_tokens == SHORT] for run in runs
    ]
    longs = [
        next(each.ttft_s for each in run.records if each.request.prompt_tokens == longest)
        for run in runs
    ]
    gaps = [share(run.short_gaps_s, 0.5) for run in runs]
    return [
        compared("mixed, short TTFT p50", label, float(row["short_ttft_p50_s"]),
                 *(share(each, 0.5) for each in shorts)),
        compared("mixed, short TTFT p99", label, float(row["short_ttft_p99_s"]),
                 *(share(each, 0.99) for each in shorts)),
        compared("mixed, TBT p50", label, float(row["tbt_p50_ms"]) / 1e3, *gaps),
        compared("mixed, long TTFT", label, float(row["long_ttft_s"]), *longs),
    ]  # fmt: skip


# --- text -----------------------------------------------------------------------------------------


def table(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    shares = {"bias", "error", "median", "p90", "roofline", "worst"}
    for row in rows:
        cells = []
        for name in columns:
            value = row[name]
            if name in shares:
                cells.append(percent(value))
            else:
                cells.append(f"{value:.4g}" if isinstance(value, float) else str(value))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def report(device: str, model: str, results: Path) -> tuple[list[Row], list[str]]:
    """All rows, and the text of a device."""
    name = load_device(device).name
    profile = profiles.load_profile(name)
    ops, noise = op_rows(name), [*twice_rows(name), *spread_rows(name)]
    engines = []
    for path in sorted(results.glob("engine_*_202611.csv")):
        found = ENGINE_FILES.fullmatch(path.name)
        if found and load_device(found[1]).name == name:
            engines += engine_rows(path, model, name)
    lines = [f"## {name}", "", GOALS, ""]
    if profile:
        about = profile.about
        lines.append(
            f"Profile of an {about.device}, driver {about.driver}, torch {about.torch}, Triton"
            f" {about.triton}, {about.made}."
        )
        lines += ["", *profile.ranges(), ""]
        columns = ["what", "points", "median", "p90", "bias", "worst", "worst_at"]
        lines += table(ops, columns)
        columns = ["what", "points", "median", "p90", "worst"]
        lines += ["", "What a measurement is worth:", "", *table(noise, columns)]
    if engines:
        columns = ["what", "tokens", "measured_ms", "predicted_ms", "error", "roofline"]
        lines += ["", f"{model} on one GPU, our engine:", "", *table(engines, columns), ""]
        for group, rows in (
            ("one request at a time", [row for row in engines if row["what"] in {"TTFT", "TBT"}]),
            ("loads", [row for row in engines if row["what"] not in {"TTFT", "TBT"}]),
        ):
            for source in ("error", "roofline"):
                errors = [row[source] for row in rows]
                if errors:
                    middle, most = percent(share(errors, 0.5)), percent(share(errors, 1))
                    by = "profile" if source == "error" else source
                    lines.append(f"{group}, by {by}: median {middle}, largest {most}.")
    return [{"device": name, **row} for row in (*ops, *noise, *engines)], lines


def main() -> None:
    """Prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="h100,h200")
    parser.add_argument("--model", default="llama3-8b", help="that of the engine's results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where engine_*.csv stand")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    for device in options.device.split(","):
        rows, lines = report(device, options.model, options.results)
        text = "\n".join((f"`python -m bench.prediction_error --device {device}`", "", *lines, ""))
        print(text)
        if not rows:
            continue
        fields = list(dict.fromkeys(key for row in rows for key in row))
        with (options.out / f"prediction_error_{device}_202611.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        (options.out / f"prediction_error_{device}_202611.md").write_text(text)


if __name__ == "__main__":
    main()

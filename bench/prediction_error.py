"""How far predictions are off: per op on rows that no fit saw, and end to end on our own engine.

    python -m bench.prediction_error [--device h200] [--out bench/results]

Per op: every row of role `check` of the device's profile (planner/catalog/profiles), predicted from
the others; they lie between the fitted points or on shapes of other models, drawn before anything
was measured. Attention stands there by the law of a call, and as the step-time formula of a plan
has it, which knows no tiles: with the coefficients of a plan for each of CONTEXTS, on those rows
that a request of such a plan comes to. Beside them what the tuner measured at the same points in
another run on the same card, and spreads within a run: no prediction can be closer.

End to end: bench/results/engine_*_202611.csv, which bench/engine_gpu.py measured with CUDA graphs
on, beside what a plan made now predicts. Lone prompts and lone decodes follow from the formula; a
burst and a mixed load are served again in virtual time, by the same engine and policy, a step ahead
as the live one is, with what its host takes to launch the steps of lone prompts of 1,000 tokens,
and in the column `plan_alone` without (bench/engine_predicted.py). The column `roofline` is the
same prediction by the data sheet alone, on the same chunks. No figure of an engine is used in any
fit; `with_host` and `with_steps` are no predictions, they have the host's and the steps' times of
the run put in, and say what the error is made of. Every step of the loads
(engine_steps_*_202611.csv) stands beside its own prediction.

Writes prediction_error_<device>_202611.csv and .md; asserts nothing.
"""

import argparse
import csv
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from msgspec.structs import replace

from bench.engine_load import NEW_TOKENS
from bench.engine_predicted import load_rows, loads_table, lone_table, step_rows
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

RESULTS = Path(__file__).with_name("results")
ENGINE_FILES = re.compile(r"engine_(h100|h200)[a-z0-9_]*_202611\.csv")
STEP_ERRORS = ("sum", "median", "p90")
STEPS = (
    "Steps of those loads: their share of the device's time, medians, and how far predictions are"
    " off, of their sum, of the median step, and of nine in ten; `ops` has no host in it:"
)
IN_FORMULA, TWICE, SPREAD = "in a plan for", "(measured twice)", "(spread of rounds)"
CONTEXTS = {"8k": 1 << 13, "128k": 1 << 17, "1m": 1 << 20}
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
    for text, context in CONTEXTS.items():
        for each in table_residuals(profile, ready.fits, context=context):
            if each.table.startswith("attention"):
                found.setdefault(f"{each.table} {IN_FORMULA} {text}", []).append(each)
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
                "median": statistics.median(map(abs, errors)),
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
    return [*rows, *load_rows(found, plans, longest)]


def engine_steps(path: Path, model: str, hardware: str) -> list[Row]:
    """Steps of the loads of a result file, where they were kept."""
    steps = path.with_name(path.name.replace("engine_", "engine_steps_", 1))
    ready = measured.prepared(hardware)
    if not steps.exists() or ready is None:
        return []
    with path.open(newline="") as file:
        alone = [row for row in csv.DictReader(file) if row["part"] == "alone"]
    longest = max(int(row["prompt_tokens"]) for row in alone)
    plan, _ = plans_for(model, hardware, longest + 2 * NEW_TOKENS)
    return step_rows(steps, plan, ready)


# --- text -----------------------------------------------------------------------------------------


def table(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    shares = {"bias", "error", "median", "p90", "roofline", "worst"}
    shares |= {"share", *(f"{by}_{of}" for by in ("formula", "ops") for of in STEP_ERRORS)}
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
    engines, steps = [], []
    for path in sorted(results.glob("engine_*_202611.csv")):
        found = ENGINE_FILES.fullmatch(path.name)
        if found and load_device(found[1]).name == name:
            engines += engine_rows(path, model, name)
            steps += engine_steps(path, model, name)
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
        lone = [row for row in engines if row["what"] in {"TTFT", "TBT"}]
        loads = [row for row in engines if row["what"] not in {"TTFT", "TBT"}]
        lines += ["", f"{model} on one GPU, our engine:", "", *lone_table(lone), ""]
        lines += [*loads_table(loads), ""] if loads else []
        for group, rows in (("one request at a time", lone), ("loads", loads)):
            for source in ("error", "roofline"):
                errors = [row[source] for row in rows]
                if errors:
                    middle, most = percent(share(errors, 0.5)), percent(share(errors, 1))
                    by = "profile" if source == "error" else source
                    lines.append(f"{group}, by {by}: median {middle}, largest {most}.")
    if steps:
        columns = ["step", "steps", "share", "device_ms", "submit_ms"]
        columns += [f"{by}_{of}" for by in ("formula", "ops") for of in STEP_ERRORS]
        lines += ["", STEPS, "", *table(steps, columns)]
    return [{"device": name, **row} for row in (*ops, *noise, *engines, *steps)], lines


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

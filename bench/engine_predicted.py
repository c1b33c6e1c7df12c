"""Loads of an engine's results beside their prediction: each figure, and each step.

A figure is predicted by the real engine in virtual time (bench/engine_load.py). Where it is off,
three things can be: what a step takes, what the host adds, and the queue. The prediction knows what
the host takes to launch the steps of lone prompts. The result file has the same load with the
host's times of the run itself put in, and then with its step times too; what error is left there is
the queue's. The steps themselves stand beside two predictions of each: the
formula that plans carry, and the sum of its ops by the profile, which has no host in it. A run is
predicted with the packer that it had; what today's would do stands beside it.
"""

import csv
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bench.engine_load import (
    BURST,
    BY_HOST,
    BY_RUN,
    LOAD_S,
    PACKED,
    POLL_S,
    SHORT,
    Ask,
    burst_load,
    burst_row,
    mixed_load,
    mixed_row,
    packed_as,
    predicted,
    with_budget,
    with_host,
)
from planner.measured import Prepared
from plans.plan import Plan
from plans.steptime import StepLoad, table_s
from runtime.executor.simulated import Host

Row = dict[str, Any]
Text = Mapping[str, str]

FIGURES = {
    "burst": {
        "all of it": "seconds",
        "TTFT p50": "ttft_p50_s",
        "TTFT p99": "ttft_p99_s",
        "TBT p50": "tbt_p50_ms",
        "TBT p99": "tbt_p99_ms",
    },
    "mixed": {
        "short TTFT p50": "short_ttft_p50_s",
        "short TTFT p90": "short_ttft_p90_s",
        "short TTFT p99": "short_ttft_p99_s",
        "TBT p50": "tbt_p50_ms",
        "TBT p99": "tbt_p99_ms",
        "long TTFT": "long_ttft_s",
    },
}
"""Name and column of what is compared."""


def load_rows(found: Sequence[Text], plans: Sequence[Plan], longest: int) -> Iterator[Row]:
    """Figures of every measured load beside those by each plan, the first one's error first.

    found    rows of an engine's result file
    plans    by the profile, and by the data sheet
    longest  prompt of the mixed load where the file does not say
    """
    lone = lone_host(found)
    for row in found:
        part = row["part"]
        if part not in FIGURES or row.get("kind", "measured") not in {"measured", ""}:
            continue
        if not row.get("seconds"):
            continue
        budget_s = float(row.get("step_budget_s") or plans[0].scheduler.step_budget_s)
        policy = row.get("policy") or plans[0].scheduler.policy
        ours, sheet = (
            _again(row, plan, budget_s, policy, longest=longest, lone=lone) for plan in plans
        )
        alone = _again(row, plans[0], budget_s, policy, longest=longest, lone=None)
        now = _again(
            {**row, "chunks_end": PACKED}, plans[0], budget_s, policy, longest=longest, lone=lone
        )
        put_in = {
            kind: next(
                (each for each in found if _same(each, row) and each.get("kind") == kind), None
            )
            for kind in (BY_HOST, BY_RUN)
        }
        for name, column in FIGURES[part].items():
            if not row.get(column):
                continue
            seen = float(row[column])
            scale = 1.0 if column.endswith("_ms") else 1e3
            yield {
                "what": f"{part}, {name}",
                "tokens": _label(row, budget_s, policy, longest),
                "measured_ms": scale * seen,
                "predicted_ms": scale * ours[column],
                "error": ours[column] / seen - 1,
                "plan_alone": alone[column] / seen - 1,
                "roofline": sheet[column] / seen - 1,
                "packed_now_ms": scale * now[column],
            } | {
                name: float(each[column]) / seen - 1
                for name, each in (("with_host", put_in[BY_HOST]), ("with_steps", put_in[BY_RUN]))
                if each is not None
            }


def _same(each: Text, row: Text) -> bool:
    return all(each.get(name) == row.get(name) for name in ("part", "step_budget_s", "seed"))


def lone_host(found: Sequence[Text]) -> Host | None:
    """What the host takes for lone prompts of SHORT tokens; None where that was not measured."""
    for row in found:
        if row["part"] == "alone" and row["prompt_tokens"] == str(SHORT):
            names = ("decide_ms", "submit_chunk_ms", "submit_decode_ms")
            decide_s, chunk_s, decode_s = (float(row[name]) / 1e3 for name in names)
            return Host(decide_s=decide_s, chunk_s=chunk_s, decode_s=decode_s, poll_s=POLL_S)
    return None


def _again(
    row: Text, plan: Plan, budget_s: float, policy: str, *, longest: int, lone: Host | None
) -> Row:
    chosen = with_budget(plan, budget_s)
    maker = None if lone is None else with_host(plan, lone)
    if row["part"] == "burst":
        load, figures = burst_load(int(row.get("requests") or BURST)), burst_row
    else:
        load, figures = mixed_load_of(row, longest), mixed_row
    with packed_as(row.get("chunks_end") or "anywhere"):
        return figures(predicted(chosen, load, policy, maker))


def mixed_load_of(row: Text, longest: int) -> list[Ask]:
    """The mixed load of a result."""
    long_tokens, load_s = int(row.get("long_tokens") or longest), float(row.get("load_s") or LOAD_S)
    load = mixed_load(int(row["seed"]), long_tokens, load_s)
    assert len(load) - 1 == int(row["shorts"]), "the run had other arrivals"
    return load


def _label(row: Text, budget_s: float, policy: str, longest: int) -> str:
    if row["part"] == "burst":
        return f"{row['requests']} x {SHORT}, steps of {budget_s:g} s, {policy}"
    long = row.get("long_tokens") or longest
    return f"{row['shorts']} x {SHORT} and {long}, steps of {budget_s:g} s, {policy}"


# --- tables ---------------------------------------------------------------------------------------


def signed(share: float | None) -> str:
    """Per cent, with its sign."""
    return "" if share is None else f"{100 * share:+.1f} %"


def lone_table(rows: Sequence[Row]) -> Iterator[str]:
    """Errors of lone prompts and lone decodes by length."""
    lengths = list(dict.fromkeys(int(row["tokens"]) for row in rows))
    shown = " | ".join(f"{each:,}" for each in lengths)
    yield f"| one request at a time | {shown} tokens | median, largest | by data sheet |"
    yield "|" + "---|" * (len(lengths) + 3)
    for what in ("TTFT", "TBT"):
        chosen = [row for row in rows if row["what"] == what]
        spreads = []
        for by in ("error", "roofline"):
            sizes = sorted(abs(row[by]) for row in chosen)
            spreads.append(f"{100 * statistics.median(sizes):.1f}, {100 * sizes[-1]:.1f} %")
        errors = " | ".join(signed(row["error"]) for row in chosen)
        yield f"| {what} | {errors} | " + " | ".join(spreads) + " |"


def loads_table(rows: Sequence[Row]) -> Iterator[str]:
    """Figures of the loads: measured, predicted, and how far predictions are off."""
    heads = ["measured", "predicted", "error", "plan alone", "by data sheet"]
    heads += ["host put in", "steps put in too", "as packed today"]
    yield "| load | figure | " + " | ".join(heads) + " |"
    yield "|" + "---|" * (len(heads) + 2)
    before = ""
    for row in rows:
        part, figure = row["what"].split(", ")
        load = f"{part}: {row['tokens']}"
        cells = [_ms(row["measured_ms"]), _ms(row["predicted_ms"])]
        names = ("error", "plan_alone", "roofline", "with_host", "with_steps")
        cells += [signed(row.get(name)) for name in names]
        cells.append(_ms(row["packed_now_ms"]))
        yield f"| {load if load != before else ''} | {figure} | " + " | ".join(cells) + " |"
        before = load


def _ms(value: float) -> str:
    return f"{value / 1e3:.3g} s" if value >= 1000 else f"{value:.3g} ms"


# --- steps ----------------------------------------------------------------------------------------


class Ops:
    """Seconds of a step by its ops, each read from the profile at the step's own sizes."""

    def __init__(self, ready: Prepared, plan: Plan) -> None:
        """For a dense model on one rank."""
        fits, model = ready.fits, plan.model
        assert fits.products is not None, "the profile has no products"
        assert fits.row_wise is not None, "the profile has no row-wise ops"
        assert fits.attention is not None, "the profile has no attention"
        products, row_wise, attention = fits.products, fits.row_wise, fits.attention
        heads = (model.heads, model.kv_heads, model.head_dim)
        wide = model.heads * model.head_dim
        every = [
            ("qkv_rope_write", wide + 2 * model.kv_heads * model.head_dim, model.hidden),
            ("linear", model.hidden, wide),
            ("gate_up_silu", 2 * model.ffn, model.hidden),
            ("linear", model.hidden, model.ffn),
        ]
        self._plan = plan

        @cache
        def rest(tokens: int) -> float:
            seconds = 2 * row_wise.read("add_rms_norm", model.hidden, tokens).seconds
            return seconds + sum(products.read(*each, tokens).seconds for each in every)

        @cache
        def chunk(tokens: int, prefix: int) -> float:
            return attention.chunk_s(heads, tokens, prefix).seconds

        @cache
        def decode(batch: int, keys: int) -> float:
            return attention.decode_s(heads, batch, keys).seconds

        self._rest, self._chunk, self._decode = rest, chunk, decode

    def seconds(self, decodes: int, kv_tokens: int, chunks: Sequence[tuple[int, int]]) -> float:
        """Of the device, for a step of some decodes with so many keys in all, and chunks."""
        time = self._plan.step_time
        tokens = decodes + sum(each for each, _ in chunks)
        layer_s = self._rest(tokens) + sum(self._chunk(*each) for each in chunks)
        if decodes:
            layer_s += self._decode(decodes, max(round(kv_tokens / decodes), 1))
        head_s = table_s(time.head, decodes + len(chunks))
        return self._plan.model.layers * layer_s + head_s + time.overhead_s


def chunks_of(text: str) -> list[tuple[int, int]]:
    """(tokens, prefix) of each chunk of a step, as engine_steps.csv has them."""
    pairs = (each.split("@") for each in text.split())
    return [(int(tokens), int(prefix)) for tokens, prefix in pairs]


def kind_of(row: Text) -> str:
    """What a step is listed under."""
    decodes, chunks = int(row["decodes"]), chunks_of(row["chunks"])
    if not chunks:
        for most in (1, 8, 32, 64, 128):
            if decodes <= most:
                return f"decodes alone, up to {most}"
        return "decodes alone, more than 128"
    tokens, prefix = int(row["chunk_tokens"]), max(prefix for _, prefix in chunks)
    size = next((f"up to {most}" for most in (256, 1024, 4096) if tokens <= most), "over 4096")
    where = "behind none" if not prefix else f"behind {'less' if prefix < 65536 else 'more'}"
    beside = " beside decodes" if decodes else ""
    return f"chunks of {size} tokens {where}{' than 65536' if prefix else ''}{beside}"


def step_rows(path: Path, plan: Plan, ready: Prepared) -> list[Row]:
    """Errors of every kind of step in a file, by the plan's formula and by its ops."""
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    ops = Ops(ready, plan)
    kinds: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in found:
        chunks = chunks_of(row["chunks"])
        decodes, keys = int(row["decodes"]), int(row["decode_kv_tokens"])
        load = StepLoad(plan.step_time)
        load.add_decodes(decodes, keys)
        for tokens, prefix in chunks:
            load.add_chunk(tokens, prefix)
        seen = float(row["device_ms"]) / 1e3
        values = (
            *(seen, load.seconds(), ops.seconds(decodes, keys, chunks)),
            float(row["submit_ms"]) / 1e3,
        )
        for name in (kind_of(row), "all steps"):
            kinds.setdefault(name, []).append(values)
    whole_s = sum(seen for seen, *_ in kinds.get("all steps", []))
    rows = []
    for name, steps in sorted(kinds.items(), key=lambda pair: (pair[0] == "all steps", pair[0])):
        seen_s = [seen for seen, *_ in steps]
        rows.append(
            {
                "step": name,
                "steps": len(steps),
                "share": sum(seen_s) / whole_s,
                "device_ms": 1e3 * statistics.median(seen_s),
                "submit_ms": 1e3 * statistics.median(each[3] for each in steps),
                **_errors("formula", [(seen, each) for seen, each, _, _ in steps]),
                **_errors("ops", [(seen, each) for seen, _, each, _ in steps]),
            }
        )
    return rows


def _errors(name: str, pairs: Sequence[tuple[float, float]]) -> Row:
    """Of the sum of all, the median with its sign, and the 90th percentile without."""
    off = sorted(predicted_s / seen_s - 1 for seen_s, predicted_s in pairs)
    sizes = sorted(abs(each) for each in off)
    seen_s, predicted_s = (sum(each) for each in zip(*pairs, strict=True))
    return {
        f"{name}_sum": predicted_s / seen_s - 1,
        f"{name}_median": statistics.median(off),
        f"{name}_p90": sizes[min(int(0.9 * len(sizes)), len(sizes) - 1)],
    }

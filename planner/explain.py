"""What a search found, as text: tables of strings and lines for the terminal, or one JSON object.

No drawing here: planner/cli_plan.py lays the tables out.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from msgspec import to_builtins

from planner.breakdown import breakdown
from planner.found import Found
from planner.memory import gigabytes
from planner.objective import score
from planner.price import Priced
from planner.space import Rejected, degrees, gpus_text
from planner.text import seconds_text, tokens_text
from plans.plan import Memory, Percentiles, Plan, Replay

BAR_WIDTH = 10
BAR_PARTS = (("w", "weights"), ("a", "activations"), ("r", "reserved"), ("k", "kv"))
LEGEND = (
    "degrees: tp x spp x kvp x replicas; memory: w weights, a activations, r reserved,"
    " k KV pages, . free"
)
SHORT_TOKENS = 8192
REPLAY_COLUMNS = ("in time", "TTFT short p50 p99", "long p50 p99", "TBT p50 p99", "busy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Columns and rows of text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def memory_bar(memory: Memory) -> str:
    """Parts of the worst rank's memory by letter, proportional, each at least one letter."""
    bar = ""
    for letter, part in BAR_PARTS:
        size = getattr(memory, f"{part}_bytes")
        bar += letter * max(round(BAR_WIDTH * size / memory.capacity_bytes), size > 0)
    return bar[:BAR_WIDTH].ljust(BAR_WIDTH, ".")


def arithmetic(plan: Plan) -> str:
    """`16 GPUs = tp 8 x spp 2 x kvp 1 x 1 replica`."""
    idle = f" + {plan.parallelism.idle} idle" if plan.parallelism.idle else ""
    return f"{gpus_text(plan.topology.devices)} = {degrees(plan.parallelism)}{idle}"


def ranking(found: Found, context_tokens: int, top: int) -> Table:
    """The best candidates; the first is the plan."""
    lengths = sorted({min(SHORT_TOKENS, context_tokens), context_tokens})
    at = [tokens_text(length) for length in lengths]
    rows = []
    for rank, (_, each) in enumerate(shapes(found)[:top], start=1):
        p = each.candidate.parallelism
        rows.append(
            (
                str(rank),
                f"{p.tp}x{p.spp}x{p.kvp}x{p.replicas}",
                *(seconds_text(each.solo_s(length)) for length in lengths[:-1]),
                seconds_text(each.ttft_longest_s),
                *(seconds_text(each.tbt_s(length)) for length in lengths),
                f"{each.capacity.rps:.3g}",
                memory_bar(each.footprint.memory),
                each.capacity.bound_by,
            )
        )
    columns = (
        "",
        "degrees",
        *(f"TTFT {tokens}" for tokens in at),
        *(f"TBT {tokens}" for tokens in at),
        "req/s",
        "memory",
        "bound by",
    )
    return Table(columns=columns, rows=tuple(rows))


def shapes(found: Found) -> list[tuple[int, Priced]]:
    """The best candidate of each mesh shape with its rank; others of it are in the CSV."""
    best: dict[object, tuple[int, Priced]] = {}
    for rank, each in enumerate(found.ranked, start=1):
        candidate = each.candidate
        key = (candidate.parallelism, candidate.weight_dtype, candidate.kv_dtype)
        best.setdefault(key, (rank, each))
    return list(best.values())


def replayed(found: Found) -> Table:
    """What the finalists did in virtual time, on the runtime's own loop."""
    rows = []
    for each, point in zip(found.ranked, found.replays, strict=False):
        if point is not None:
            p = each.candidate.parallelism
            rows.append((f"{p.tp}x{p.spp}x{p.kvp}x{p.replicas}", *_replay_row(point)))
    return Table(columns=("replayed", *REPLAY_COLUMNS), rows=tuple(rows))


def replay_of(plan: Plan) -> Table:
    """The same of one plan."""
    point = plan.predicted.replay
    rows = () if point is None else ((plan.name, *_replay_row(point)),)
    return Table(columns=("replayed", *REPLAY_COLUMNS), rows=rows)


def _replay_row(point: Replay) -> tuple[str, ...]:
    def row(table: Percentiles, *names: str) -> str:
        values = [getattr(table, name) for name in names]
        return " ".join("-" if value is None else seconds_text(value) for value in values)

    return (
        f"{point.attainment:.0%}",
        row(point.ttft_s["short"], "p50", "p99"),
        row(point.ttft_s["long"], "p50", "p99"),
        row(point.tbt_s["all"], "p50", "p99"),
        f"{point.utilisation:.0%}",
    )


def replay_line(point: Replay) -> str:
    """How much was replayed, and what came of it."""
    return (
        f"replay: {point.requests} requests in {seconds_text(point.duration_s)} of virtual time at"
        f" {point.arrival_rps:.3g} requests/s ({point.policy}, seed {point.seed}):"
        f" goodput {point.goodput_rps:.3g} requests/s; {point.undecided} undecided at its end;"
        f" {point.in_system_mean:.3g} in a replica = {point.arrivals_per_s:.3g} a s x"
        f" {seconds_text(point.time_in_system_mean_s)}"
    )


def sensitivity_lines(found: Found) -> list[str]:
    """What would change the decision, then what would not."""
    lines = [f"would change: {change.text}" for change in found.sensitivity if change.differs]
    same = [change.label for change in found.sensitivity if not change.differs]
    return [*lines, *([f"would not change: {', '.join(same)}"] if same else [])]


def times(plan: Plan) -> Table:
    """Predicted times by length."""
    rows = tuple(
        (tokens_text(int(tokens)), seconds_text(ttft_s), seconds_text(plan.predicted.tbt_s[tokens]))
        for tokens, ttft_s in plan.predicted.ttft_s.items()
    )
    return Table(columns=("tokens", "TTFT alone", "TBT alone"), rows=rows)


def schedule(plan: Plan) -> Table:
    """The chunk schedule."""
    rows = tuple(
        (tokens_text(row.until_tokens), str(row.chunk_tokens), seconds_text(row.predicted_s))
        for row in plan.prefill.chunks
    )
    return Table(columns=("prefix below", "chunk", "TTFT of that length"), rows=rows)


def memory_line(plan: Plan) -> str:
    """Memory of the worst rank by part, and the KV tokens that a replica holds."""
    memory = plan.memory
    parts = ("weights", "activations", "reserved", "kv", "free")
    text = ", ".join(f"{part} {gigabytes(getattr(memory, f'{part}_bytes'))}" for part in parts)
    tokens = plan.kv.pages_per_rank * plan.kv.page_tokens * plan.parallelism.kvp
    total = gigabytes(memory.capacity_bytes)
    return f"memory of {total} a GPU: {text}; KV for {tokens} tokens a replica"


def evidence_line(plan: Plan) -> str:
    """Where the numbers come from and how far to trust them."""
    predicted = plan.predicted
    terms = Counter(predicted.provenance.values())
    sources = ", ".join(f"{count} by {source}" for source, count in sorted(terms.items()))
    by = "roofline, without a measurement" if plan.step_time.source == "roofline" else "profile"
    return f"times by {by} (terms: {sources}); error band +-{predicted.error_band:.0%}"


def facts(plan: Plan) -> list[str]:
    """Memory, capacity with what binds it, evidence, notes."""
    predicted = plan.predicted
    return [
        memory_line(plan),
        (
            f"capacity {predicted.capacity_rps:.3g} requests/s of {plan.workload.name},"
            f" bound by {predicted.bound_by}"
        ),
        *([replay_line(predicted.replay)] if predicted.replay is not None else []),
        evidence_line(plan),
        *(f"note: {note}" for note in predicted.notes),
    ]


def rejected_line(found: Found) -> str:
    """How many candidates fell to which constraint, and how many only lost."""
    counts = Counter(row.constraint for row in found.ledger)
    broke = ", ".join(f"{count} by {name}" for name, count in counts.most_common())
    outside = Counter(why for why in found.verdicts if why)
    held_back = "".join(f"; {count} ranked last: {why}" for why, count in outside.most_common())
    cut = sum(row.branches for row in found.pruned)
    pruned = f"; {cut} shapes and branches left out by bounds" if cut else ""
    return (
        f"feasible candidates: {len(found.ranked)}{held_back};"
        f" {len(found.ledger)} rejected{': ' if broke else ''}{broke}{pruned}"
    )


def ledger_lines(ledger: tuple[Rejected, ...]) -> list[str]:
    """Rejected candidates by constraint, each with one example."""
    counts = Counter(row.constraint for row in ledger)
    lines = []
    for name, count in counts.most_common():
        example = next(row for row in ledger if row.constraint == name)
        lines.append(f"{count} rejected by {name}, such as {example.label}")
    return lines


def as_json(
    plan: Plan,
    *,
    found: Found | None = None,
    bundle: str | None = None,
    commands: tuple[str, ...] = (),
    top: int = 5,
) -> dict[str, Any]:
    """One object for --format json; seconds, bytes and tokens as in the plan."""
    report: dict[str, Any] = {
        "plan": plan.name,
        "bundle": bundle,
        "arithmetic": arithmetic(plan),
        "gpus": plan.topology.devices,
        "parallelism": to_builtins(plan.parallelism),
        "placement": to_builtins(plan.placement),
        "limits": to_builtins(plan.limits),
        "prefill": to_builtins(plan.prefill),
        "kv": to_builtins(plan.kv),
        "memory": to_builtins(plan.memory),
        "predicted": to_builtins(plan.predicted),
        "commands": list(commands),
    }
    if found:
        report["objective"] = found.objective
        report["alternatives"] = [
            _alternative(rank, each, found.verdicts[rank - 1]) for rank, each in shapes(found)[:top]
        ]
        report["why"] = list(found.why)
        report["sensitivity"] = [to_builtins(change) for change in found.sensitivity]
        report["breakdown"] = [to_builtins(row) for row in breakdown(found.ranked[0])]
        report["feasible"] = len(found.ranked)
        report["pruned"] = sum(row.branches for row in found.pruned)
        report["rejected"] = dict(Counter(row.constraint for row in found.ledger).most_common())
    return report


def _alternative(rank: int, each: Priced, why: str) -> dict[str, Any]:
    return {
        "rank": rank,
        "parallelism": to_builtins(each.candidate.parallelism),
        "ttft_longest_s": each.ttft_longest_s,
        "tbt_full_s": each.tbt_full_s,
        "capacity_rps": each.capacity.rps,
        "bound_by": each.capacity.bound_by,
        "score": score(each.world, each),
        "held_back": why,
        "memory": to_builtins(each.footprint.memory),
        "page_tokens": each.candidate.page_tokens,
        "tokens_per_kvp_shard": each.shard_tokens,
    }

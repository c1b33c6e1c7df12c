"""Tables of the paper's scheduling experiments, in Markdown, from result rows alone."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from bench.paper_capacity import CAPACITY_SHARE, capacities
from bench.paper_ladder import ladder, load_table
from bench.paper_plots import draw
from bench.paper_run import DRAIN_S, IN_FLIGHT
from bench.paper_setup import ENGINES, PEERS, POLICIES
from bench.paper_table import Row

OURS = ("lars-lanes", "lars", "lars-paper")
BASELINES = ("fcfs-whole", "fcfs,chunk=512", "fcfs,chunk=2048", "fcfs")
LOAD_TEXT = """Rows of the mixes as they are, each prompt alone. Above a load of 1 no order of
requests is stable: queues grow as long as the run, so a latency there says how long the run was.
An hour of Poisson arrivals draws more or fewer long prompts: the load of a run is beside its
rate."""
CAPACITY_TEXT = """Highest rate at which {share:.0%} of the offered requests have their first token
in time, mean over common seeds, by bisection on rates 5 % apart. Longs are 5 % of the requests of
the 5 % mix, so this can be reached while they queue: what became of them is beside it."""
Key = tuple[str, int, float]
"""Protocol, mix, window."""


def write_report(rows: Sequence[Row], out: Path, traces: Path | None = None) -> None:
    """Writes the tables to `out` and the plots beside it.

    traces  folder of the mixes, for the table of loads
    """
    parts = [_head(rows, out)]
    if traces is not None:
        parts += ["## Offered work", LOAD_TEXT, load_table(traces)]
    for key in sorted({_key(row) for row in rows}, key=lambda each: (each[0], -each[1], -each[2])):
        group = [row for row in rows if _key(row) == key]
        parts += [_runs(key, group), _ratios(key, group)]
        parts += _ladders(key, group)
        peers = _peers(key, group)
        if peers:
            parts.append(peers)
    parts.append(_capacity(rows))
    plots = draw(rows, out.with_suffix(""))
    parts += [f"![{title}]({path.name})" for title, path in plots]
    out.write_text("\n\n".join(part for part in parts if part) + "\n")


def _key(row: Row) -> Key:
    return (row.case.protocol, row.case.mix, row.case.window_s)


def _head(rows: Sequence[Row], out: Path) -> str:
    def several(field: str) -> str:
        return ", ".join(sorted({getattr(row.origin, field) for row in rows}))

    hashes = ", ".join(sorted({row.origin.plan_hash[:12] for row in rows}))
    return f"""# Scheduling experiments of arXiv 2409.17264, simulated

Every number here is simulated: virtual time by the step times of a roofline, no GPU. Llama-3 8B on
two DGX A100 (16 x 80 GB) at TP8 x SPP2, plan {hashes}; code {several("commit")};
Python {several("python")}, numpy {several("numpy")}; run on {several("date")}; {len(rows)} runs,
seeds from 0 on as many as a table says.
Lengths are the authors' public ones (`medha_mix_*`), arrivals Poisson, times and order by the seed.

Made by `python -m bench.paper run` and `capacity`, then `report CSV --out {out.name}`.
Short is below 65,536 prompt tokens; in time means that the first token came within max(1.5 x lone
prefill, 0.5 s). `fair`: open loop, from the scheduled arrival, until {DRAIN_S:.0f} s after the
window; what has not finished then is late for ever (`never` in a percentile). `harness`: at most
{IN_FLIGHT} in flight, clock from the sending, stop at the end of the window, only completed
requests counted. Load is the predicted lone prefill seconds offered a second."""


def _runs(key: Key, rows: Sequence[Row]) -> str:
    protocol, mix, window_s = key
    lines = [
        f"## {protocol}, {mix} % long, {window_s:g} s of arrivals",
        "",
        _line(
            "requests/s (load)",
            "policy",
            "seeds",
            "short TTFT P50 / P90 / P99, s",
            "long TTFT P50 / P90, s",
            "long end to end, mean s",
            "in time: all / short / long",
            "finished of offered",
            "TPOT P50 / P99, ms",
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for qps in sorted({row.case.qps for row in rows}):
        for policy in _ordered(row.case.policy for row in rows):
            found = _select(rows, qps, policy)
            if not found:
                continue
            lines.append(
                f"| {qps:g} ({_mean(found, 'load'):.2f}) | `{policy}` | {len(found)} |"
                f" {_three(found, 'short_ttft')} | {_many(found, 'long_ttft', ('p50', 'p90'))} |"
                f" {_seconds(_mean(found, 'long_e2e_mean'))} |"
                f" {' / '.join(_share(_mean(found, f'{name}_attained')) for name in _CLASSES)} |"
                f" {_share(_mean(found, 'all_finished') / _mean(found, 'offered'))} |"
                f" {_mean(found, 'all_tpot_p50') * 1e3:.1f} /"
                f" {_mean(found, 'all_tpot_p99') * 1e3:.1f} |"
            )
    return "\n".join(lines)


_CLASSES = ("all", "short", "long")


def _ratios(key: Key, rows: Sequence[Row]) -> str:
    lines = []
    for qps in sorted({row.case.qps for row in rows}):
        for ours in OURS:
            mine = _select(rows, qps, ours)
            for baseline in BASELINES:
                theirs = _select(rows, qps, baseline)
                common = {row.case.seed for row in mine} & {row.case.seed for row in theirs}
                if not common:
                    continue
                cells = [
                    _ratio(
                        _mean([r for r in theirs if r.case.seed in common], f"short_ttft_{figure}"),
                        _mean([r for r in mine if r.case.seed in common], f"short_ttft_{figure}"),
                    )
                    for figure in ("p50", "p90", "p99")
                ]
                lines.append(f"| {qps:g} | `{ours}` | `{baseline}` | {' | '.join(cells)} |")
    if not lines:
        return ""
    head = [
        "Short requests, TTFT of the baseline over ours:",
        "",
        "| requests/s | ours | baseline | P50 | P90 | P99 |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join(head + lines)


def _ladders(key: Key, rows: Sequence[Row]) -> list[str]:
    """One for each rate at which both ends of the ladder ran."""
    parts = []
    for qps in sorted({row.case.qps for row in rows}):
        here = [row for row in rows if row.case.qps == qps]
        seeds = [
            {row.case.seed for row in _select(here, qps, end)} for end in ("fcfs-whole", "lars")
        ]
        common = set.intersection(*seeds)
        if common:
            text = f"What each part contributes at {qps:g} requests/s (in brackets: the line before"
            shown = [row for row in here if row.case.seed in common]
            parts += [f"{text} over this one):", ladder(shown)]
    return parts


def _peers(key: Key, rows: Sequence[Row]) -> str:
    """Against the policies of today's engines: shorts' P99, and how much later longs finish."""
    lines = []
    for qps in sorted({row.case.qps for row in rows}):
        for peer in (*PEERS, *ENGINES):
            for ours in OURS[:2]:
                mine = {row.case.seed: row for row in _select(rows, qps, ours)}
                theirs = {row.case.seed: row for row in _select(rows, qps, peer)}
                seeds = sorted(mine.keys() & theirs.keys())
                if len(seeds) < 2:
                    continue
                p99 = [
                    f"{_seconds(mine[seed]['short_ttft_p99'])} /"
                    f" {_seconds(theirs[seed]['short_ttft_p99'])}"
                    for seed in seeds
                ]
                better = sum(
                    mine[seed]["short_ttft_p99"] < theirs[seed]["short_ttft_p99"] for seed in seeds
                )
                later = [
                    _later(mine[seed]["long_e2e_mean"], theirs[seed]["long_e2e_mean"])
                    for seed in seeds
                ]
                lines.append(
                    f"| {qps:g} | `{ours}` | `{peer}` | {'; '.join(p99)} | {better} of {len(seeds)}"
                    f" | {'; '.join(later)} |"
                )
    if not lines:
        return ""
    head = [
        "Against the policies of other engines, seed by seed (ours / theirs):",
        "",
        _line(
            "requests/s",
            "ours",
            "peer",
            "short TTFT P99, s",
            "ours better",
            "longs finish later by (mean end to end)",
        ),
        "|---|---|---|---|---|---|",
    ]
    return "\n".join(head + lines)


def _capacity(rows: Sequence[Row]) -> str:
    found = capacities(rows)
    if not found:
        return ""
    lines = [
        "## Capacity",
        "",
        CAPACITY_TEXT.format(share=CAPACITY_SHARE),
        "",
        _line(
            "protocol, mix, window",
            "policy",
            "requests/s",
            "load there",
            "in time: short / long",
            "longs finished",
            "over `fcfs-whole`",
        ),
        "|---|---|---|---|---|---|---|",
    ]
    base = {(each.key): each.rps for each in found if each.policy == "fcfs-whole"}
    for each in sorted(found, key=lambda one: (one.key, -one.rps)):
        protocol, mix, window_s = each.key
        least = "" if each.bounded else "at least "
        ratio = f"{least}{each.rps / base[each.key]:.1f} x" if each.key in base else "not run"
        lines.append(
            f"| {protocol}, {mix} %, {window_s:g} s | `{each.policy}` | {least}{each.rps:g} |"
            f" {_mean(each.rows, 'load'):.2f} | {_share(_mean(each.rows, 'short_attained'))} /"
            f" {_share(_mean(each.rows, 'long_attained'))} |"
            f" {_share(_mean(each.rows, 'long_finished') / _mean(each.rows, 'long_requests'))} |"
            f" {ratio} |"
        )
    return "\n".join(lines)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


# --- cells --------------------------------------------------------------------------------------


def _select(rows: Iterable[Row], qps: float, policy: str) -> list[Row]:
    return [row for row in rows if row.case.qps == qps and row.case.policy == policy]


def _ordered(policies: Iterable[str]) -> list[str]:
    known = dict.fromkeys(policies)
    return [each for each in POLICIES if each in known] + [
        each for each in known if each not in POLICIES
    ]


def _mean(rows: Sequence[Row], column: str) -> float:
    return fmean(row[column] for row in rows) if rows else math.nan


def _three(rows: Sequence[Row], quantity: str) -> str:
    return _many(rows, quantity, ("p50", "p90", "p99"))


def _many(rows: Sequence[Row], quantity: str, figures: Sequence[str]) -> str:
    return " / ".join(_seconds(_mean(rows, f"{quantity}_{figure}")) for figure in figures)


def _seconds(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "never" if math.isinf(value) else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def _later(mine: float, theirs: float) -> str:
    if math.isinf(theirs):
        return "neither all" if math.isinf(mine) else "theirs not all"
    return "-" if math.isnan(mine / theirs) else f"{mine / theirs - 1:+.1%}"


def _ratio(theirs: float, mine: float) -> str:
    if math.isinf(theirs) and math.isfinite(mine):
        return "without bound"
    return "-" if not math.isfinite(mine) else f"{theirs / mine:.3g} x"

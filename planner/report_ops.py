"""Memory, ops and percentiles, drawn: bars of what fills a GPU and a step, and what users get."""

from planner.breakdown import OpRow
from planner.explain import Table, shapes
from planner.memory import gigabytes, stage_weights_bytes
from planner.price import Priced
from planner.report_page import Figure, Key
from planner.report_svg import FONT, WIDTH, Drawing, Scale, level_ticks, linear_scale, log_scale
from planner.search import Found
from planner.text import seconds_text
from plans.plan import Memory, Percentiles, Plan

PARTS = (
    ("weights", "f1"),
    ("activations", "f5"),
    ("reserved", "f0"),
    ("kv", "f3"),
)
PART_WORDS = {"kv": "KV pages"}
MOST_STAGES = 8
"""Stages drawn; with more of them the first, the last and those between at even distance."""
OTHERS = 4
"""Further shapes whose memory is drawn."""
Row = tuple[str, dict[str, int]]
"""Name and bytes by part."""


def memory_figure(found: Found, plan: Plan) -> Figure:
    """What fills a GPU of each stage, and the worst GPU of other shapes."""
    planned = [("worst of all", _parts(plan.memory)), *stage_rows(plan)]
    others = [
        (_short(each), _parts(each.footprint.memory)) for _, each in shapes(found)[1 : 1 + OTHERS]
    ]
    capacity = plan.memory.capacity_bytes
    row, left, right = 25.0, 104.0, WIDTH - 14.0
    height = 24 + row * (len(planned) + len(others)) + (22 if others else 0) + 48
    scale = linear_scale([capacity / 1e9], left, right)
    drawing = Drawing(
        name="chart-memory",
        width=WIDTH,
        height=height,
        title="Memory of a GPU by part",
        description="; ".join(
            f"{PART_WORDS.get(part, part)} {gigabytes(size)}"
            for part, size in _parts(plan.memory).items()
        ),
    )
    bottom = height - 44
    level_ticks(drawing, scale, (20, bottom), lambda value: f"{value:g}")
    drawing.text(right, bottom + 34, "GB a GPU", class_="name", text_anchor="end")
    top = 24.0
    with drawing.group(class_="plot", data_x=scale.words):
        for index, (name, sizes) in enumerate([*planned, *others]):
            if index == len(planned):
                drawing.text(2, top + 15, "worst GPU of other shapes", class_="name")
                top += 22
            look = "strong" if not index else ""
            drawing.text(
                left - 8, top + row / 2 + 3, name, class_=f"{look} tick", text_anchor="end"
            )
            _memory_bar(drawing, scale, name, sizes, top)
            top += row
    at = scale.at(capacity / 1e9)
    drawing.line((at, 18), (at, bottom), class_="limit")
    drawing.text(at, 13, f"{capacity / 1e9:.1f} GB", class_="small name", text_anchor="end")
    return Figure(
        name="figure-memory",
        heading="Memory of a GPU",
        lead=(
            f"All GPUs of a stage are alike. {gigabytes(plan.memory.free_bytes)} are left on the"
            f" fullest; pages hold"
            f" {plan.kv.pages_per_rank * plan.kv.page_tokens * plan.parallelism.kvp:,} tokens a"
            " replica."
        ),
        drawings=(drawing.svg(),),
        keys=(
            *(Key(sign="box", look=look, text=PART_WORDS.get(part, part)) for part, look in PARTS),
            Key(sign="line", look="limit", text="capacity"),
        ),
        table=Table(
            columns=("GPU", *(PART_WORDS.get(part, part) for part, _ in PARTS), "left"),
            rows=tuple(
                (
                    name,
                    *(gigabytes(sizes[part]) for part, _ in PARTS),
                    gigabytes(capacity - sum(sizes.values())),
                )
                for name, sizes in [*planned, *others]
            ),
        ),
    )


def _memory_bar(
    drawing: Drawing, scale: Scale, name: str, sizes: dict[str, int], top: float
) -> None:
    filled = 0.0
    for part, look in PARTS:
        ends = scale.at(filled / 1e9), scale.at((filled + sizes[part]) / 1e9)
        filled += sizes[part]
        drawing.rect(
            (ends[0], top + 2, ends[1], top + 20),
            class_=f"{look} thin",
            tip=f"{name}: {PART_WORDS.get(part, part)} {gigabytes(sizes[part])}",
            data_row=name,
            data_part=part,
        )


def _short(each: Priced) -> str:
    p = each.candidate.parallelism
    return f"{p.tp}x{p.spp}x{p.kvp}x{p.replicas}"


def _parts(memory: Memory) -> dict[str, int]:
    return {part: getattr(memory, f"{part}_bytes") for part, _ in PARTS}


def stage_rows(plan: Plan) -> list[Row]:
    """Bytes by part on a GPU of each stage."""
    p, model = plan.parallelism, plan.model
    if p.spp == 1:
        return []
    page = model.rank_page_bytes(p.tp, plan.kv.page_tokens, plan.kv.dtype)
    rows = []
    for stage in shown_stages(p.spp):
        first, end = plan.stages[stage]
        sizes = {
            "weights": stage_weights_bytes(model, plan.stages, stage, p.tp),
            "activations": plan.memory.activations_bytes,
            "reserved": plan.memory.reserved_bytes,
            "kv": plan.kv.pages_per_rank * (end - first) * page,
        }
        rows.append((f"stage {stage}", sizes))
    return rows


def shown_stages(stages: int) -> list[int]:
    """Stages to draw: all, or some at even distance with both ends."""
    if stages <= MOST_STAGES:
        return list(range(stages))
    return [round(index * (stages - 1) / (MOST_STAGES - 1)) for index in range(MOST_STAGES)]


def ops_figure(rows: tuple[OpRow, ...]) -> Figure:
    """Each op of typical steps beside its speed of light."""
    steps = list(dict.fromkeys(row.step for row in rows))
    return Figure(
        name="figure-ops",
        heading="Where the time of a step goes, beside the speed of light",
        lead=(
            "Speed of light: the longest of FLOPs over peak, bytes over bandwidth and bytes over"
            " the link, at 100 % of the data sheet. What is left of a bar is what kernels, latency"
            " and launches cost."
        ),
        drawings=tuple(
            _ops(index, step, [row for row in rows if row.step == step])
            for index, step in enumerate(steps)
        ),
        keys=(
            Key(sign="box", look="f1 veil", text="predicted"),
            Key(sign="box", look="f1", text="speed of light"),
        ),
        table=Table(
            columns=("step", "op", "predicted", "speed of light", "reached", "bound", "share"),
            rows=tuple(
                (
                    row.step,
                    row.op,
                    seconds_text(row.seconds),
                    seconds_text(row.light_s),
                    f"{row.light_s / row.seconds:.0%}",
                    row.bound,
                    f"{row.share:.0%}",
                )
                for row in rows
            ),
        ),
    )


def _ops(index: int, step: str, rows: list[OpRow]) -> str:
    line, left, right = 23.0, 128.0, WIDTH - 102.0
    height = 32 + line * len(rows) + 6
    whole = sum(row.seconds for row in rows)
    scale = Scale(low=0.0, high=max(row.seconds for row in rows), start=left, end=right)
    drawing = Drawing(
        name=f"chart-ops-{index}",
        width=WIDTH,
        height=height,
        title=f"Ops of a {step}",
        description="; ".join(
            f"{row.op} {seconds_text(row.seconds)}, speed of light {seconds_text(row.light_s)}"
            for row in rows
        ),
    )
    drawing.text(2, 15, f"{step}: {seconds_text(whole)}", class_="strong")
    with drawing.group(class_="plot", data_x=scale.words):
        for number, row in enumerate(rows):
            top = 28 + line * number
            drawing.text(left - 8, top + 14, row.op, class_="tick", text_anchor="end")
            tip = (
                f"{row.op}: {seconds_text(row.seconds)}, {row.share:.0%} of the step; speed of"
                f" light {seconds_text(row.light_s)}, bound by {row.bound}"
            )
            at = scale.at(row.seconds)
            drawing.rect((left, top + 3, at, top + 18), class_="f1 veil", tip=tip, data_op=row.op)
            drawing.rect(
                (left, top + 3, scale.at(row.light_s), top + 18),
                class_="f1",
                tip=tip,
                data_light=row.op,
            )
            share = f"{row.share:.0%}" if row.share >= 0.01 else "<1%"
            drawing.text(at + 5, top + 14, f"{_short_s(row.seconds)}, {share}")
    return drawing.svg()


def _short_s(seconds: float) -> str:
    """Time of an op beside its bar: two digits below a millisecond."""
    return seconds_text(seconds) if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def percentiles_figure(plan: Plan) -> Figure | None:
    """What users get in the replay: P50, P90, P99 and the worst."""
    point = plan.predicted.replay
    if point is None:
        return None
    ttft = [(f"{name} prompts", point.ttft_s[name]) for name in ("short", "long")]
    tbt = [(f"{name} prompts", point.tbt_s[name]) for name in ("short", "long")]
    hard = [each.ttft_s for each in plan.targets.classes.values() if each.ttft_s is not None]
    panels = (
        ("chart-ttft-percentiles", "Time to first token", ttft, hard[0] if hard else None),
        ("chart-tbt-percentiles", "Time between tokens", tbt, plan.targets.tbt_s),
    )
    return Figure(
        name="figure-percentiles",
        heading="Percentiles under load, in virtual time",
        lead=(
            f"{point.requests} requests in {seconds_text(point.duration_s)} at"
            f" {point.arrival_rps:.3g} requests/s, policy {point.policy}, seed {point.seed}:"
            f" {point.attainment:.0%} of the decided in time, goodput"
            f" {point.goodput_rps:.3g} requests/s, {point.undecided} undecided at the end, slowest"
            f" stage busy {point.utilisation:.0%} of the time. Long means from"
            f" {plan.scheduler.long_tokens} prompt tokens on."
        ),
        drawings=tuple(_percentiles(*panel) for panel in panels),
        keys=(
            Key(sign="circle", look="f1", text="P50"),
            Key(sign="square", look="f5", text="P90"),
            Key(sign="diamond", look="f4", text="P99"),
            Key(sign="circle", look="hollow s0", text="worst"),
            Key(sign="line", look="limit", text="target"),
        ),
        table=Table(
            columns=("", "P50", "P90", "P99", "worst"),
            rows=tuple(
                (f"{what} of {name}", *(_or_dash(value) for value in _values(row)))
                for what, rows in (("first token", ttft), ("time between tokens", tbt))
                for name, row in rows
            ),
        ),
    )


def _values(row: Percentiles) -> tuple[float | None, ...]:
    return row.p50, row.p90, row.p99, row.max


def _or_dash(value: float | None) -> str:
    return "-" if value is None else seconds_text(value)


def _percentiles(
    name: str, title: str, rows: list[tuple[str, Percentiles]], target: float | None
) -> str:
    marks = (("circle", "f1"), ("square", "f5"), ("diamond", "f4"), ("circle", "hollow s0"))
    left, right, line = 108.0, WIDTH - 18.0, 40.0
    height = 34 + line * len(rows) + 40
    bottom = height - 36
    known = [value for _, row in rows for value in _values(row) if value]
    scale = log_scale([*known, *([target] if target else [])], left, right, 1.3)
    drawing = Drawing(
        name=name,
        width=WIDTH,
        height=height,
        title=f"{title}, percentiles of the replay",
        description="; ".join(
            f"{who}: P50 {_or_dash(row.p50)}, P99 {_or_dash(row.p99)}" for who, row in rows
        ),
    )
    drawing.text(2, 15, title, class_="strong")
    level_ticks(drawing, scale, (28, bottom), seconds_text)
    if target:
        at = scale.at(target)
        drawing.line((at, 24), (at, bottom), class_="limit")
    with drawing.group(class_="plot", data_x=scale.words):
        for index, (who, row) in enumerate(rows):
            middle = 34 + line * (index + 0.5)
            drawing.text(left - 10, middle + FONT * 0.35, who, class_="tick", text_anchor="end")
            seen = [value for value in _values(row) if value is not None]
            if not seen:
                drawing.text(left + 8, middle + FONT * 0.35, "none came to it", class_="tick")
                continue
            drawing.line((scale.at(seen[0]), middle), (scale.at(seen[-1]), middle), class_="wire")
            for label, at_s, (sign, look) in [
                *zip(("P50", "P90", "P99", "worst"), _values(row), marks, strict=True)
            ][::-1]:
                if at_s is not None:
                    drawing.mark(
                        sign,
                        (scale.at(at_s), middle),
                        size=8 if label == "worst" else 4.5,
                        class_=look,
                        tip=f"{who}, {label}: {seconds_text(at_s)}",
                        data_percentile=label,
                        data_who=who,
                    )
    return drawing.svg()

"""Predicted times, drawn: first token over length, step over chunk and prefix, chunk schedule."""

from dataclasses import dataclass

from planner.explain import Table
from planner.report_page import Figure, Key
from planner.report_svg import (
    FONT,
    WIDTH,
    Axis,
    Drawing,
    Scale,
    log_scale,
    plot,
    spread,
)
from planner.report_timeline import Seen
from planner.schedule import sharded_chunk_s
from planner.text import seconds_text, tokens_text
from plans.chunks import WorkTable
from plans.plan import Plan
from plans.steptime import StepLoad, StepTime

LEAST_TOKENS = 128
"""Where the axis of lengths begins."""
POINTS = 4
"""Lengths drawn between a power of two and the next."""


def token_label(tokens: float) -> str:
    """Ticks in tokens; thousands where no power of two fits."""
    return tokens_text(round(tokens))


def lengths_of(context: int, least: int = LEAST_TOKENS) -> list[int]:
    """Lengths from `least` to the context, evenly on a logarithmic axis."""
    found, power = [], float(min(least, context))
    while power < context:
        found.append(round(power))
        power *= 2 ** (1 / POINTS)
    return [*found, context]


def deadline_s(plan: Plan, solo_s: float) -> float:
    """When the first token is due, for a request without a target of its own or of its class."""
    ttft = plan.targets.ttft
    return max(ttft.multiplier * solo_s, ttft.floor_s)


def ttft_figure(plan: Plan, seen: Seen | None) -> Figure:
    """First token over length: alone, with its band; due; and as the replay's requests had it."""
    context = plan.limits.context_tokens
    work = WorkTable(plan.prefill.chunks, plan.step_time, plan.kv.tokens_per_kvp_shard)
    band = plan.predicted.error_band
    loaded = () if seen is None else seen.first_tokens
    least = min([LEAST_TOKENS, context, *(each.tokens for each in loaded)])
    alone = [(tokens, work.solo_s(tokens)) for tokens in lengths_of(context, least)]
    hard = [each.ttft_s for each in plan.targets.classes.values() if each.ttft_s is not None]
    values = [seconds for _, seconds in alone] + [each.ttft_s for each in loaded] + hard
    height = 330
    x = Axis(
        scale=log_scale([least, context], 58, WIDTH - 16, 1.05),
        label="prompt tokens",
        text=token_label,
        binary=True,
        most=7,
    )
    y = Axis(
        scale=log_scale([*values, deadline_s(plan, alone[-1][1])], height - 46.0, 30),
        label="time to first token",
        text=seconds_text,
    )
    drawing = Drawing(
        name="chart-ttft",
        width=WIDTH,
        height=height,
        title="Time to the first token over prompt length",
        description="; ".join(
            f"{tokens_text(int(tokens))}: {seconds_text(seconds)}"
            for tokens, seconds in plan.predicted.ttft_s.items()
        ),
    )
    with plot(drawing, x, y):
        _first_tokens(drawing, x.scale, y.scale, alone, plan)
        for each in loaded:
            drawing.mark(
                "circle",
                (x.scale.at(each.tokens), y.scale.at(each.ttft_s)),
                size=4,
                class_="f3 edge" if each.in_time else "hollow s2",
                tip=(
                    f"{each.tokens} tokens under load: {seconds_text(each.ttft_s)},"
                    f" due at {seconds_text(each.deadline_s)}"
                ),
                data_tokens=each.tokens,
            )
        for tokens, seconds in plan.predicted.ttft_s.items():
            drawing.mark(
                "circle",
                (x.scale.at(int(tokens)), y.scale.at(seconds)),
                size=3,
                class_="f1",
                tip=f"{tokens_text(int(tokens))} tokens alone: {seconds_text(seconds)}",
                data_alone=tokens,
            )
    keys = [
        Key(sign="line", look="line s1", text="alone"),
        Key(sign="box", look="band", text=f"±{band:.0%} band"),
        Key(sign="line", look="limit", text="due"),
    ]
    if loaded:
        keys.append(Key(sign="circle", look="f3 edge", text="replayed under load, in time"))
    if any(not each.in_time for each in loaded):
        keys.append(Key(sign="circle", look="hollow s2", text="replayed, late"))
    ttft = plan.targets.ttft
    return Figure(
        name="figure-ttft",
        heading="First token over context",
        lead=(
            f"Due at {ttft.multiplier:g} x the time alone, at least {seconds_text(ttft.floor_s)}"
            + (f"; hard target {seconds_text(hard[0])} for short classes" if hard else "")
            + ". Dots are the replay's requests, which wait for each other."
        ),
        drawings=(drawing.svg(),),
        keys=tuple(keys),
        table=Table(
            columns=("prompt tokens", "alone", "from", "to", "due"),
            rows=tuple(
                (
                    tokens_text(int(tokens)),
                    seconds_text(seconds),
                    seconds_text(seconds * (1 - band)),
                    seconds_text(seconds * (1 + band)),
                    seconds_text(deadline_s(plan, seconds)),
                )
                for tokens, seconds in plan.predicted.ttft_s.items()
            ),
        ),
    )


def _first_tokens(
    drawing: Drawing, x: Scale, y: Scale, alone: list[tuple[int, float]], plan: Plan
) -> None:
    band = plan.predicted.error_band
    over = [(x.at(tokens), y.at(seconds * (1 + band))) for tokens, seconds in alone]
    under = [
        (x.at(tokens), y.at(max(seconds * (1 - band), y.low))) for tokens, seconds in alone[::-1]
    ]
    way = " ".join(f"{left:.2f},{top:.2f}" for left, top in over + under)
    drawing.add("polygon", points=way, class_="band")
    due = [(x.at(tokens), y.at(deadline_s(plan, seconds))) for tokens, seconds in alone]
    drawing.path(due, class_="limit")
    for each in plan.targets.classes.values():
        if each.ttft_s is not None:
            drawing.line((x.start, y.at(each.ttft_s)), (x.end, y.at(each.ttft_s)), class_="limit")
            break  # one flag sets them all
    drawing.path([(x.at(tokens), y.at(seconds)) for tokens, seconds in alone], class_="line s1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Steps with one chunk behind one prefix."""

    name: str
    look: str
    points: tuple[tuple[int, float], ...]
    """(chunk tokens, seconds)."""


def step_curves(plan: Plan) -> list[Curve]:
    """A line for each of a few prefixes; with KVP also the longest one in a single group."""
    context, shard = plan.limits.context_tokens, plan.kv.tokens_per_kvp_shard
    time = plan.step_time
    ladder = chunk_ladder(plan)
    prefixes = [0, *(context // part for part in (64, 16, 4)), context]
    looks = ("s0", "s3", "s5", "s4", "s1")
    curves = []
    for prefix, look in zip(prefixes, looks, strict=True):
        points = tuple(
            (chunk, chunk_step_s(time, chunk, prefix, context, shard)) for chunk in ladder
        )
        name = f"behind {tokens_text(prefix)}" if prefix else "new prompt"
        curves.append(Curve(name=name, look=f"line {look}", points=points))
    if plan.parallelism.kvp > 1:
        points = tuple((chunk, _one_group_s(time, chunk, context)) for chunk in ladder)
        curves.append(
            Curve(
                name=f"{tokens_text(context)}, one group",
                look="line dash s2",
                points=points,
            )
        )
    return curves


def chunk_ladder(plan: Plan) -> list[int]:
    """Chunks from the least to the largest step, doubling."""
    least, most = plan.scheduler.min_chunk_tokens, plan.scheduler.max_step_tokens
    found = []
    while least < most:
        found.append(least)
        least *= 2
    return [*found, most]


def chunk_step_s(time: StepTime, chunk: int, prefix: int, context: int, shard: int) -> float:
    """Step of a chunk behind a prefix, cut where the context ends, on its slowest group."""
    prefix = min(prefix, max(context - chunk, 0))
    return max(
        sharded_chunk_s(
            time, stage=None, tokens=chunk, prefix=prefix, shard_tokens=shard, behind=behind
        )
        for behind in range(min(2, prefix // shard + 1))
    )


def _one_group_s(time: StepTime, chunk: int, context: int) -> float:
    load = StepLoad(time)
    load.add_chunk(chunk, max(context - chunk, 0))
    return load.seconds()


def step_figure(plan: Plan) -> Figure:
    """Step time over the chunk, a line a prefix, and the budgets: where KVP is forced."""
    curves = step_curves(plan)
    margin = plan.step_time.margin
    budgets = _budgets(plan)
    times = [seconds for curve in curves for _, seconds in curve.points]
    height = 330
    ladder = chunk_ladder(plan)
    x = Axis(
        scale=log_scale([ladder[0], ladder[-1]], 58, WIDTH - 92, 1.02),
        label="chunk tokens",
        text=token_label,
        binary=True,
        most=9,
    )
    y = Axis(
        scale=log_scale([*times, *(seconds for _, seconds in budgets)], height - 46.0, 30),
        label="step time",
        text=seconds_text,
    )
    drawing = Drawing(
        name="chart-step",
        width=WIDTH,
        height=height,
        title="Step time over chunk size and prefix",
        description="; ".join(
            f"{curve.name}: {seconds_text(curve.points[0][1])} to"
            f" {seconds_text(curve.points[-1][1])}"
            for curve in curves
        ),
    )
    with plot(drawing, x, y):
        for name, seconds in budgets:
            at = y.scale.at(seconds)
            drawing.line((x.scale.start, at), (x.scale.end, at), class_="limit", data_budget=name)
        ends = [y.scale.at(curve.points[-1][1]) for curve in curves]
        places = spread(ends, FONT + 3, 34, height - 50)
        for curve, at in zip(curves, places, strict=True):
            drawing.text(x.scale.end + 6, at + FONT * 0.35, curve.name, class_="small")
        for curve in curves:
            drawing.path(
                [(x.scale.at(chunk), y.scale.at(seconds)) for chunk, seconds in curve.points],
                class_=curve.look,
                tip=curve.name,
                data_curve=curve.name,
            )
        for row in plan.prefill.chunks:
            seconds = chunk_step_s(
                plan.step_time,
                row.chunk_tokens,
                row.until_tokens,
                row.until_tokens,
                plan.kv.tokens_per_kvp_shard,
            )
            drawing.mark(
                "diamond",
                (x.scale.at(row.chunk_tokens), y.scale.at(seconds)),
                size=4,
                class_="light",
                tip=(
                    f"schedule: {row.chunk_tokens} tokens up to {tokens_text(row.until_tokens)},"
                    f" {seconds_text(seconds)}"
                ),
                data_until=row.until_tokens,
            )
        for name, seconds in budgets:  # on top of the lines
            top = y.scale.at(seconds) - 5
            place = {"class_": "small halo strong", "text_anchor": "end"}
            drawing.text(x.scale.end, top, name, **place)
    return Figure(
        name="figure-step",
        heading="Step time over chunk and prefix",
        lead=(
            f"{_forced(plan, curves)} Dotted: the budgets of a step beside decodes and alone, less"
            f" the packer's margin of {margin:.0%}."
        ),
        drawings=(drawing.svg(),),
        keys=(
            *(Key(sign="line", look=curve.look, text=curve.name) for curve in curves),
            Key(sign="diamond", look="light", text="the schedule, at the end of each row"),
        ),
        table=Table(
            columns=("chunk tokens", *(curve.name for curve in curves)),
            rows=tuple(
                (str(chunk), *(seconds_text(curve.points[row][1]) for curve in curves))
                for row, chunk in enumerate(ladder)
            ),
        ),
    )


def _budgets(plan: Plan) -> list[tuple[str, float]]:
    """Budgets of a step as its prediction has to keep them."""
    margin = 1 + plan.step_time.margin
    step_s, idle_s = plan.scheduler.step_budget_s, plan.scheduler.idle_budget_s
    return [
        (f"beside decodes {seconds_text(step_s)}", step_s / margin),
        (f"alone {seconds_text(idle_s)}", idle_s / margin),
    ]


def _forced(plan: Plan, curves: list[Curve]) -> str:
    """Whether the smallest chunk at full context fits the budgets, with and without KVP."""
    context = tokens_text(plan.limits.context_tokens)
    least = plan.scheduler.min_chunk_tokens
    limit_s = _budgets(plan)[0][1]
    sharded = next(curve for curve in curves if curve.name == f"behind {context}")
    own_s = sharded.points[0][1]
    verdict = "fits" if own_s <= limit_s else "exceeds"
    text = (
        f"Behind {context} a chunk of {least} takes {seconds_text(own_s)} and {verdict} the budget"
        " beside decodes."
    )
    if plan.parallelism.kvp > 1:
        one_s = curves[-1].points[0][1]
        forced = "above it: here KVP is forced" if one_s > limit_s >= own_s else "KVP shortens it"
        text += f" In a single group it would take {seconds_text(one_s)}, {forced}."
    return text


def schedule_figure(plan: Plan) -> Figure:
    """The chunk at each prefix."""
    rows = plan.prefill.chunks
    context = plan.limits.context_tokens
    first = max(min(1024, rows[0].until_tokens // 2), 1)
    height = 330
    x = Axis(
        scale=log_scale([first, context], 52, WIDTH - 16, 1.0001),
        label="prefix tokens",
        text=token_label,
        binary=True,
        most=7,
    )
    sizes = [row.chunk_tokens for row in rows]
    y = Axis(
        scale=log_scale(sizes, height - 46.0, 30, 1.6),
        label="chunk tokens",
        text=token_label,
        binary=True,
    )
    drawing = Drawing(
        name="chart-schedule",
        width=WIDTH,
        height=height,
        title="Chunk of a lone prompt over its prefix",
        description="; ".join(
            f"below {tokens_text(row.until_tokens)}: {row.chunk_tokens}" for row in rows
        ),
    )
    with plot(drawing, x, y):
        way = []
        begin = float(first)
        for row in rows:
            at = y.scale.at(row.chunk_tokens)
            way += [(x.scale.at(begin), at), (x.scale.at(row.until_tokens), at)]
            begin = row.until_tokens
        base = height - 46.0
        area = [(way[0][0], base), *way, (way[-1][0], base)]
        drawing.add("polygon", points=" ".join(f"{a:.2f},{b:.2f}" for a, b in area), class_="band")
        drawing.path(way, class_="line s1")
        begin = float(first)
        free = -100.0
        for row in rows:
            left, right = x.scale.at(begin), x.scale.at(row.until_tokens)
            top = y.scale.at(row.chunk_tokens)
            text = str(row.chunk_tokens)
            middle = (left + right) / 2
            half = FONT * 0.3 * len(text)
            drawing.rect(
                (left, 30, right, base),
                fill="transparent",
                tip=(
                    f"chunks of {row.chunk_tokens} below {tokens_text(row.until_tokens)};"
                    f" a prompt of that length starts in {seconds_text(row.predicted_s)}"
                ),
                data_chunk=row.chunk_tokens,
                data_until=row.until_tokens,
            )
            if middle - half > free:
                drawing.text(middle, top - 7, text, class_="strong halo", text_anchor="middle")
                free = middle + half + 2
            begin = row.until_tokens
    return Figure(
        name="figure-schedule",
        heading="Chunk schedule",
        lead=(
            "The largest chunk that a lone prompt takes at each prefix; attention grows with the"
            " prefix, so chunks shrink to keep steps even."
        ),
        drawings=(drawing.svg(),),
        table=Table(
            columns=("prefix below", "chunk tokens", "first token of such a prompt"),
            rows=tuple(
                (
                    tokens_text(row.until_tokens),
                    str(row.chunk_tokens),
                    seconds_text(row.predicted_s),
                )
                for row in rows
            ),
        ),
    )

"""What the search saw, drawn: every shape by rate and latency, the table, what lost and why."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from planner.explain import Table, shapes
from planner.objective import level, score, ttft_limit_s
from planner.price import Priced
from planner.report_page import Figure, Key
from planner.report_svg import (
    FONT,
    WIDTH,
    Axis,
    Drawing,
    Labels,
    Point,
    Scale,
    linear_scale,
    log_scale,
    plain,
    plot,
    text_width,
)
from planner.search import Found
from planner.text import seconds_text, tokens_text
from plans.workload import mean_length

MOST_MARKS = 600
"""Shapes drawn, best first."""
MOST_ROWS = 40
"""Rows of what lost, of each kind; alternatives.csv has all."""
NAMED = 5
"""Shapes that carry their degrees in the chart."""
LOOKS = {
    "in the running": ("circle", "f1 edge"),
    "too slow between tokens": ("square", "hollow s2"),
    "longest prompt too late": ("triangle", "hollow s4"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The best candidate of one mesh shape."""

    rank: int
    priced: Priced
    verdict: str

    @property
    def short(self) -> str:
        """Degrees as tp x spp x kvp x replicas."""
        p = self.priced.candidate.parallelism
        return f"{p.tp}x{p.spp}x{p.kvp}x{p.replicas}"

    @property
    def standing(self) -> str:
        """A name of LOOKS."""
        if not self.verdict:
            return "in the running"
        late = self.verdict.startswith("longest prompt")
        return "longest prompt too late" if late else "too slow between tokens"


def all_shapes(found: Found) -> list[Shape]:
    """Every mesh shape that fits, best first."""
    return [
        Shape(rank=rank, priced=each, verdict=found.verdicts[rank - 1])
        for rank, each in shapes(found)
    ]


def rate_of(each: Priced) -> float:
    """Requests a second as the objective counts them; by formula where it counts no requests."""
    world = each.world
    return each.capacity.rps if world.objective == "latency" else score(world, each)


def tokens_per_gpu(each: Priced) -> float:
    """Output tokens a second and GPU at capacity, idle GPUs counted."""
    classes = each.world.workload.classes
    whole = sum(one.share for one in classes)
    mean = sum(one.share * mean_length(one.output_tokens) for one in classes) / whole
    return each.capacity.rps * mean / each.world.gpus


def tokens_per_user(each: Priced) -> float:
    """Tokens a second of one user whose request is at the context limit."""
    return 1 / each.tbt_full_s


def rate_figure(found: Found) -> Figure:
    """Requests a second against the time to the first token of the longest prompt."""
    seen = all_shapes(found)
    best = found.ranked[0]
    context = tokens_text(best.world.limits.context_tokens)
    limit_s = _limit_s(found)
    drawn = _Cloud(
        seen,
        across=lambda each: each.ttft_longest_s,
        up=rate_of,
        name="chart-rate",
        title="Requests a second against time to the first token, all shapes",
    )
    lead = (
        f"Each mark is the best candidate of one shape; up and to the left is better. The longest"
        f" prompt is {context} tokens, alone."
    )
    drawing = drawn.draw(
        Axis(
            scale=log_scale(
                [each.priced.ttft_longest_s for each in drawn.seen], 52, WIDTH - 10, 1.3
            ),
            label=f"first token of {context} tokens",
            text=seconds_text,
        ),
        "requests/s",
        limit=(limit_s, f"limit {seconds_text(limit_s)}") if limit_s < float("inf") else None,
    )
    return Figure(
        name="figure-rate",
        heading="Rate against first token, every shape that fits",
        lead=lead,
        drawings=(drawing.svg(),),
        keys=drawn.keys,
        table=_cloud_table(drawn, f"TTFT {context}", "requests/s", seconds_text),
    )


def user_figure(found: Found) -> Figure:
    """Tokens a second and GPU against tokens a second of one user."""
    best = found.ranked[0]
    context = tokens_text(best.world.limits.context_tokens)
    drawn = _Cloud(
        all_shapes(found),
        across=tokens_per_user,
        up=tokens_per_gpu,
        name="chart-user",
        title="Tokens a second and GPU against tokens a second and user, all shapes",
        more_across=True,
    )
    drawing = drawn.draw(
        Axis(
            scale=linear_scale(
                [tokens_per_user(each.priced) for each in drawn.seen], 52, WIDTH - 10
            ),
            label=f"tokens/s of a user at {context}",
            text=plain,
        ),
        "output tokens/s/GPU",
        limit=(1 / best.world.targets.tbt_s, "target"),
    )
    return Figure(
        name="figure-user",
        heading="Throughput of a GPU against speed for a user",
        lead=(
            f"Up and to the right is better. A user's speed is that of a request at {context}, with"
            f" a small chunk of another request in each step; the target between tokens is"
            f" {seconds_text(best.world.targets.tbt_s)}."
        ),
        drawings=(drawing.svg(),),
        keys=drawn.keys,
        table=_cloud_table(
            drawn, f"tokens/s/user at {context}", "tokens/s/GPU", lambda value: f"{value:.3g}"
        ),
    )


def _limit_s(found: Found) -> float:
    """Rule 3 of the objective: where the longest prompt must start to be in the running."""
    world = found.ranked[0].world
    levels = [level(world, each) for each in found.ranked]
    best = max(levels)
    times = [
        each.ttft_longest_s
        for each, reached in zip(found.ranked, levels, strict=True)
        if reached == best
    ]
    return ttft_limit_s(world, min(times))


class _Cloud:
    """Marks of all shapes over two merits, the frontier, the best ones named."""

    def __init__(
        self,
        seen: list[Shape],
        *,
        across: Callable[[Priced], float],
        up: Callable[[Priced], float],
        name: str,
        title: str,
        more_across: bool = False,
    ) -> None:
        """more_across: larger is better to the right."""
        self.seen = seen[:MOST_MARKS]
        self.left_out = len(seen) - len(self.seen)
        self.across = across
        self.up = up
        self._name = name
        self._title = title
        self._sign = -1 if more_across else 1

    @property
    def keys(self) -> tuple[Key, ...]:
        """The standings that occur."""
        there = {each.standing for each in self.seen[1:]}
        return (
            Key(sign="diamond", look="f3 rim", text="chosen"),
            *(
                Key(sign=sign, look=look, text=name)
                for name, (sign, look) in LOOKS.items()
                if name in there
            ),
            *([Key(sign="line", look="frontier", text="frontier")] if there else []),
        )

    def frontier(self) -> list[Shape]:
        """Shapes that none exceeds in both merits, in the order of the level axis."""
        found: list[Shape] = []
        for each in sorted(
            self.seen, key=lambda one: (self._sign * self.across(one.priced), -self.up(one.priced))
        ):
            if not found or self.up(each.priced) > self.up(found[-1].priced):
                found.append(each)
        return found

    def draw(self, x: Axis, up: str, *, limit: tuple[float, str] | None) -> Drawing:
        """The chart; a limit is a place on the level axis and its name."""
        height = 330
        y = Axis(
            scale=linear_scale([self.up(each.priced) for each in self.seen], height - 46.0, 30),
            label=up,
            text=plain,
        )
        best = self.seen[0]
        drawing = Drawing(
            name=self._name,
            width=WIDTH,
            height=height,
            title=self._title,
            description=(
                f"{len(self.seen)} shapes; the chosen one is {best.short} at"
                f" {x.text(self.across(best.priced))} and {y.text(self.up(best.priced))} {up}."
            ),
        )
        labels = Labels(inside=(54, 32, WIDTH, height - 48))
        with plot(drawing, x, y):
            if limit is not None and x.scale.low < limit[0] < x.scale.high:
                at = x.scale.at(limit[0])
                drawing.line((at, 30), (at, height - 46), class_="limit")
                labels.block((at - 2, 30, at + 2, height - 46))
                self._limit_label(drawing, labels, at, limit[1])
            self._lines(drawing, x.scale, y.scale)
            self._marks(drawing, x, y, labels)
        return drawing

    def _limit_label(self, drawing: Drawing, labels: Labels, at: float, text: str) -> None:
        width = text_width(text)
        right = at + 8 + width < WIDTH
        anchor = "start" if right else "end"
        beside = at + 5 if right else at - 5
        drawing.text(beside, 30 + FONT, text, class_="small name halo", text_anchor=anchor)
        left = beside if right else beside - width
        labels.block((left, 30, left + width, 32 + FONT))

    def _lines(self, drawing: Drawing, x: Scale, y: Scale) -> None:
        way: list[Point] = []
        for each in self.frontier():
            at = (x.at(self.across(each.priced)), y.at(self.up(each.priced)))
            if way:
                way.append((at[0], way[-1][1]))
            way.append(at)
        drawing.path(way, class_="frontier")

    def _marks(self, drawing: Drawing, x: Axis, y: Axis, labels: Labels) -> None:
        spots = {}
        for each in reversed(self.seen):  # the best on top
            at = (x.scale.at(self.across(each.priced)), y.scale.at(self.up(each.priced)))
            sign, look = LOOKS[each.standing]
            size = 4.5
            if each is self.seen[0]:
                sign, look, size = "diamond", "f3 rim", 6.5
            spots[each.rank] = at
            verdict = f"; {each.verdict}" if each.verdict else ""
            tip = (
                f"{each.rank}. {each.priced.candidate.label}: {x.text(self.across(each.priced))},"
                f" {y.text(self.up(each.priced))} {y.label}{verdict}"
            )
            drawing.mark(sign, at, size=size, tip=tip, class_=look, data_rank=each.rank)
        for at in spots.values():
            labels.block((at[0] - 5, at[1] - 5, at[0] + 5, at[1] + 5))
        for each in self.seen[:NAMED]:
            place = labels.place(spots[each.rank], each.short, gap=9)
            if place is not None:
                left, base, anchor = place
                look = "halo strong" if each is self.seen[0] else "halo"
                drawing.text(left, base, each.short, class_=look, text_anchor=anchor)


def _cloud_table(cloud: _Cloud, across: str, up: str, text: Callable[[float], str]) -> Table:
    return Table(
        columns=("rank", "tpxsppxkvpxreplicas", across, up, "standing"),
        rows=tuple(
            (
                str(each.rank),
                each.short,
                text(cloud.across(each.priced)),
                f"{cloud.up(each.priced):.4g}",
                "chosen" if each is cloud.seen[0] else each.verdict or each.standing,
            )
            for each in cloud.seen[:MOST_ROWS]
        ),
    )


def ranked_table(found: Found, most: int = 12) -> Table:
    """The best shapes with what decided."""
    best = found.ranked[0]
    context = best.world.limits.context_tokens
    lengths = sorted({min(8192, context), context})
    at = [tokens_text(length) for length in lengths]
    columns = (
        "rank",
        "candidate",
        *(f"TTFT {each}" for each in at),
        *(f"TBT {each}" for each in at),
        "requests/s",
        "score",
        "KV pages",
        "bound by",
        "why not first",
    )
    rows = []
    for each in all_shapes(found)[:most]:
        one = each.priced
        rows.append(
            (
                str(each.rank),
                one.candidate.label,
                *(seconds_text(one.solo_s(length)) for length in lengths[:-1]),
                seconds_text(one.ttft_longest_s),
                *(seconds_text(one.tbt_s(length)) for length in lengths),
                f"{one.capacity.rps:.3g}",
                f"{score(one.world, one):.3g}",
                f"{one.footprint.memory.kv_bytes / 1e9:.1f} GB",
                one.capacity.bound_by,
                each.verdict or ("" if each.rank == 1 else "behind in rank"),
            )
        )
    return Table(columns=columns, rows=tuple(rows))


def rejected_table(found: Found) -> Table:
    """What cannot be: some of each constraint, with both sides of the broken inequality."""
    counts = Counter(row.constraint for row in found.ledger)
    share = max(MOST_ROWS // max(len(counts), 1), 4)
    taken: Counter[str] = Counter()
    rows = []
    for row in found.ledger:
        taken[row.constraint] += 1
        if taken[row.constraint] <= share:
            rows.append((row.label, row.constraint, row.need, row.have, row.nearest))
    return Table(columns=("candidate", "constraint", "need", "have", "nearest"), rows=tuple(rows))


def pruned_table(found: Found) -> Table:
    """What was not priced, and the inequality that proves that it could not have won."""
    rows = tuple(
        (row.label, str(row.branches), row.reason, row.bound, row.best)
        for row in found.pruned[:MOST_ROWS]
    )
    columns = ("shapes", "how many", "left out by", "could reach", "had to beat")
    return Table(columns=columns, rows=rows)


def sensitivity_figure(found: Found) -> Figure | None:
    """What the score would become, one thing different, and whether the shape would change."""
    changes = [each for each in found.sensitivity if each.degrees]
    if not changes:
        return None
    base = score(found.ranked[0].world, found.ranked[0])
    ratios = [each.score / base for each in changes]
    row, left, right = 34.0, 10.0, WIDTH - 20.0
    height = 26 + row * len(changes) + 30
    scale = log_scale([*ratios, 1.0], left, right, 1.15)
    drawing = Drawing(
        name="chart-sensitivity",
        width=WIDTH,
        height=height,
        title="Score with one thing different, as a multiple of the plan's",
        description="; ".join(
            f"{each.label}: {ratio:.2f} times" for each, ratio in zip(changes, ratios, strict=True)
        ),
    )
    middle, bottom = scale.at(1.0), height - 30
    drawing.line((middle, 14), (middle, bottom), class_="axis")
    for index, (each, ratio) in enumerate(zip(changes, ratios, strict=True)):
        top = 18 + row * index
        look = "f2" if each.differs else "f1"
        becomes = f"becomes {each.degrees}" if each.differs else "same shape"
        text = f"{each.label}: {ratio:.2f}x, {becomes}"
        drawing.text(left, top + 11, text, class_="halo strong" if each.differs else "halo")
        ends = sorted((middle, scale.at(ratio)))
        drawing.rect(
            (ends[0], top + 16, max(ends[1], ends[0] + 2), top + 26),
            class_=look,
            tip=each.text,
            data_ratio=f"{ratio!r}",
        )
    drawing.text(middle, bottom + 18, "the plan (1x)", class_="tick", text_anchor="middle")
    return Figure(
        name="figure-sensitivity",
        heading="What would change the decision",
        lead=(
            "The score with one thing different, beside the plan's; by formula, without replay."
            " A bar to the right is more."
        ),
        drawings=(drawing.svg(),),
        keys=(
            Key(sign="box", look="f1", text="same shape stays best"),
            Key(sign="box", look="f2", text="another shape becomes best"),
        ),
        table=Table(
            columns=("one thing different", "score", "times the plan's", "best shape", "changes"),
            rows=tuple(
                (
                    each.label,
                    f"{each.score:.4g}",
                    f"{each.score / base:.3f}" if each.degrees else "",
                    each.degrees or "no plan",
                    "yes" if each.differs else "no",
                )
                for each in found.sensitivity
            ),
        ),
    )

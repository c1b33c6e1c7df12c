"""Steps over time, drawn: one long prompt through the stages, and the plan's mix as replayed.

The mix is run once more, with an observer that keeps its steps: the same requests, rate and seed as
the replay in the plan, so its first tokens are those behind the plan's percentiles.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from planner.explain import Table
from planner.replay import offered
from planner.report_page import Figure, Key
from planner.report_svg import FONT, Drawing, Scale, level_ticks
from planner.text import seconds_text, tokens_text
from plans.chunks import add_sharded_chunk, split_prompt
from plans.plan import Plan
from plans.steptime import StepLoad
from runtime.clock import VirtualClock
from runtime.simulate import engine_of
from runtime.timeline import Recorder, StepSlice

MOST_STEPS = 6000
"""Of the mix: what a quick plan replays."""
WINDOW = 40
"""Steps of the mix that are drawn."""
CHUNKS = 16
"""Chunks at the beginning and at the end of the long prompt that are drawn."""
MOST_SLICES = 1600
"""Of one drawing, where there are many stages."""
DECODES = 3
WIDE = 900
LEFT = 78.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstToken:
    """A request's first token under load."""

    tokens: int
    ttft_s: float
    deadline_s: float

    @property
    def in_time(self) -> bool:
        """Whether the first token came by its deadline."""
        return self.ttft_s <= self.deadline_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What happened in the replay."""

    first_tokens: tuple[FirstToken, ...]
    """In the order in which the requests ended."""
    steps: tuple[StepSlice, ...]
    long_requests: frozenset[int]
    """Numbers of those whose prompt is long."""


def watch(plan: Plan) -> Seen | None:
    """The plan's replay once more; None where there was none."""
    point = plan.predicted.replay
    if point is None:
        return None
    requests = offered(
        plan.workload,
        count=point.requests,
        rate_rps=point.arrival_rps / plan.parallelism.replicas,
        seed=point.seed,
        context_tokens=plan.limits.context_tokens,
    )
    clock = VirtualClock()
    recorder = Recorder(stages=plan.parallelism.spp)
    engine = engine_of(plan, plan.scheduler.policy, clock, observer=recorder)
    for request in requests:
        engine.add(request)
    most = min(point.steps, MOST_STEPS)
    while len(recorder.steps) < most and engine.tick():
        pass
    engine.close()
    return Seen(
        first_tokens=tuple(
            FirstToken(
                tokens=record.request.prompt_tokens,
                ttft_s=record.ttft_s,
                deadline_s=record.deadline_s,
            )
            for record in recorder.records
            if 0 < record.ttft_s < float("inf")
        ),
        steps=tuple(recorder.steps),
        long_requests=frozenset(
            request.number
            for request in requests
            if request.prompt_tokens >= plan.scheduler.long_tokens
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """One step on one stage."""

    stage: int
    start_s: float
    end_s: float
    kind: str
    """A name of KINDS."""
    tip: str
    number: int = 0
    """Of the step."""


KINDS = {
    "long": ("f1", "chunk of a long prompt"),
    "short": ("f5", "chunks of short prompts"),
    "both": ("f4", "chunks of both"),
    "decode": ("f3", "decodes only"),
}


def lone_prompt(plan: Plan, tokens: int) -> list[Slice]:
    """Every chunk of a lone prompt on every stage, then a few tokens: the stage recursion.

    The same as plans/chunks.py WorkTable: no more chunks are in flight than there are stages.
    """
    time, shard = plan.step_time, plan.kv.tokens_per_kvp_shard
    stages = time.stages
    free = [0.0] * stages
    ends: list[float] = []
    slices = []

    def run(load: StepLoad, kind: str, tip: str, earliest: float) -> None:
        at = earliest
        for stage, seconds in enumerate(load.stages_s()):
            start = max(at, free[stage])
            at = start + seconds
            free[stage] = at
            text = f"{tip}, stage {stage}: {seconds_text(seconds)} from {start:.4f} s"
            slices.append(
                Slice(stage=stage, start_s=start, end_s=at, kind=kind, tip=text, number=len(ends))
            )
        ends.append(at)

    for chunk, prefix in split_prompt(plan.prefill.chunks, tokens, shard):
        load = StepLoad(time)
        add_sharded_chunk(load, chunk, prefix, shard, behind=int(prefix >= shard))
        before = ends[len(ends) - stages] if len(ends) >= stages else 0.0
        run(load, "long", f"chunk of {chunk} behind {prefix}", before)
    groups = (tokens - 1) // shard + 1
    for count in range(DECODES):
        load = StepLoad(time)
        load.add_decode(min(tokens, shard), kvp_groups=groups)
        run(load, "decode", f"token {count + 2} of the answer", ends[-1])
    return slices


def long_figure(plan: Plan) -> Figure:
    """The longest prompt alone: how its chunks fill the stages, and how its first tokens follow."""
    tokens = plan.limits.context_tokens
    slices = lone_prompt(plan, tokens)
    last = max(each.number for each in slices)
    chunks = last + 1 - DECODES
    stages = plan.parallelism.spp
    shown = min(CHUNKS + stages, max(CHUNKS, MOST_SLICES // stages))
    name = tokens_text(tokens)
    head = [each for each in slices if each.number < shown]
    tail = [each for each in slices if each.number > last - shown]
    views = [("chart-fill", f"The first {min(shown, chunks)} of {chunks} chunks", head)]
    if chunks > shown:
        views.append(("chart-drain", f"The last chunks, then {DECODES} tokens", tail))
    done_s = max(each.end_s for each in slices if each.number == chunks - 1)
    return Figure(
        name="figure-long",
        heading=f"A lone prompt of {name} tokens through the stages",
        lead=(
            f"A chunk enters a stage when it left the one before and the stage is free. {chunks}"
            f" chunks; first token after {seconds_text(done_s)}. A token then passes all stages"
            " before the next can start."
        ),
        drawings=tuple(_gantt(*view, stages=plan.parallelism.spp) for view in views),
        keys=_keys(slices),
        table=_slice_table(head, "chunk"),
        wide=True,
    )


def mix_figure(plan: Plan, seen: Seen) -> Figure | None:
    """The busiest stretch of the replayed mix."""
    stages = plan.parallelism.spp
    window = _busiest(seen, min(WINDOW, max(CHUNKS, MOST_SLICES // stages)))
    if not window:
        return None
    slices = []
    for each in window:
        kind = _kind(each, seen)
        chunks = ", ".join(f"{one.tokens} of request {one.request}" for one in each.chunks)
        parts = [f"chunks: {chunks}"] if chunks else []
        parts += [f"{each.decodes} decodes"] if each.decodes else []
        for stage, (start, seconds) in enumerate(zip(each.starts_s, each.stage_s, strict=True)):
            slices.append(
                Slice(
                    stage=stage,
                    start_s=start,
                    end_s=start + seconds,
                    kind=kind,
                    tip=f"step {each.step_id}, stage {stage}: {seconds_text(seconds)};"
                    f" {'; '.join(parts)}",
                    number=each.step_id,
                )
            )
    drawing = _gantt(
        "chart-mix",
        f"Steps {window[0].step_id} to {window[-1].step_id}",
        slices,
        stages=plan.parallelism.spp,
    )
    point = plan.predicted.replay
    rate = "" if point is None else f" at {point.arrival_rps:.3g} requests/s"
    return Figure(
        name="figure-mix",
        heading=f"The mix {plan.workload.name}, replayed{rate}",
        lead=(
            f"{len(window)} steps in a row of the run behind the percentiles, where most requests"
            " share the steps."
        ),
        drawings=(drawing,),
        keys=_keys(slices),
        table=_slice_table(slices, "step"),
        wide=True,
    )


def _busiest(seen: Seen, length: int) -> tuple[StepSlice, ...]:
    """The stretch in which most kinds of work and most requests meet; the first such."""
    best, most = 0, (-1, -1)
    steps = seen.steps
    for first in range(0, max(len(steps) - length, 0) + 1, length // 4):
        part = steps[first : first + length]
        kinds = len({_kind(each, seen) for each in part})
        requests = len({one.request for each in part for one in each.chunks})
        if (kinds, requests) > most:
            best, most = first, (kinds, requests)
    return steps[best : best + length]


def _kind(step: StepSlice, seen: Seen) -> str:
    long = any(one.request in seen.long_requests for one in step.chunks)
    short = any(one.request not in seen.long_requests for one in step.chunks)
    if long and short:
        return "both"
    return "long" if long else "short" if short else "decode"


def _keys(slices: Iterable[Slice]) -> tuple[Key, ...]:
    there = {each.kind for each in slices}
    return tuple(
        Key(sign="box", look=look, text=text)
        for kind, (look, text) in KINDS.items()
        if kind in there
    )


def _slice_table(slices: list[Slice], what: str, most: int = 60) -> Table:
    return Table(
        columns=(what, "stage", "starts", "ends", "kind"),
        rows=tuple(
            (
                str(each.number),
                str(each.stage),
                f"{each.start_s:.4f} s",
                f"{each.end_s:.4f} s",
                KINDS[each.kind][1],
            )
            for each in slices[:most]
        ),
    )


def _gantt(name: str, heading: str, slices: list[Slice], *, stages: int) -> str:
    """Rows of stages over time."""
    row = 26.0 if stages <= 8 else max(150.0 / stages, 7.0)
    top = 26.0
    bottom = top + row * stages
    low, high = min(each.start_s for each in slices), max(each.end_s for each in slices)
    scale = Scale(low=low, high=high, start=LEFT, end=WIDE - 12.0)
    drawing = Drawing(
        name=name,
        width=WIDE,
        height=bottom + 44,
        title=heading,
        description=f"{len(slices)} slices on {stages} stages from {low:.4f} s to {high:.4f} s.",
    )
    drawing.text(LEFT, 15, heading, class_="strong")
    stride = max(-(-(FONT + 3) // int(row)), 1)
    for stage in range(stages):
        if stage % stride == 0:
            drawing.text(
                LEFT - 8,
                top + row * (stage + 0.5) + FONT * 0.35,
                f"stage {stage}",
                class_="tick",
                text_anchor="end",
            )
    level_ticks(
        drawing,
        scale,
        (top, bottom),
        lambda value: f"{value:.6g} s" if high >= 1 else f"{value * 1e3:.4g} ms",
        most=8,
    )
    drawing.text(WIDE - 12, bottom + 36, "time", class_="name", text_anchor="end")
    gap = 2.0 if row > 12 else 0.5
    with drawing.group(class_="plot", data_x=scale.words):
        for each in slices:
            left, right = scale.at(each.start_s), scale.at(each.end_s)
            drawing.rect(
                (left, top + row * each.stage + gap, right, top + row * (each.stage + 1) - gap),
                class_=f"{KINDS[each.kind][0]} thin",
                tip=each.tip,
                data_stage=each.stage,
                data_step=each.number,
            )
    return drawing.svg()

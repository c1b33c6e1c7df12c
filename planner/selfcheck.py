"""What every plan must keep before it is handed out, beyond plans/check.py: code, run each time.

plans/check.py holds what a plan shows by itself. Here are the checks that need the search, the
runtime's loop or the text of the plan. A failure is a bug of the planner: exit 1 and its name.
"""

import math
from collections.abc import Iterator

from msgspec import structs

from planner.breakdown import breakdown
from planner.found import Found
from planner.objective import level, order, ttft_limit_s
from planner.price import Priced, price, tbt_s
from planner.search import meet_targets
from planner.space import Candidate, cut_layers
from planner.world import World
from plans.check import check_plan
from plans.check_cost import replay
from plans.chunks import WorkTable, split_prompt
from plans.codec import dumps, loads
from plans.errors import Infeasible, MedhaError
from plans.plan import Plan
from runtime.clock import VirtualClock
from runtime.engine import Engine
from runtime.executor.simulated import SimulatedExecutor
from runtime.request import Request
from runtime.scheduler import load_policy

EXACT = 1e-9
"""Relative: sums of some hundred terms in another order."""
LONE_TOKENS = 8192
"""Prompt that is run alone through the engine."""


class SelfCheckFailed(MedhaError):
    """A plan breaks one of the planner's own rules; carries the check's name."""

    def __init__(self, name: str, problem: str) -> None:
        """Builds `self-check NAME: problem`."""
        self.name = name
        super().__init__(f"self-check {name} (a bug of the planner): {problem}")


def verify(found: Found, plan: Plan) -> None:
    """Runs every check on the plan and what the search says about it; raises SelfCheckFailed."""
    check_plan(plan, where=f"{plan.name} (a bug of the planner)")
    best = found.ranked[0]
    findings: dict[str, Iterator[str]] = {
        "round-trip": round_trip(plan),
        "lone-request": lone_request(plan),
        "one-stage": one_stage(plan),
        "one-group": one_group(plan),
        "speed-of-light": speed_of_light(best),
        "neighbours": neighbours(best.world, best, found),
        "operating-points": operating_points(found, plan),
    }
    for name, problems in findings.items():
        for problem in problems:
            raise SelfCheckFailed(name, problem)


def round_trip(plan: Plan) -> Iterator[str]:
    """YAML -> plan -> YAML gives the same bytes."""
    text = dumps(plan)
    if dumps(loads(text, Plan)) != text:
        yield "the plan's text changes when it is read and written again"


def lone_request(plan: Plan) -> Iterator[str]:
    """The plan starts in the simulated runtime, and a lone request takes its solo time exactly."""
    tokens = min(LONE_TOKENS, plan.limits.context_tokens - 1)
    work = WorkTable(plan.prefill.chunks, plan.step_time, plan.kv.tokens_per_kvp_shard)
    clock = VirtualClock()
    engine = Engine(
        plan,
        SimulatedExecutor(plan, clock),
        clock,
        load_policy(plan.scheduler.policy, plan.scheduler),
    )
    engine.add(Request(number=0, arrival_s=0.0, prompt_tokens=tokens, max_tokens=1))
    engine.run()
    measured_s, predicted_s = engine.records[0].ttft_s, work.solo_s(tokens)
    if not math.isclose(measured_s, predicted_s, rel_tol=EXACT):
        yield f"{tokens} tokens alone take {measured_s} s in the engine, predicted {predicted_s} s"


def one_stage(plan: Plan) -> Iterator[str]:
    """Without a pipeline the stage recursion is the plain sum of the chunks' steps."""
    whole = structs.replace(plan.step_time, stage_layers=(sum(plan.step_time.stage_layers),))
    shard = plan.kv.tokens_per_kvp_shard
    tokens = min(LONE_TOKENS, plan.limits.context_tokens, shard)
    plain_s = sum(
        whole.step_s([chunk]) for chunk in split_prompt(plan.prefill.chunks, tokens, shard)
    )
    recursion_s = WorkTable(plan.prefill.chunks, whole, shard).solo_s(tokens)
    if not math.isclose(plain_s, recursion_s, rel_tol=EXACT):
        yield f"{tokens} tokens on one stage: recursion {recursion_s} s, sum {plain_s} s"


def one_group(plan: Plan) -> Iterator[str]:
    """A context inside one KVP shard costs what it costs without KVP."""
    tokens = min(LONE_TOKENS, plan.kv.tokens_per_kvp_shard)
    grouped_s = tbt_s(plan.step_time, tokens, plan.kv.tokens_per_kvp_shard)
    alone_s = plan.step_time.step_s((), [tokens])
    if not math.isclose(grouped_s, alone_s, rel_tol=EXACT):
        yield f"a decode at {tokens} tokens: {grouped_s} s in one of the groups, {alone_s} s alone"


def speed_of_light(best: Priced) -> Iterator[str]:
    """No op is predicted faster than the datasheet allows."""
    for row in breakdown(best):
        if row.seconds < row.light_s * (1 - EXACT):
            yield (
                f"{row.op} in {row.step}: {row.seconds:.6g} s, below {row.light_s:.6g} s"
                f" ({row.bound} at the datasheet's rate)"
            )


def neighbours(world: World, best: Priced, found: Found) -> Iterator[str]:
    """No mesh that differs by a factor of two on one axis is better and was missed."""
    mine, p = best.candidate, best.candidate.parallelism
    seen = {each.candidate.parallelism for each in found.ranked}
    competing = [each for each, why in zip(found.ranked, found.verdicts, strict=True) if not why]
    limit_s = ttft_limit_s(world, min(each.ttft_longest_s for each in competing))
    for axis in ("spp", "kvp"):
        for degree in (getattr(p, axis) // 2, getattr(p, axis) * 2):
            shape = {"spp": p.spp, "kvp": p.kvp} | {axis: degree}
            slots = world.topology.nodes * (world.topology.devices_per_node // p.tp)
            replicas = slots // max(shape["spp"] * shape["kvp"], 1)
            if degree < 1 or not replicas or shape["spp"] > world.model.layers:
                continue
            used = p.tp * shape["spp"] * shape["kvp"] * replicas
            other = structs.replace(p, **shape, replicas=replicas, idle=world.gpus - used)
            if other in seen:
                continue
            stages = cut_layers(world.model.layers, shape["spp"])
            try:
                each = price(world, Candidate(parallelism=other, stages=stages))
            except Infeasible:
                continue
            if (
                order(world, each) < order(world, best)
                and each.ttft_longest_s <= limit_s
                and level(world, each) >= level(world, best)
                and meet_targets(world, [each])[0]
            ):
                yield f"{each.candidate.label} was missed and is better than {mine.label}"


def operating_points(found: Found, plan: Plan) -> Iterator[str]:
    """The other finalists' replays keep what plans/check.py asks of the plan's own."""
    for point in found.replays:
        if point is not None:
            predicted = structs.replace(plan.predicted, replay=point, goodput_rps=point.goodput_rps)
            for path, text in replay(structs.replace(plan, predicted=predicted)):
                yield f"{path}: {text}"

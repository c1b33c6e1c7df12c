"""What every plan must keep before it is handed out, beyond plans/check.py: code, run each time.

plans/check.py holds what a plan shows by itself. Here are the checks that need the search, the
runtime's loop or the text of the plan. A failure is a bug of the planner: exit 1 and its name.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from itertools import pairwise

from msgspec import structs

from planner.breakdown import breakdown
from planner.estimates import MOST_LINEAR_FACTOR
from planner.export import ExportDiffers, export
from planner.found import Found
from planner.measured import TERMS
from planner.objective import level, order, ttft_limit_s
from planner.price import Priced, price, tbt_s
from planner.residuals import LEAST_ERROR
from planner.search import meet_targets
from planner.space import Candidate, check_tp, cut_layers
from planner.world import World
from plans.check import check_plan
from plans.check_cost import replay
from plans.chunks import WorkTable, split_prompt
from plans.codec import dumps, loads
from plans.errors import Infeasible, MedhaError
from plans.plan import Plan
from plans.steptime import StepLoad, StepTime
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
        "monotone": monotone(plan),
        "provenance": provenance(best, plan),
        "exports": exports(plan),
        "same-answer": same_answer(best),
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


def program_files(plan: Plan, files: Mapping[str, bytes]) -> Iterator[str]:
    """The plan's hashes are those of the program's files, every one of them."""
    if missing := sorted(set(plan.files) - set(files)):
        yield f"files that the plan names are missing: {', '.join(missing)}"
    for path, said in plan.files.items():
        if path in files and hashlib.sha256(files[path]).hexdigest() != said:
            yield f"{path} is not the file whose hash the plan holds"


def check_files(plan: Plan, files: Mapping[str, bytes]) -> None:
    """Runs the check on what is about to be written; raises SelfCheckFailed."""
    for problem in program_files(plan, files):
        raise SelfCheckFailed("program-files", problem)


def exports(plan: Plan) -> Iterator[str]:
    """The flags of other engines, read back from the finished scripts, say what the plan says."""
    for engine in ("sglang", "vllm"):
        try:
            export(plan, engine)
        except ExportDiffers as error:
            yield str(error)
        except MedhaError:  # an engine that cannot start anything like the plan says so itself
            continue


def monotone(plan: Plan) -> Iterator[str]:
    """A step never gets shorter by more of anything, over the range that the plan can see.

    Chunk, prefix, decodes, keys and groups each rise alone, from steps that are small and large in
    the others.
    """
    time, context = plan.step_time, plan.kv.tokens_per_kvp_shard
    tokens = _ladder(1, plan.scheduler.max_step_tokens)
    keys = _ladder(1, context)
    batches = _ladder(1, plan.limits.sequences)
    groups = range(1, plan.parallelism.kvp + 1)
    lines: dict[str, list[float]] = {}
    for prefix in (0, context // 2, context):
        lines[f"tokens of a chunk behind {prefix}"] = [
            time.step_s([(each, prefix)]) for each in tokens
        ]
    for chunk in (tokens[0], tokens[len(tokens) // 2], tokens[-1]):
        lines[f"prefix of {chunk} tokens"] = [time.step_s([(chunk, each)]) for each in keys]
        lines[f"groups of {chunk} tokens"] = [
            time.step_s([(chunk, context // 2)], kvp_groups=each) for each in groups
        ]
    for held in (keys[0], context):
        lines[f"decodes of {held} keys"] = [_decodes_s(time, each, held) for each in batches]
    for batch in (1, batches[-1]):
        lines[f"keys of {batch} decodes"] = [_decodes_s(time, batch, each) for each in keys]
    for name, seconds in lines.items():
        for before, after in pairwise(seconds):
            if after < before:
                yield f"more {name}: {after} s after {before} s"


def _ladder(first: int, last: int) -> list[int]:
    """first, its doubles, each with the number behind it, where tables have kinks; and last."""
    found, at = [], first
    while at < last:
        found += [at, at + 1]
        at *= 2
    return sorted({*(each for each in found if each < last), last})


def _decodes_s(time: StepTime, sequences: int, keys: int) -> float:
    load = StepLoad(time)
    load.add_decodes(sequences, sequences * keys)
    return load.seconds()


def provenance(best: Priced, plan: Plan) -> Iterator[str]:
    """Every term of the step time says where it comes from, none from too far away.

    A term that was measured nowhere near is by formula, and on a device with a profile the notes
    say why; the error band is no narrower than repeated measurements are.
    """
    said = plan.predicted.provenance
    if missing := sorted(set(TERMS) - set(said)):
        yield f"terms without provenance: {', '.join(missing)}"
    for term, origin in said.items():
        kind, _, factor = origin.partition(" by ")
        if kind == "extrapolated" and not 1 < float(factor) <= MOST_LINEAR_FACTOR:
            yield f"{term} is {origin}; at most by {MOST_LINEAR_FACTOR:g}"
    measured = plan.step_time.source == "profile"
    if not measured and set(said.values()) != {"formula"}:
        yield "a step time by the data sheet has terms that claim a measurement"
    unsaid = [
        term
        for term, origin in said.items()
        if measured and origin == "formula"
        if not any(note.startswith(f"{term} by formula") for note in plan.predicted.notes)
        if term not in _unused(best)
    ]
    if unsaid:
        yield f"by formula without a note that says why: {', '.join(unsaid)}"
    if plan.predicted.error_band < LEAST_ERROR:
        yield f"error band {plan.predicted.error_band} below {LEAST_ERROR}"


def _unused(best: Priced) -> set[str]:
    """Terms of axes that have one rank, which nothing is read for."""
    p = best.candidate.parallelism
    degrees = {"collectives": p.tp, "merge": p.kvp, "hop": p.spp}
    return {term for term, degree in degrees.items() if degree == 1}


def same_answer(best: Priced) -> Iterator[str]:
    """The same candidate priced again costs the same to the last bit."""
    if price(best.world, best.candidate) != best:
        yield f"{best.candidate.label} priced again is not what it was"


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
    """No op is predicted faster than the datasheet allows.

    What a measured sum over ranks takes beyond a line over tokens stands in the layer's table
    (reduce_time.py), so a step's sums count together with its products where they are below theirs.
    """
    rows = breakdown(best)
    products = {row.step: row for row in rows if row.op == "matrix products"}
    for row in rows:
        seconds, light_s = row.seconds, row.light_s
        if row.op == "collectives" and row.step in products and seconds < light_s:
            seconds += products[row.step].seconds
            light_s += products[row.step].light_s
        if seconds < light_s * (1 - EXACT):
            yield (
                f"{row.op} in {row.step}: {seconds:.6g} s, below {light_s:.6g} s"
                f" ({row.bound} at the datasheet's rate)"
            )


def neighbours(world: World, best: Priced, found: Found) -> Iterator[str]:
    """No mesh that differs by a factor of two on one axis is better and was missed."""
    mine, p = best.candidate, best.candidate.parallelism
    seen = {each.candidate.parallelism for each in found.ranked}
    competing = [each for each, why in zip(found.ranked, found.verdicts, strict=True) if not why]
    limit_s = ttft_limit_s(world, min(each.ttft_longest_s for each in competing))
    for axis in ("spp", "kvp", "tp"):
        for degree in (getattr(p, axis) // 2, getattr(p, axis) * 2):
            shape = {"tp": p.tp, "spp": p.spp, "kvp": p.kvp} | {axis: degree}
            if degree < 1 or shape["spp"] > world.model.layers:
                continue
            slots = world.topology.nodes * (world.topology.devices_per_node // shape["tp"])
            replicas = slots // (shape["spp"] * shape["kvp"])
            if not replicas:
                continue
            used = shape["tp"] * shape["spp"] * shape["kvp"] * replicas
            other = structs.replace(p, **shape, replicas=replicas, idle=world.gpus - used)
            if other in seen:
                continue
            stages = cut_layers(world.model.layers, shape["spp"])
            try:
                check_tp(world.model, other.tp)
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

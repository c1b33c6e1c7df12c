"""What one candidate would do: memory, step time, chunk schedule, latencies, capacity."""

from dataclasses import dataclass

from planner.capacity import Capacity, capacity
from planner.cost import step_time
from planner.memory import Footprint, footprint
from planner.placement import place
from planner.schedule import (
    chunk_sizes,
    estimate_solo_s,
    least_chunk_step_s,
    rows_of,
)
from planner.space import Candidate, specialise
from planner.world import World, slo_classes, slo_prompt
from plans.chunks import WorkTable
from plans.plan import Placement
from plans.steptime import StepTime

EXACT_CHUNKS = 512
"""Prompts of at most this many chunk and stage pairs are priced chunk by chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Priced:
    """A candidate that fits, and what it would do."""

    world: World
    """The question with the candidate's page size and dtypes in it."""
    candidate: Candidate
    placement: Placement
    footprint: Footprint
    time: StepTime
    sizes: tuple[tuple[int, int], ...]
    """(until_tokens, chunk_tokens) of the schedule."""
    capacity: Capacity
    ttft_longest_s: float
    """Lone prompt as long as the context."""
    ttft_slo_s: float
    """Lone prompt for which --ttft-slo is judged."""
    tbt_full_s: float
    """Gap between tokens of one request at full context, a minimal chunk of another beside it."""
    least_chunk_s: float
    """Step of a minimal chunk at full context."""

    @property
    def shard_tokens(self) -> int:
        """Tokens of one request in one KVP group."""
        return self.footprint.kv.tokens_per_kvp_shard

    def solo_s(self, tokens: int) -> float:
        """Time to the first token of a lone prompt."""
        return solo_s(self.sizes, self.time, tokens, self.shard_tokens)

    def tbt_s(self, context: int) -> float:
        """Gap between tokens of a lone request at a context."""
        return tbt_s(self.time, context, self.shard_tokens)


def price(world: World, candidate: Candidate) -> Priced:
    """Everything that ranking needs; raises Infeasible where the candidate does not fit."""
    world = specialise(world, candidate)
    room = footprint(world, candidate)
    placement = place(world.topology, candidate.parallelism)
    time = step_time(world, candidate, placement)
    shard = room.kv.tokens_per_kvp_shard
    sizes = chunk_sizes(world, time, shard)
    context = world.limits.context_tokens
    slo_tokens = min(max(slo_prompt(each) for each in slo_classes(world.workload)), context)
    return Priced(
        world=world,
        candidate=candidate,
        placement=placement,
        footprint=room,
        time=time,
        sizes=sizes,
        capacity=capacity(
            world,
            candidate.parallelism,
            time,
            sizes,
            pool_tokens=room.pool_tokens,
            shard_tokens=shard,
            page_tokens=world.page_tokens,
        ),
        ttft_longest_s=solo_s(sizes, time, context, shard),
        ttft_slo_s=solo_s(sizes, time, slo_tokens, shard),
        tbt_full_s=tbt_s(time, context, shard, world.scheduler.min_chunk_tokens),
        least_chunk_s=least_chunk_step_s(world, time, shard),
    )


def solo_s(
    sizes: tuple[tuple[int, int], ...], time: StepTime, tokens: int, shard_tokens: int
) -> float:
    """Time to the first token of a lone prompt: by chunks where that is cheap, else by spans."""
    if tokens / sizes[-1][1] * time.stages <= EXACT_CHUNKS:
        return WorkTable(rows_of(sizes), time, shard_tokens).solo_s(tokens)
    return estimate_solo_s(sizes, time, tokens, shard_tokens)


def tbt_s(time: StepTime, context: int, shard_tokens: int, chunk_tokens: int = 0) -> float:
    """Gap between tokens of one request at a context, on its slowest group.

    chunk_tokens  a chunk of another, new prompt in the same step
    """
    groups = (context - 1) // shard_tokens + 1
    chunks = [(chunk_tokens, 0)] if chunk_tokens else []
    keys = min(context, shard_tokens)
    if not chunks or groups == 1:
        return time.step_s(chunks, [keys], groups)
    # the chunk is in one group only, so it merges nothing
    alone = time.step_s((), [keys], groups)
    return alone + time.step_s(chunks, [keys]) - time.step_s((), [keys])

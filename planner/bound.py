"""What no candidate of a mesh shape can beat: bounds that let the search leave shapes unpriced.

A shape (tp, spp, kvp, replicas) is bounded by one StepTime of its tp, with nothing for hand-overs
and KVP merges, the fewest keys in a group that any variant has, and each table read where a token
is cheapest. A branch, which also fixes how many groups hold a request, is bounded in the same way,
with the tokens that each of these groups repeats. Every formula below is the one that prices a
candidate with terms left out or taken at their least, so a bound holds whatever the coefficients
are; a test compares them on every variant.
"""

from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from msgspec import structs

from planner.capacity import Work, mean_over, mean_tokens
from planner.cost import MARGIN, step_time
from planner.memory import holds
from planner.placement import place
from planner.price import tbt_s
from planner.schedule import row_ends
from planner.space import PAGE_SIZES, Candidate, cut_layers, dtypes, specialise
from planner.world import World
from plans.mesh import Parallelism
from plans.steptime import StepLoad, StepTime, table_s
from plans.workload import length_at

LESS = 1 - 1e-9
"""Room for rounding: sums of a few thousand terms in another order differ by 1e-12."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """Of every variant of one shape; seconds are at least, rates at most."""

    fits: bool
    """Whether the context limit fits in memory."""
    tbt_full_s: float
    least_chunk_s: float
    ttft_longest_s: float
    rps: float
    lone_s: dict[str, float]
    """End-to-end time of a lone request of each class, at its median lengths."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _PerLayer:
    """What one layer takes at least, on one of tp ranks."""

    time: StepTime
    ats: tuple[int, ...]
    """Tokens of the knots of the matrix products."""
    shares: tuple[float, ...]
    """Seconds a token in a step of at most so many tokens."""
    token_s: float
    """Seconds a token in a step of the cheapest size, collectives included."""
    requests: dict[int, tuple[float, float]]
    """Seconds and prompt rows of a mean request, by tokens of a KVP shard; filled when asked."""


class Bounds:
    """Bounds of the shapes of one question; what depends on tp alone is computed once."""

    def __init__(self, world: World) -> None:
        """Prepares nothing: shapes are bounded when asked for."""
        self._worlds = [
            _plainest(world, weight_dtype=weights, kv_dtype=kv)
            for weights, kv in dtypes(world)
            if {weights, kv} - {None} <= set(world.device.peak_flops_per_s)
        ]
        self._layers: dict[int, list[_PerLayer]] = {}

    def of(self, root: Candidate, *, whole: bool = True) -> Bound:
        """The bound of one shape over all its branches, or else of the one branch given."""
        every = [
            _bound(world, layer, root, whole=whole)
            for world, layer in zip(self._worlds, self._at(root), strict=True)
        ]
        if len(every) == 1:
            return every[0]
        return Bound(
            fits=any(each.fits for each in every),
            tbt_full_s=min(each.tbt_full_s for each in every),
            least_chunk_s=min(each.least_chunk_s for each in every),
            ttft_longest_s=min(each.ttft_longest_s for each in every),
            rps=max(each.rps for each in every),
            lone_s={name: min(each.lone_s[name] for each in every) for name in every[0].lone_s},
        )

    def ttft_s(self, root: Candidate) -> float:
        """A closer bound on the longest prompt than `of` gives, at ten times the cost."""
        return min(
            _chunked_ttft_s(world, layer, root)
            for world, layer in zip(self._worlds, self._at(root), strict=True)
        )

    def _at(self, root: Candidate) -> list[_PerLayer]:
        tp = root.parallelism.tp
        if tp not in self._layers:
            self._layers[tp] = [_per_layer(world, tp) for world in self._worlds]
        return self._layers[tp]


def _plainest(world: World, **changes: Any) -> World:
    """The question as a variant asks it, whatever its shape."""
    return specialise(world, Candidate(parallelism=Parallelism(), stages=(), **changes))


def _per_layer(world: World, tp: int) -> _PerLayer:
    alone = Parallelism(tp=tp, idle=world.gpus - tp)
    candidate = Candidate(parallelism=alone, stages=cut_layers(world.model.layers, 1))
    time = step_time(world, candidate, place(world.topology, alone))
    time = structs.replace(
        time,
        # stages share what several ranks add to a step: no stage has less than one rank alone
        overhead_s=_least_overhead_s(world),
        merge_latency_s=0.0,
        merge_token_s=0.0,
        hop_latency_s=0.0,
        hop_token_s=0.0,
    )
    knots = time.matmul
    shares = list(accumulate((knot.seconds / knot.at for knot in knots), min))
    token_s = shares[-1]
    for before, last in list(pairwise(knots))[-1:]:  # the table goes on with its last slope
        token_s = min(token_s, (last.seconds - before.seconds) / (last.at - before.at))
    token_s += time.comm_token_s
    return _PerLayer(
        time=time,
        ats=tuple(knot.at for knot in knots),
        shares=tuple(shares),
        token_s=token_s,
        requests={},
    )


def _least_overhead_s(world: World) -> float:
    one = Parallelism(idle=world.gpus - 1)
    candidate = Candidate(parallelism=one, stages=cut_layers(world.model.layers, 1))
    return step_time(world, candidate, place(world.topology, one)).overhead_s


def _request(world: World, layer: _PerLayer, shard: int) -> tuple[float, float]:
    """One layer's seconds of a mean request, and its prompt's rows.

    Seconds are those of tokens, causal pairs and keys of its decodes.

    Each group that holds a request repeats its tokens. shard is that of the branch, or the context
    limit where a branch may have any: then one group does it all.
    """
    if shard in layer.requests:
        return layer.requests[shard]
    time, context = layer.time, world.limits.context_tokens

    def prompt_of(length: float) -> Work:
        groups = max(length - 1, 0) // shard + 1
        repeated = (groups - 1) * groups / 2 * shard + groups * (length - (groups - 1) * shard)
        return Work(
            tokens=length,
            samples=groups,
            merge_tokens=min(repeated, groups * length),
            chunk_attention_s=length * length / 2 * time.pair_s,
        )

    total_s = prompt_rows = 0.0
    for each in world.workload.classes:
        prompt = mean_over(each.input_tokens, context, prompt_of)
        prompt_rows += each.share * prompt.merge_tokens
        longest_out = min(each.output_tokens[-1][1], context - 1)
        out = mean_tokens(each.output_tokens, longest_out)
        square = mean_tokens(each.output_tokens, longest_out, power=2)
        held = min(out * prompt.tokens + square / 2, out * context)
        rows = prompt.merge_tokens + out * prompt.samples
        total_s += each.share * (
            rows * layer.token_s
            + prompt.chunk_attention_s
            + held * time.decode_key_s
            + out * prompt.samples * time.decode_sequence_s
        )
    layer.requests[shard] = total_s, prompt_rows
    return layer.requests[shard]


def _paged(world: World) -> list[World]:
    """The question in the page sizes that may hold most: small ones waste least.

    In fp8 a page also has its scales, of which large pages have fewer.
    """
    pages = PAGE_SIZES if world.kv_dtype == "fp8" else (min(PAGE_SIZES),)
    return [replace(world, page_tokens=page) for page in pages]


def _shards(world: World, groups: int) -> tuple[int, int]:
    """Fewest and most tokens that a group keeps at the context limit, over the page sizes.

    A shard in pages of 64 is never longer than one in pages of 128.
    """
    context = world.limits.context_tokens
    share = -(-context // groups)
    sizes = [-(-share // page) * page for page in PAGE_SIZES]
    return min(*sizes, context), max(sizes)


def _bound(world: World, layer: _PerLayer, root: Candidate, *, whole: bool) -> Bound:
    context = world.limits.context_tokens
    time = structs.replace(layer.time, stage_layers=root.stage_layers)
    shard, longest_shard = _shards(world, root.groups)
    least = world.scheduler.min_chunk_tokens
    most_layers = max(root.stage_layers)

    def ttft_s(tokens: int) -> float:
        pairs = _pairs(tokens, shard)
        return LESS * most_layers * (tokens * layer.token_s + pairs * time.pair_s)

    lone_s = {}
    for each in world.workload.classes:
        prompt = min(length_at(each.input_tokens, 0.5), context - 1)
        answer = min(length_at(each.output_tokens, 0.5), context - prompt)
        tokens_s = (answer - 1) * time.step_s((), [min(prompt, shard)])
        lone_s[each.name] = ttft_s(prompt) + LESS * tokens_s
    return Bound(
        fits=any(holds(each, root) for each in _paged(world)),
        tbt_full_s=LESS * tbt_s(time, shard, shard, least),
        least_chunk_s=LESS * time.step_s([(least, max(shard - least, 0))]),
        ttft_longest_s=ttft_s(context),
        rps=_rps(world, layer, root, context if whole else longest_shard),
        lone_s=lone_s,
    )


def _pairs(tokens: int, shard: int) -> float:
    """(query, key) pairs of a prompt in the group that has most at each token."""
    if tokens <= shard:
        return tokens * tokens / 2
    return shard * shard / 2 + shard * (tokens - shard)


def _rps(world: World, layer: _PerLayer, root: Candidate, shard: int) -> float:
    """Requests a second that no step exceeds: x requests a step and group, of time r in a layer.

    The slowest stage takes at least r x times its layers, and at least its part of the whole step.
    That is the budget, which beside the fixed time f has room for r x times all layers, so x over
    the stage's time is at most (1 - f / budget) x stages / (layers x r). Hand-overs and merges
    raise f. Or x is the least progress, and the step longer than the budget and than an empty one.
    """
    p, time = root.parallelism, layer.time
    request_s, prompt_rows = _request(world, layer, shard)
    layers = sum(root.stage_layers)
    fixed_s = p.spp * time.overhead_s + layers * time.comm_latency_s
    empty_s = fixed_s + layers * time.matmul[0].seconds
    empty_s += time.head[0].seconds if time.head else 0.0
    budget_s = world.scheduler.step_budget_s / (1 + time.margin)
    within = max(1 - fixed_s / budget_s, 0.0) * p.spp / (layers * request_s)
    least = world.scheduler.min_chunk_tokens / prompt_rows
    beyond = least * p.spp / max(budget_s, empty_s)
    slowest = 1 / (max(root.stage_layers) * request_s)
    return p.replicas * p.kvp * min(max(within, beyond), slowest) / LESS


def _chunked_ttft_s(world: World, layer: _PerLayer, root: Candidate) -> float:
    """As the plain bound, with the chunks of each row no larger than the idle budget allows."""
    context = world.limits.context_tokens
    time = structs.replace(layer.time, stage_layers=root.stage_layers)
    shard, _ = _shards(world, root.groups)
    scheduler = world.scheduler
    most_layers = max(root.stage_layers)
    fixed_s = time.overhead_s + most_layers * time.comm_latency_s
    empty = StepLoad(time)
    budget_s = scheduler.idle_budget_s / (1 + time.margin)
    seconds = most_layers * _pairs(context, shard) * time.pair_s
    most = scheduler.max_step_tokens
    first = 0
    for until in row_ends(context):
        older = first >= shard
        prefix = shard if older else first
        fits = empty.largest_chunk(prefix, budget_s, most, keys_only=older)
        most = max(fits, scheduler.min_chunk_tokens)
        at = bisect_right(layer.ats, most)
        share = table_s(time.matmul, most) / most
        if at:  # between knots seconds a token are monotone, so the least is at an end
            share = min(share, layer.shares[at - 1])
        seconds += (until - first) * (fixed_s / most + most_layers * (share + time.comm_token_s))
        first = until
    return LESS * seconds


def above_target(world: World, seconds: float, target_s: float) -> bool:
    """Whether a time misses a target with the margin on top: the one rule of bound and price."""
    return seconds * (1 + MARGIN) > target_s

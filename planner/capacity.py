"""Requests a second of a workload that one plan sustains, and what limits them.

The steady state of a mixed step: on average x requests arrive a step and KVP group, so each step
holds their prefill tokens and their decodes. x grows until the step, summed over its stages and
over-estimated by the packer's margin, takes the step budget; where decodes alone fill that, x is
what the least progress of a prefill allows. Then

    capacity = replicas x kvp x x / (time of the slowest stage)      steps follow at its pace

Little's law gives what is in flight (capacity x output tokens x step), which KV pages and the
sequence limit bound as well. No queueing constant, no efficiency factor beyond the step time's own.
Input and output lengths of a class are taken as independent.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

from planner.schedule import spans
from plans.mesh import Parallelism
from plans.plan import Scheduler
from plans.steptime import StepTime, table_s
from plans.workload import Limits, Quantile, RequestClass, Workload

GAUSS = ((0.1127016653792583, 5 / 18), (0.5, 8 / 18), (0.8872983346207417, 5 / 18))
"""Points and weights of the three-point rule on [0, 1]: exact for a prompt's quadratic work."""
BISECTIONS = 40


class Asked(Protocol):
    """What capacity reads of a question; a World and a Plan both have it."""

    @property
    def workload(self) -> Workload:
        """Lengths and shares."""

    @property
    def limits(self) -> Limits:
        """Context and sequences."""

    @property
    def scheduler(self) -> Scheduler:
        """Budgets."""


class Work(NamedTuple):
    """What requests add to steps, summed over the KVP groups: tokens and one layer's seconds."""

    tokens: float = 0.0
    """Rows of the linear layers; each group that holds a long request repeats its rows."""
    samples: float = 0.0
    chunk_attention_s: float = 0.0
    decode_attention_s: float = 0.0
    merge_tokens: float = 0.0

    def plus(self, other: "Work", scale: float = 1.0) -> "Work":
        """This work and `scale` times the other."""
        return Work(
            self.tokens + scale * other.tokens,
            self.samples + scale * other.samples,
            self.chunk_attention_s + scale * other.chunk_attention_s,
            self.decode_attention_s + scale * other.decode_attention_s,
            self.merge_tokens + scale * other.merge_tokens,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """Sustained rate of all replicas and its limit."""

    rps: float
    bound_by: str
    step_s: float
    """Time between tokens at that rate: a step summed over its stages."""
    decoding: float
    """Requests that decode at the same time, per replica."""
    terms: dict[str, float]
    """Seconds of that step on the slowest stage, by term."""


class PromptWork:
    """Work of a lone prompt's prefill by its length; cumulative at the edges of its spans."""

    def __init__(
        self, sizes: tuple[tuple[int, int], ...], time: StepTime, tokens: int, shard_tokens: int
    ) -> None:
        """Covers prompts of up to `tokens` tokens."""
        self._time = time
        self._shard_tokens = shard_tokens
        self._known: dict[float, Work] = {}
        self._spans = spans(sizes, tokens, shard_tokens)
        self._firsts = [first for first, _, _ in self._spans]
        self._before = [Work()]
        for first, end, chunk in self._spans:
            self._before.append(self._before[-1].plus(self._span(first, end, chunk)))

    def of(self, tokens: float) -> Work:
        """Work of a prompt; fractions allowed, since it is used for means."""
        if tokens in self._known:
            return self._known[tokens]
        work = Work()
        at = bisect_left(self._firsts, tokens) - 1  # the last span that starts below
        if at >= 0:
            first, end, chunk = self._spans[at]
            work = self._before[at].plus(self._span(first, min(end, tokens), chunk))
        self._known[tokens] = work
        return work

    def _span(self, first: float, end: float, chunk: int) -> Work:
        """A stretch at one chunk size; chunks of prompts share steps, so their number is real."""
        time = self._time
        shard = int(first) // self._shard_tokens
        length = end - first
        rows = min(chunk, length)
        prefix = (
            first + end - rows
        ) / 2 - shard * self._shard_tokens  # the mean in the newest shard
        count = length / rows if rows else 0.0
        newest_s = max(
            (rows * prefix + rows * (rows + 1) / 2) * time.pair_s, (prefix + rows) * time.key_s
        )
        older_s = max(rows * self._shard_tokens * time.pair_s, self._shard_tokens * time.key_s)
        groups = shard + 1
        return Work(
            tokens=length * groups,
            samples=length / chunk * groups,
            chunk_attention_s=count * (newest_s + shard * older_s),
            merge_tokens=length * groups * shard,
        )


def mean_over(table: tuple[Quantile, ...], most: int, value: Callable[[float], Work]) -> Work:
    """Mean of a function of the length, lengths capped at `most`."""
    total = Work()
    for (low_q, low), (high_q, high) in pairwise(table):
        for at, weight in GAUSS:
            length = min(low + at * (high - low), most)
            total = total.plus(value(length), weight * (high_q - low_q))
    return total


def mean_tokens(table: tuple[Quantile, ...], most: int, power: int = 1) -> float:
    """Mean of length or of its square, lengths capped at `most`."""
    return mean_over(table, most, lambda length: Work(tokens=length**power)).tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """Means of one request of the workload."""

    work: Work
    prompt_rows: float
    """Tokens of the prompt, in each group that repeats them."""
    output_tokens: float
    decode_kv_tokens: float
    """KV tokens held, summed over the steps of the answer."""
    prefill_kv_tokens: float
    """The same for the chunks of the prompt, at the chunk sizes of the schedule."""


def demand(
    asked: Asked, time: StepTime, sizes: tuple[tuple[int, int], ...], shard_tokens: int
) -> Demand:
    """Means over the workload's classes by their shares."""
    context = asked.limits.context_tokens
    prompts = PromptWork(sizes, time, context, shard_tokens)

    def held_in_prefill(tokens: float) -> Work:
        groups = max(tokens - 1, 0) // shard_tokens + 1
        return Work(tokens=tokens / 2 * max(prompts.of(tokens).samples / groups, 1.0))

    work = Work()
    output = rows = decode_kv = prefill_kv = 0.0
    for each in asked.workload.classes:
        longest_out = min(each.output_tokens[-1][1], context - 1)
        mean_in = mean_tokens(each.input_tokens, context)
        mean_out = mean_tokens(each.output_tokens, longest_out)
        square_out = mean_tokens(each.output_tokens, longest_out, power=2)
        held = min(mean_out * mean_in + square_out / 2, mean_out * context)
        prompt = mean_over(each.input_tokens, context, prompts.of)
        rows += each.share * prompt.tokens
        work = work.plus(prompt, each.share)
        work = work.plus(
            _decode(
                each,
                time=time,
                context=context,
                shard_tokens=shard_tokens,
                outputs=mean_out,
                held=held,
            ),
            each.share,
        )
        output += each.share * mean_out
        decode_kv += each.share * held
        prefill_kv += each.share * mean_over(each.input_tokens, context, held_in_prefill).tokens
    return Demand(
        work=work,
        prompt_rows=rows,
        output_tokens=output,
        decode_kv_tokens=decode_kv,
        prefill_kv_tokens=prefill_kv,
    )


def _decode(
    each: RequestClass,
    *,
    time: StepTime,
    context: int,
    shard_tokens: int,
    outputs: float,
    held: float,
) -> Work:
    """Work of the answers of a class; the groups of a request follow its prompt's length."""
    mean_groups = mean_over(
        each.input_tokens,
        context,
        lambda length: Work(
            tokens=(groups := max(length - 1, 0) // shard_tokens + 1),
            merge_tokens=groups * (groups - 1),
        ),
    )
    return Work(
        tokens=outputs * mean_groups.tokens,
        samples=outputs * mean_groups.tokens,
        decode_attention_s=held * time.decode_key_s
        + outputs * mean_groups.tokens * time.decode_sequence_s,
        merge_tokens=outputs * mean_groups.merge_tokens,
    )


def stage_terms(time: StepTime, stage: int, work: Work) -> dict[str, float]:
    """Seconds of a mean step on one stage, by term; for whole loads their sum is stage_s."""
    layers = time.stage_layers[stage]
    last = stage == time.stages - 1
    matmul_s = table_s(time.matmul, work.tokens)
    weights_s = min(time.matmul[0].seconds, matmul_s)
    merge_s = (
        time.merge_latency_s + work.merge_tokens * time.merge_token_s if work.merge_tokens else 0.0
    )
    comm_s = time.comm_latency_s + work.tokens * time.comm_token_s if work.tokens else 0.0
    return {
        "launch overhead": time.overhead_s,
        "weight reads": layers * weights_s,
        "matrix products": layers * (matmul_s - weights_s),
        "chunk attention": layers * work.chunk_attention_s,
        "decode attention": layers * work.decode_attention_s,
        "collectives": layers * comm_s,
        "KVP merge": layers * merge_s,
        "stage hand-over": 0.0 if last else time.hop_latency_s + work.tokens * time.hop_token_s,
        "head": table_s(time.head, work.samples) if last else 0.0,
    }


def capacity(
    asked: Asked,
    parallelism: Parallelism,
    time: StepTime,
    sizes: tuple[tuple[int, int], ...],
    *,
    pool_tokens: int,
    shard_tokens: int,
    page_tokens: int = 0,
) -> Capacity:
    """Rate at which prefill and decode fill the steps, the pages or the sequence limit.

    sizes         (until_tokens, chunk_tokens) of the chunk schedule
    pool_tokens   KV tokens that one group can hold
    shard_tokens  tokens of one request in one group
    page_tokens   of the pool; half a page of each request stays empty
    """
    p = parallelism
    need = demand(asked, time, sizes, shard_tokens)
    kinds = {  # one stage of each kind is enough: equal stages take equal time
        (layers, stage == time.stages - 1): stage for stage, layers in enumerate(time.stage_layers)
    }
    counts = [
        sum(
            (layers, stage == time.stages - 1) == kind
            for stage, layers in enumerate(time.stage_layers)
        )
        for kind in kinds
    ]

    def step(requests: float) -> tuple[float, float, dict[str, float]]:
        terms = [
            stage_terms(time, stage, Work().plus(need.work, requests)) for stage in kinds.values()
        ]
        sums = [sum(each.values()) for each in terms]
        whole = sum(count * each for count, each in zip(counts, sums, strict=True))
        slowest = max(range(len(sums)), key=sums.__getitem__)
        return whole, sums[slowest], terms[slowest]

    budget_s = asked.scheduler.step_budget_s / (1 + time.margin)  # the packer keeps the margin
    least = asked.scheduler.min_chunk_tokens / need.prompt_rows  # and always makes some progress
    low, high = least, max(2 * least, 1.0)
    while step(high)[0] < budget_s:
        high *= 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if step(middle)[0] <= budget_s else (low, middle)
    step_s, slowest_s, terms = step(low)
    rps = p.kvp * low / slowest_s
    bound_by = max(terms, key=lambda name: terms[name])
    # KV held x time, a request: an answer token takes a whole step; a chunk of the schedule, made
    # for the idle budget, takes several of the smaller budget, which follow at the slowest pace
    steps_per_chunk = max(asked.scheduler.idle_budget_s / step_s, 1.0)
    held = need.decode_kv_tokens * step_s
    held += need.prefill_kv_tokens * steps_per_chunk * slowest_s
    held += page_tokens / 2 * need.output_tokens * step_s
    limits = {
        bound_by: rps,
        "KV memory": pool_tokens * p.kvp / held,
        "sequence limit": asked.limits.sequences / (need.output_tokens * step_s),
    }
    bound_by = min(limits, key=lambda name: limits[name])
    rps = limits[bound_by]
    return Capacity(
        rps=rps * p.replicas,
        bound_by=bound_by,
        step_s=step_s,
        decoding=rps * need.output_tokens * step_s,
        terms=terms,
    )

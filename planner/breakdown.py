"""Where the time of a plan's typical steps goes, op by op, beside the speed of light.

The speed of light of an op is the longest of FLOPs / peak, bytes / bandwidth and bytes / link, at
100 % of the datasheet and nothing else: no efficiency, no latency, no launch. A prediction below it
would be wrong, which is one of the self-checks.
"""

from dataclasses import dataclass

from planner.cost import attention_peak, peak
from planner.memory import activation_dtype
from planner.placement import slowest_link
from planner.price import Priced
from planner.text import tokens_text
from plans.model import DTYPE_BYTES
from plans.steptime import StepTime, table_s


@dataclass(frozen=True, kw_only=True, slots=True)
class OpRow:
    """One op of one step, summed over layers and stages."""

    step: str
    op: str
    seconds: float
    light_s: float
    """Speed of light."""
    bound: str
    """What sets it: compute, memory, link or host."""
    share: float
    """Of the step's predicted time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """A step with one chunk or one decode in it, seen in its slowest group."""

    name: str
    tokens: int
    pairs: float
    keys: int
    """Keys read in the group looked at."""
    groups: int
    decode: bool


def breakdown(priced: Priced) -> tuple[OpRow, ...]:
    """Rows of a new prompt's first chunk, of the last chunk of the longest one, and of decodes."""
    context, shard = priced.world.limits.context_tokens, priced.shard_tokens
    groups = (context - 1) // shard + 1
    first = min(priced.sizes[0][1], context)
    last = min(priced.sizes[-1][1], context)
    behind = min(context - last, shard)
    own_pairs = last * (last + 1) / 2 if groups == 1 else 0
    decodes = [length for length in (8192, context) if length <= context]
    steps = [
        _Step(
            name=f"chunk of {first} of a new prompt",
            tokens=first,
            pairs=first * (first + 1) / 2,
            keys=first,
            groups=1,
            decode=False,
        ),
        _Step(
            name=f"chunk of {last} at {tokens_text(context)}",
            tokens=last,
            pairs=last * behind + own_pairs,
            keys=behind + (last if groups == 1 else 0),
            groups=groups,
            decode=False,
        ),
    ]
    steps += [
        _Step(
            name=f"decode at {tokens_text(length)}",
            tokens=1,
            pairs=min(length, shard),
            keys=min(length, shard),
            groups=(length - 1) // shard + 1,
            decode=True,
        )
        for length in sorted(set(decodes))
    ]
    return tuple(row for step in steps for row in _rows(priced, step))


def _rows(priced: Priced, step: _Step) -> list[OpRow]:
    times = _seconds(priced.time, step)
    light = _light(priced, step)
    whole = sum(times.values())
    return [
        OpRow(
            step=step.name,
            op=op,
            seconds=seconds,
            light_s=light[op][0],
            bound=light[op][1],
            share=seconds / whole,
        )
        for op, seconds in times.items()
        if seconds > 0
    ]


def _seconds(time: StepTime, step: _Step) -> dict[str, float]:
    """The terms of plans/steptime.py over all layers and stages; their sum is step_s."""
    layers = sum(time.stage_layers)
    attention_s = max(step.pairs * time.pair_s, step.keys * time.key_s)
    if step.decode:
        attention_s = step.keys * time.decode_key_s + time.decode_sequence_s
    merged = step.tokens * (step.groups - 1)
    merge_s = time.merge_latency_s + merged * time.merge_token_s if merged else 0.0
    hops = time.stages - 1
    return {
        "launch": time.stages * time.overhead_s,
        "matrix products": layers * table_s(time.matmul, step.tokens),
        "attention": layers * attention_s,
        "collectives": layers * (time.comm_latency_s + step.tokens * time.comm_token_s),
        "KVP merge": layers * merge_s,
        "stage hand-over": hops * (time.hop_latency_s + step.tokens * time.hop_token_s),
        "head": table_s(time.head, 1),
    }


def _light(priced: Priced, step: _Step) -> dict[str, tuple[float, str]]:
    world, p = priced.world, priced.candidate.parallelism
    model, device, tp = world.model, world.device, p.tp
    size = DTYPE_BYTES[activation_dtype(model)]
    weight = DTYPE_BYTES[model.weight_dtype]
    gemm_peak, bandwidth = peak(world, model.weight_dtype), device.memory_bandwidth_bytes_per_s
    bytes_per_s = {
        axis: link.bandwidth_bytes_per_s
        for axis in ("tp", "kvp", "spp")
        if (link := slowest_link(world.topology, p, priced.placement, axis)) is not None
    }

    def longest(flops: float, read: float, peak_flops: float = gemm_peak) -> tuple[float, str]:
        compute_s, memory_s = flops / peak_flops, read / bandwidth
        return max((compute_s, "compute"), (memory_s, "memory"))

    def sent(axis: str, volume: float) -> tuple[float, str]:
        return (volume / bytes_per_s[axis] if axis in bytes_per_s else 0.0, "link")

    experts = model.experts
    active = model.active_layer_parameters / tp
    read = active
    if experts is not None:  # those of the tokens, as if each visited others than the one before
        one = 3 * model.hidden * experts.ffn / tp * (1 - model.dense_layers / model.layers)
        read += (experts.visited(step.tokens) - experts.per_token) * one
    heads = model.heads / tp
    head = model.embedding_parameters / tp
    key_bytes = model.rank_kv_elements(tp) * DTYPE_BYTES[world.kv_dtype]
    row = model.hidden * size
    width = model.head_dim if model.latent is None else model.latent.value_dim
    attention = longest(
        model.layers * step.pairs * heads * model.pair_flops,
        model.layers * step.keys * key_bytes,
        attention_peak(world),
    )
    return {
        "launch": (0.0, "host"),
        "matrix products": longest(
            2 * model.layers * active * step.tokens, model.layers * read * weight
        ),
        "attention": attention,
        "collectives": sent("tp", model.layers * 4 * (tp - 1) / tp * row * step.tokens),
        "KVP merge": sent(
            "kvp",
            model.layers * step.tokens * (step.groups - 1) * heads * (width * size + 4),
        ),
        "stage hand-over": sent("spp", (p.spp - 1) * row * step.tokens),
        "head": longest(2 * head, head * size, peak(world, activation_dtype(model))),
    }

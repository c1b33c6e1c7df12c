"""Coefficients of the step-time formula: from a device's profile, or from its data sheet.

A profile (planner/measured.py) answers where the device was measured. What it does not hold is a
roofline, without a measurement in it: each term is max(FLOPs / reachable peak, bytes / reachable
bandwidth), or latency + bytes / link, for one layer of one rank; shares that kernels reach come
from the device's file. The formula itself is in plans/steptime.py. T tokens of the step, t = tp;
"local" means of one rank.

    matmul(T)   max(2 P T / peak, P x bytes / bandwidth) + row-wise bytes x T / bandwidth
                with experts 2 P follows the experts of one token, P x bytes the experts visited
    pair_s      4 x local heads x head_dim / peak                 QK and PV, causal pairs only;
                keys in fp8 at 0.44 of the rate, as measured      (chunk_rate)
                latent attention: on the compressed vectors, 2 (2 kv_rank + rope_dim) a head
    key_s       one tile of query rows a KV head, or K and V read once, whichever is longer
    comm        2 all-reduces: 2 (latency + 2 (t - 1) / t x hidden x bytes x T / link)
    merge       latency + local heads x (head_dim x bytes + 4) / link per token and further group
    hop         latency + hidden x bytes x T / link
    head(B)     max(2 P B / peak, P x bytes / bandwidth) + logits gathered and sampled;
                in the activations' dtype, also where the layers' weights are in fp8
"""

from collections.abc import Callable

from planner.measured import (
    FORMULA_ERROR,
    FORMULA_MARGIN,
    FP8_CHUNK_TIME,
    TERMS,
    Links,
    Measured,
    measured,
    prepared,
    usable,
)
from planner.memory import (
    activation_dtype,
    local_kv_heads,
    mlp_width,
    partial_width,
    qkv_width,
)
from planner.placement import slowest_link
from planner.space import Candidate
from planner.world import World
from plans.errors import Infeasible
from plans.mesh import Parallelism
from plans.model import DTYPE_BYTES
from plans.plan import Placement
from plans.steptime import Knot, StepTime
from plans.topology import Link

MARGIN = FORMULA_MARGIN
"""The packer's over-estimate while nothing was measured."""
ERROR_BAND = FORMULA_ERROR
"""A roofline with assumed efficiencies: do not read it more tightly before a profile exists."""
TILE_ROWS = {"cpu": 1, "cuda": 64}
"""Query rows that cost as much as one: the smallest tensor-core tile on a GPU (wgmma m64)."""
ALL_REDUCES = 2
"""Collectives of a layer: after the attention output and after the MLP."""

FP8_RATE_NOTE = (
    f"chunks over keys in fp8 at 1/{FP8_CHUNK_TIME} of attention's rate, as measured on an H100"
)
PROVENANCE = dict.fromkeys(TERMS, "formula")


class _Rank:
    """What one rank computes, reads and sends; the device's reachable rates."""

    def __init__(self, world: World, parallelism: Parallelism) -> None:
        model, device, tp = world.model, world.device, parallelism.tp
        self.model = model
        self.tp = tp
        self.hidden = model.hidden
        self.heads = model.heads // tp
        self.kv_heads = 1 if model.latent else local_kv_heads(model, tp)
        self.vocab = model.vocab
        self.weight_size = DTYPE_BYTES[model.weight_dtype]
        self.size = DTYPE_BYTES[activation_dtype(model)]
        self.kv_size = DTYPE_BYTES[world.kv_dtype]
        self.bandwidth = device.memory_bandwidth_bytes_per_s * device.memory_efficiency
        self.matmul_peak = peak(world, model.weight_dtype) * device.gemm_efficiency
        self.head_peak = peak(world, activation_dtype(model)) * device.gemm_efficiency
        self.attention_peak = attention_peak(world) * device.attention_efficiency

    @property
    def key_bytes(self) -> int:
        """K and V of one token in one layer."""
        return self.model.rank_kv_elements(self.tp) * self.kv_size

    @property
    def pair_flops(self) -> int:
        """FLOPs of one pair in one head; latent attention works on the compressed vectors."""
        latent = self.model.latent
        if latent is None:
            return self.model.pair_flops
        return 2 * (2 * latent.kv_rank + latent.rope_dim)

    def product_s(self, parameters: float, rows: int, read: float | None = None) -> float:
        """A matrix product of `rows` rows: compute or weights, whichever takes longer.

        read  parameters that are read, where a row is not multiplied with all of them
        """
        compute_s = 2 * parameters * rows / self.matmul_peak
        read = parameters if read is None else read
        return max(compute_s, read * self.weight_size / self.bandwidth)

    def layer_s(self, rows: int) -> float:
        """Matrix products of a layer, the mean one where layers differ."""
        model, experts = self.model, self.model.experts
        attention = model.attention_parameters(self.tp)
        if experts is None:
            return self.product_s(attention + model.mlp_parameters(0, self.tp), rows)
        last = model.layers - 1
        share = model.dense_layers / model.layers
        all_s = self.product_s(attention, rows)
        if share:
            all_s += share * self.product_s(model.mlp_parameters(0, self.tp), rows)
        if share < 1:
            one = 3 * model.hidden * experts.ffn / self.tp
            idle = (experts.count - experts.visited(rows)) * one
            all_s += (1 - share) * self.product_s(
                model.active_mlp_parameters(last, self.tp),
                rows,
                model.mlp_parameters(last, self.tp) - idle,
            )
        return all_s

    def row_s(self) -> float:
        """Row-wise work of one token in one layer.

        Two residual adds with norm (read stream and output, write stream and norm), q, k and v
        rotated and written, gate and up read and their product written.
        """
        if self.model.latent is None:
            qkv = (self.heads + 2 * self.kv_heads) * self.model.head_dim
        else:
            qkv = qkv_width(self.model, self.tp)
        wide = 8 * self.hidden + 2 * qkv + 3 * mlp_width(self.model, self.tp)
        return self.size * wide / self.bandwidth

    def head_s(self, rows: int) -> float:
        """The vocabulary projection of `rows` rows."""
        parameters = self.hidden * self.vocab // self.tp
        compute_s = 2 * parameters * rows / self.head_peak
        return max(compute_s, parameters * self.size / self.bandwidth)

    def ridge(self) -> int:
        """Rows at which a layer's product turns from weight reads to compute."""
        return round(self.matmul_peak * self.weight_size / (2 * self.bandwidth))

    def head_ridge(self) -> int:
        """Rows at which the head does."""
        return round(self.head_peak * self.size / (2 * self.bandwidth))


def peak(world: World, dtype: str, flag: str = "--weight-dtype") -> float:
    """Datasheet FLOP/s of a dtype; raises Infeasible("dtype") where the device has none.

    flag  what changes the dtype; both dtype flags take bf16, which nearly every device has
    """
    peaks = world.device.peak_flops_per_s
    if dtype not in peaks:
        raise Infeasible(
            "dtype",
            f"{world.model.name} computes in {dtype}",
            f"{world.device.name} has {', '.join(sorted(peaks))}",
            f"{flag} bf16" if "bf16" in peaks else "a device whose file lists that dtype",
        )
    return peaks[dtype]


def attention_peak(world: World) -> float:
    """FLOP/s of attention's products: keys in fp8 are cast to the activations' dtype before."""
    if world.kv_dtype == "fp8":
        return peak(world, activation_dtype(world.model))
    return peak(world, world.kv_dtype, "--kv-dtype")


def chunk_rate(world: World) -> float:
    """Share of attention's rate that chunks reach: less over keys in fp8, whose cast goes through
    shared memory in every tile (FP8_CHUNK_TIME, measured on an H100)."""
    slow = world.kv_dtype == "fp8" and world.device.kind == "cuda"
    return 1 / FP8_CHUNK_TIME if slow else 1.0


def step_time(world: World, candidate: Candidate, placement: Placement) -> StepTime:
    """The formula's coefficients for one candidate."""
    return costed(world, candidate, placement).time


def costed(world: World, candidate: Candidate, placement: Placement) -> Measured:
    """The step time of a candidate with what it rests on: provenance, error band, notes."""
    base = roofline(world, candidate, placement)
    ready = prepared(world.device.name)
    if ready is None or not usable(world):
        slow = (FP8_RATE_NOTE,) if chunk_rate(world) < 1 else ()
        return Measured(time=base, provenance=PROVENANCE, error_band=ERROR_BAND, notes=slow)
    p = candidate.parallelism
    tp, kvp, spp = (
        slowest_link(world.topology, p, placement, axis) for axis in ("tp", "kvp", "spp")
    )
    return measured(ready, world, p, base, Links(tp=tp, kvp=kvp, spp=spp))


def roofline(world: World, candidate: Candidate, placement: Placement) -> StepTime:
    """The coefficients by the data sheet alone."""
    p = candidate.parallelism
    rank = _Rank(world, p)
    tp_link = slowest_link(world.topology, p, placement, "tp")
    kvp_link = slowest_link(world.topology, p, placement, "kvp")
    spp_link = slowest_link(world.topology, p, placement, "spp")
    gather = (rank.tp - 1) / rank.tp  # share of a vector that a rank sends in one half of a ring
    row = rank.hidden * rank.size
    width = partial_width(world.model)
    per_group = rank.heads * (width * rank.size + 4)  # partial output and its lse
    tile_flops = TILE_ROWS[world.device.kind] * rank.kv_heads * rank.pair_flops
    key_read_s = rank.key_bytes / rank.bandwidth
    few_bytes = world.model.latent or world.kv_dtype == "fp8"  # many heads, one key; half the bytes
    decode_flops = rank.heads * rank.pair_flops if few_bytes else 0
    chunk_peak = rank.attention_peak * chunk_rate(world)
    return StepTime(
        source="roofline",
        stage_layers=candidate.stage_layers,
        overhead_s=world.device.step_overhead_s,
        matmul=_table(
            world.scheduler.max_step_tokens,
            rank.ridge(),
            lambda rows: rank.layer_s(rows) + rows * rank.row_s(),
        ),
        pair_s=rank.heads * rank.pair_flops / chunk_peak,
        key_s=max(key_read_s, tile_flops / chunk_peak),
        decode_key_s=max(key_read_s, decode_flops / rank.attention_peak),
        decode_sequence_s=2 * rank.heads * width * rank.size / rank.bandwidth,
        comm_latency_s=ALL_REDUCES * _latency(tp_link),
        comm_token_s=ALL_REDUCES * 2 * gather * row * _byte_s(tp_link),
        merge_latency_s=_latency(kvp_link),
        merge_token_s=per_group * _byte_s(kvp_link),
        hop_latency_s=_latency(spp_link),
        hop_token_s=row * _byte_s(spp_link),
        head=_table(
            world.limits.sequences,
            rank.head_ridge(),
            lambda rows: _head_s(rank, rows, tp_link),
        ),
        margin=MARGIN,
    )


def _head_s(rank: _Rank, rows: int, link: Link | None) -> float:
    """Vocabulary projection, gather of fp32 logits, and one pass over them to sample."""
    logits = 4 * rows * rank.vocab
    gather_s = _latency(link) + logits * (rank.tp - 1) / rank.tp * _byte_s(link)
    return rank.head_s(rows) + gather_s + logits / rank.bandwidth


def _latency(link: Link | None) -> float:
    return link.latency_s if link else 0.0


def _byte_s(link: Link | None) -> float:
    return 1 / (link.bandwidth_bytes_per_s * link.efficiency) if link else 0.0


def _table(most: int, ridge: int, seconds: Callable[[int], float]) -> tuple[Knot, ...]:
    """Knots at the powers of two up to `most` and past it, and at the kink."""
    rows = {1 << power for power in range(most.bit_length() + 1)}
    rows |= {row for row in (ridge, ridge + 1) if 1 <= row <= max(rows)}
    return tuple(Knot(at=row, seconds=seconds(row)) for row in sorted(rows))

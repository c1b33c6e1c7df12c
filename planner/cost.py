"""Coefficients of the step-time formula from datasheet figures: a roofline, no measurement in it.

Every term is max(FLOPs / reachable peak, bytes / reachable bandwidth), or latency + bytes / link,
for one layer of one rank; shares that kernels reach come from the device's file. The formula itself
is in plans/steptime.py. T tokens of the step, t = tp; "local" means of one rank.

    matmul(T)   max(2 P T / peak, P x bytes / bandwidth) + row-wise bytes x T / bandwidth
    pair_s      4 x local heads x head_dim / peak                 QK and PV, causal pairs only
    key_s       one tile of query rows a KV head, or K and V read once, whichever is longer
    comm        2 all-reduces: 2 (latency + 2 (t - 1) / t x hidden x bytes x T / link)
    merge       latency + local heads x (head_dim x bytes + 4) / link per token and further group
    hop         latency + hidden x bytes x T / link
    head(B)     max(2 P B / peak, P x bytes / bandwidth) + logits gathered and sampled
"""

from collections.abc import Callable

from planner.memory import activation_dtype, local_kv_heads
from planner.placement import slowest_link
from planner.space import Candidate
from planner.world import World
from plans.errors import Infeasible
from plans.mesh import Parallelism
from plans.model import DTYPE_BYTES
from plans.plan import Placement
from plans.steptime import Knot, StepTime
from plans.topology import Link

MARGIN = 0.1
"""The packer's over-estimate while nothing was measured."""
ERROR_BAND = 0.3
"""A roofline with assumed efficiencies: do not read it more tightly before a profile exists."""
TILE_ROWS = {"cpu": 1, "cuda": 64}
"""Query rows that cost as much as one: the smallest tensor-core tile on a GPU (wgmma m64)."""
ALL_REDUCES = 2
"""Collectives of a layer: after the attention output and after the MLP."""

PROVENANCE = {
    "matmul": "formula",
    "attention": "formula",
    "collectives": "formula",
    "merge": "formula",
    "hop": "formula",
    "head": "formula",
    "overhead": "formula",
}


class _Rank:
    """What one rank computes, reads and sends; the device's reachable rates."""

    def __init__(self, world: World, parallelism: Parallelism) -> None:
        model, device, tp = world.model, world.device, parallelism.tp
        self.tp = tp
        self.hidden = model.hidden
        self.head_dim = model.head_dim
        self.heads = model.heads // tp
        self.kv_heads = local_kv_heads(model, tp)
        self.ffn = model.ffn // tp
        self.vocab = model.vocab
        self.weight_size = DTYPE_BYTES[model.weight_dtype]
        self.size = DTYPE_BYTES[activation_dtype(model)]
        self.kv_size = DTYPE_BYTES[world.kv_dtype]
        self.bandwidth = device.memory_bandwidth_bytes_per_s * device.memory_efficiency
        self.matmul_peak = peak(world, model.weight_dtype) * device.gemm_efficiency
        self.attention_peak = peak(world, world.kv_dtype) * device.attention_efficiency

    @property
    def layer_parameters(self) -> int:
        qkv = self.hidden * (self.heads + 2 * self.kv_heads) * self.head_dim
        return qkv + self.heads * self.head_dim * self.hidden + 3 * self.hidden * self.ffn

    @property
    def key_bytes(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.kv_size

    def product_s(self, parameters: int, rows: int) -> float:
        """A matrix product of `rows` rows: compute or weights, whichever takes longer."""
        compute_s = 2 * parameters * rows / self.matmul_peak
        return max(compute_s, parameters * self.weight_size / self.bandwidth)

    def row_s(self) -> float:
        """Row-wise work of one token in one layer.

        Two residual adds with norm (read stream and output, write stream and norm), q, k and v
        rotated and written, gate and up read and their product written.
        """
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return self.size * (8 * self.hidden + 2 * qkv + 3 * self.ffn) / self.bandwidth

    def ridge(self) -> int:
        """Rows at which a product turns from weight reads to compute."""
        return round(self.matmul_peak * self.weight_size / (2 * self.bandwidth))


def peak(world: World, dtype: str) -> float:
    """Datasheet FLOP/s of a dtype; raises Infeasible("dtype") where the device has none."""
    peaks = world.device.peak_flops_per_s
    if dtype not in peaks:
        raise Infeasible(
            "dtype",
            f"{world.model.name} computes in {dtype}",
            f"{world.device.name} has {', '.join(sorted(peaks))}",
            "a device whose file lists that dtype",
        )
    return peaks[dtype]


def step_time(world: World, candidate: Candidate, placement: Placement) -> StepTime:
    """The formula's coefficients for one candidate, all by roofline."""
    p = candidate.parallelism
    rank = _Rank(world, p)
    tp_link = slowest_link(world.topology, p, placement, "tp")
    kvp_link = slowest_link(world.topology, p, placement, "kvp")
    spp_link = slowest_link(world.topology, p, placement, "spp")
    gather = (rank.tp - 1) / rank.tp  # share of a vector that a rank sends in one half of a ring
    row = rank.hidden * rank.size
    per_group = rank.heads * (rank.head_dim * rank.size + 4)  # partial output and its lse
    tile_flops = 4 * TILE_ROWS[world.device.kind] * rank.kv_heads * rank.head_dim
    return StepTime(
        source="roofline",
        stage_layers=candidate.stage_layers,
        overhead_s=world.device.step_overhead_s,
        matmul=_table(
            world.scheduler.max_step_tokens,
            rank.ridge(),
            lambda rows: rank.product_s(rank.layer_parameters, rows) + rows * rank.row_s(),
        ),
        pair_s=4 * rank.heads * rank.head_dim / rank.attention_peak,
        key_s=max(rank.key_bytes / rank.bandwidth, tile_flops / rank.attention_peak),
        decode_key_s=rank.key_bytes / rank.bandwidth,
        decode_sequence_s=2 * rank.heads * rank.head_dim * rank.size / rank.bandwidth,
        comm_latency_s=ALL_REDUCES * _latency(tp_link),
        comm_token_s=ALL_REDUCES * 2 * gather * row * _byte_s(tp_link),
        merge_latency_s=_latency(kvp_link),
        merge_token_s=per_group * _byte_s(kvp_link),
        hop_latency_s=_latency(spp_link),
        hop_token_s=row * _byte_s(spp_link),
        head=_table(
            world.limits.sequences,
            rank.ridge(),
            lambda rows: _head_s(rank, rows, tp_link),
        ),
        margin=MARGIN,
    )


def _head_s(rank: _Rank, rows: int, link: Link | None) -> float:
    """Vocabulary projection, gather of fp32 logits, and one pass over them to sample."""
    parameters = rank.hidden * rank.vocab // rank.tp
    logits = 4 * rows * rank.vocab
    gather_s = _latency(link) + logits * (rank.tp - 1) / rank.tp * _byte_s(link)
    return rank.product_s(parameters, rows) + gather_s + logits / rank.bandwidth


def _latency(link: Link | None) -> float:
    return link.latency_s if link else 0.0


def _byte_s(link: Link | None) -> float:
    return 1 / (link.bandwidth_bytes_per_s * link.efficiency) if link else 0.0


def _table(most: int, ridge: int, seconds: Callable[[int], float]) -> tuple[Knot, ...]:
    """Knots at the powers of two up to `most` and past it, and at the kink."""
    rows = {1 << power for power in range(most.bit_length() + 1)}
    rows |= {row for row in (ridge, ridge + 1) if 1 <= row <= max(rows)}
    return tuple(Knot(at=row, seconds=seconds(row)) for row in sorted(rows))

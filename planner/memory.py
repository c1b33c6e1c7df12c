"""Bytes on the rank that holds most, and the KV pages that the rest makes room for.

    capacity >= reserved + weights + activations + KV of one request at the context limit

Weights are sharded over tp, replicated over kvp; KV heads are replicated once tp exceeds them. The
embedding is on the first stage, the head on the last, a tied matrix on both. Activations follow the
largest step (scheduler.max_step_tokens), never the prompt, but for the partial results of attention
whose keys are cut in pieces: about the square root of the context (planner/attention_work.py).

What CUDA graphs hold is a part of reserved_bytes: GRAPHS_BYTES of it on the catalog's devices of
80 GB and more. Where a model's own buffers for them are larger than that, the rest counts among the
activations.
"""

from dataclasses import dataclass
from functools import lru_cache

from planner.attention_work import LargestStep, partials_bytes
from planner.space import Candidate, Stages
from planner.world import World
from plans.errors import Infeasible
from plans.model import DTYPE_BYTES, Model
from plans.plan import Kv, Memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Memory of the worst rank and the KV pool that follows from it."""

    memory: Memory
    kv: Kv

    @property
    def pool_tokens(self) -> int:
        """KV tokens that one KVP group holds."""
        return self.kv.pages_per_rank * self.kv.page_tokens


def rank_weights_bytes(model: Model, candidate: Candidate) -> int:
    """Weights of the rank that holds most."""
    return _most_weights_bytes(model, candidate.stages, candidate.parallelism.tp)


@lru_cache(maxsize=4096)
def _most_weights_bytes(model: Model, stages: Stages, tp: int) -> int:
    # a search asks for the same cut with every number of groups and replicas
    return max(stage_weights_bytes(model, stages, stage, tp) for stage in range(len(stages)))


def stage_weights_bytes(model: Model, stages: Stages, stage: int, tp: int) -> int:
    """Weights of a rank of one stage."""
    last = len(stages) - 1
    ends = (stage == 0) + (stage == last)  # embedding, head
    if stage == 0 == last and model.tie_embeddings:
        ends = 1
    norm = model.hidden if stage == last else 0
    matrices = ends * (model.embedding_parameters // tp)
    first, end = stages[stage]
    ends_bytes = (matrices + norm) * DTYPE_BYTES[model.plain_dtype]
    return model.stage_bytes(first, end, tp) + ends_bytes


def local_kv_heads(model: Model, tp: int) -> int:
    """KV heads of one rank; above tp = kv_heads each rank keeps one whole head."""
    return max(model.kv_heads // tp, 1)


def qkv_width(model: Model, tp: int) -> int:
    """Numbers of q, k, v and the attention output of one token on one rank."""
    heads = model.heads // tp
    if model.latent is None:
        return (2 * heads + 2 * local_kv_heads(model, tp)) * model.head_dim
    latent = model.latent  # queries and outputs stand in the latent space, where attention is done
    wide = 2 * latent.kv_rank + latent.rope_dim + model.head_dim + latent.value_dim
    return heads * wide + latent.kv_rank + latent.rope_dim + (latent.q_rank or 0)


def mlp_width(model: Model, tp: int) -> int:
    """Numbers of the gate of one token on one rank; with experts of all that it visits."""
    dense = model.ffn if model.dense_layers else 0
    if model.experts is None:
        return dense // tp
    experts = model.experts
    return max(dense, experts.per_token * experts.ffn + experts.shared_ffn) // tp


def partial_width(model: Model) -> int:
    """Numbers of one head's partial attention."""
    return model.head_dim if model.latent is None else model.latent.kv_rank


def activation_dtype(model: Model) -> str:
    """What travels between the layers."""
    return model.plain_dtype


GRAPHS_BYTES = 1 << 30
"""What CUDA graphs may hold, as the devices of the catalog set aside in reserved_bytes: assumed."""
GRAPH_TOKENS, GRAPH_SEQUENCES = 2048, 256
"""The largest recorded step (runtime/parallel/pieces.py) and most sequences of recorded decodes
(runtime/parallel/graphs.py), which are all that several ranks record (stage_graphs.py there)."""
GRAPH_NUMBERS = 5 + 2 + 1
"""Numbers of 8 bytes that stand there for each sequence: its step's, and its tokens drawn."""


def graph_buffers_bytes(world: World, candidate: Candidate, context_tokens: int) -> int:
    """What recorded steps hold: they share one pool of the buffers of the largest, and beside it
    are the logits, page tables and, of several ranks, hidden states and shares of attention.

    The driver's record of their kernels comes on top.
    """
    model, p = world.model, candidate.parallelism
    sequences = min(GRAPH_SEQUENCES, world.limits.sequences)
    pages = shard_of(context_tokens, candidate.groups, world.page_tokens) // world.page_tokens
    row = 4 * (pages + 16) + 8 * GRAPH_NUMBERS  # rows of tables end at a multiple of 16
    if p.ranks_per_replica == 1:
        tokens = min(GRAPH_TOKENS, world.scheduler.max_step_tokens)
    else:
        tokens = sequences
        size = DTYPE_BYTES[activation_dtype(model)]
        row += 4 * model.vocab  # gathered logits, and a copy of them outside the pool
        row += size * model.hidden if p.spp > 1 else 0
        row += (model.heads // p.tp) * (size * partial_width(model) + 4) if p.kvp > 1 else 0
    whole = tokens * _row_bytes(world, candidate) + sequences * row
    return whole + _logits_bytes(world, candidate, sequences)


def graphs_beyond_bytes(world: World, candidate: Candidate, context_tokens: int) -> int:
    """What the buffers of recorded steps take beyond GRAPHS_BYTES; nothing where none is."""
    if world.device.compute_capability is None:
        return 0
    return max(graph_buffers_bytes(world, candidate, context_tokens) - GRAPHS_BYTES, 0)


def attention_partials_bytes(world: World, candidate: Candidate, context_tokens: int) -> int:
    """Most that one layer's attention holds of partial results; 0 without our kernels for GPUs.

    Chunks beyond the least one keep the longer of the step budgets (runtime/scheduler/pack.py), and
    no device does more in that time than its data sheet says.
    """
    model, p, how = world.model, candidate.parallelism, world.scheduler
    if world.device.compute_capability is None or model.latent is not None:
        return 0
    peaks = world.device.peak_flops_per_s
    layer_s = max(how.idle_budget_s, how.step_budget_s) / model.layers
    step = LargestStep(
        keys=shard_of(context_tokens, candidate.groups, world.page_tokens),
        tokens=how.max_step_tokens,
        sequences=world.limits.sequences,
        least_tokens=how.min_chunk_tokens,
        products=layer_s * peaks.get(activation_dtype(model), max(peaks.values())),
        read_bytes=layer_s * world.device.memory_bandwidth_bytes_per_s,
        hopper=world.device.compute_capability == "9.0" and world.kv_dtype != "fp8",
    )
    heads = (model.heads // p.tp, local_kv_heads(model, p.tp), model.head_dim)
    return partials_bytes(heads, step)


HELD_LOGITS = 1 << 24
"""Logits, or numbers of keys, that attention in torch holds at once."""


def attention_copies_bytes(world: World, candidate: Candidate, context_tokens: int) -> int:
    """What attention holds inside on a CPU, where torch computes it; 0 on GPUs.

    Keys and values of a sequence, or of decodes that share a batch, and what they become in fp32;
    logits; queries and results in fp32 (codegen/kernels/paged_attention/scratch.py).
    """
    model, tokens = world.model, world.scheduler.max_step_tokens
    if "cpu" not in world.topology.device.lower() or model.latent is not None:
        return 0
    heads, kv_heads = (
        model.heads // candidate.parallelism.tp,
        local_kv_heads(model, candidate.parallelism.tp),
    )
    keys = shard_of(context_tokens, candidate.groups, world.page_tokens)
    wide = kv_heads * model.head_dim
    logits = min(max(HELD_LOGITS, heads * keys), tokens * heads * keys)
    chunk = 16 * keys * wide + 4 * logits + 24 * tokens * heads * model.head_dim
    sequences = min(world.limits.sequences, tokens)
    batch = min(max(HELD_LOGITS // max(heads, wide), keys), sequences * keys)
    decode = batch * (16 * wide + 4 * heads + 9) + 16 * sequences * heads * model.head_dim
    return max(chunk, decode) + tokens * min(tokens, HELD_LOGITS // tokens) + 40 * tokens * heads


def activations_bytes(world: World, candidate: Candidate, context_tokens: int | None = None) -> int:
    """Live buffers of the largest step.

    Residual stream, its norm, one output and one copy in flight; q, k, v and the attention output;
    gate, up and their product; partial attention of the other KVP groups in fp32, and of pieces of
    keys, or what torch copies of them; fp32 logits of all sampled sequences, gathered over tp, and
    the shard they come from; what buffers of CUDA graphs take beyond their part of reserved_bytes.

    context_tokens  the limit on a request's context where it is not the world's
    """
    context = context_tokens or world.limits.context_tokens
    return (
        world.scheduler.max_step_tokens * _row_bytes(world, candidate)
        + _logits_bytes(world, candidate, world.limits.sequences)
        + attention_partials_bytes(world, candidate, context)
        + attention_copies_bytes(world, candidate, context)
        + graphs_beyond_bytes(world, candidate, context)
    )


def _row_bytes(world: World, candidate: Candidate) -> int:
    """Of one token of a step."""
    model, p = world.model, candidate.parallelism
    size = DTYPE_BYTES[activation_dtype(model)]
    row = size * (4 * model.hidden + qkv_width(model, p.tp) + 3 * mlp_width(model, p.tp))
    if p.kvp > 1:
        row += p.kvp * (model.heads // p.tp) * (4 * partial_width(model) + 4)
    return row


def _logits_bytes(world: World, candidate: Candidate, sequences: int) -> int:
    model = world.model
    return 4 * sequences * (model.vocab + model.vocab // candidate.parallelism.tp)


def page_bytes(world: World, candidate: Candidate) -> int:
    """Bytes of one KV page on a rank of the deepest stage."""
    tp, layers = candidate.parallelism.tp, max(candidate.stage_layers)
    return layers * world.model.rank_page_bytes(tp, world.page_tokens, world.kv_dtype)


def shard_tokens(world: World, groups: int) -> int:
    """Tokens of one request in one of the groups that hold it: its share, in whole pages."""
    return shard_of(world.limits.context_tokens, groups, world.page_tokens)


def shard_of(context_tokens: int, groups: int, page_tokens: int) -> int:
    """Tokens of a context in one of its groups, in whole pages."""
    share = -(-context_tokens // groups)
    return -(-share // page_tokens) * page_tokens


def footprint(world: World, candidate: Candidate) -> Footprint:
    """Memory by part; raises Infeasible("memory") where one request at the limit does not fit."""
    p = candidate.parallelism
    capacity = world.topology.device_memory_bytes
    reserved = world.device.reserved_bytes
    weights = rank_weights_bytes(world.model, candidate)
    activations = activations_bytes(world, candidate)
    room = capacity - reserved - weights - activations
    page = page_bytes(world, candidate)
    shard = shard_tokens(world, candidate.groups)
    fits = max(room, 0) // page
    if fits * world.page_tokens < shard:
        raise Infeasible(
            "memory",
            f"KV of {world.limits.context_tokens} tokens needs"
            f" {gigabytes(shard // world.page_tokens * page)} beside {gigabytes(weights)} of"
            f" weights, {gigabytes(activations)} of activations and {gigabytes(reserved)} reserved"
            f" on each of {p.ranks_per_replica} ranks ({candidate.label})",
            f"{gigabytes(max(room, 0))} of {gigabytes(capacity)} are free",
            f"--max-context {tokens_text(nearest)}"
            if (nearest := reachable_context(world, candidate)) >= 2
            else "",
        )
    useful = world.most_full_requests * (shard // world.page_tokens)
    pages = min(fits, useful)
    memory = Memory(
        capacity_bytes=capacity,
        weights_bytes=weights,
        activations_bytes=activations,
        reserved_bytes=reserved,
        kv_bytes=pages * page,
        free_bytes=room - pages * page,
    )
    kv = Kv(
        page_tokens=world.page_tokens,  # type: ignore[arg-type]  # one of the literals, see world.py
        dtype=world.kv_dtype,  # type: ignore[arg-type]
        pages_per_rank=pages,
        tokens_per_kvp_shard=shard,
    )
    return Footprint(memory=memory, kv=kv)


def holds(world: World, candidate: Candidate) -> bool:
    """Whether one request at the context limit fits the candidate."""
    page_context = world.page_tokens * candidate.groups
    pages = -(-world.limits.context_tokens // page_context)
    return _held_bytes(world, candidate, pages) <= _room_bytes(world, candidate)


def reachable_context(world: World, candidate: Candidate) -> int:
    """Longest context that fits the candidate, in whole pages; 0 where the weights alone do not."""
    room, page_context = _room_bytes(world, candidate), world.page_tokens * candidate.groups
    # what is left without a context is the most; longer ones take more, so halving finds the last
    low, high = 0, max(room - activations_bytes(world, candidate, 1), 0)
    high //= page_bytes(world, candidate)
    if high and _held_bytes(world, candidate, high) <= room:
        return high * page_context
    while high - low > 1:
        middle = (low + high) // 2
        fits = _held_bytes(world, candidate, middle) <= room
        low, high = (middle, high) if fits else (low, middle)
    return low * page_context


def _room_bytes(world: World, candidate: Candidate) -> int:
    """What weights and the device's own needs leave on the rank that holds most."""
    room = world.topology.device_memory_bytes - world.device.reserved_bytes
    return room - rank_weights_bytes(world.model, candidate)


def _held_bytes(world: World, candidate: Candidate, pages: int) -> int:
    """Pages of a request in each of its groups, and the buffers of steps at that context."""
    context = pages * world.page_tokens * candidate.groups
    return pages * page_bytes(world, candidate) + activations_bytes(world, candidate, context)


def gigabytes(size: float) -> str:
    """Decimal gigabytes, as datasheets count; megabytes below one."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def tokens_text(tokens: int) -> str:
    """Tokens as --max-context takes them, rounded down to what the suffix can say."""
    for suffix, unit in (("m", 1024 * 1024), ("k", 1024)):
        if tokens >= 16 * unit or (tokens >= unit and tokens % unit == 0):
            return f"{tokens // unit}{suffix}"
    return str(tokens)

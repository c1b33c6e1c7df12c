"""Bytes on the rank that holds most, and the KV pages that the rest makes room for.

    capacity >= reserved + weights + activations + KV of one request at the context limit

Weights are sharded over tp, replicated over kvp; KV heads are replicated once tp exceeds them. The
embedding is on the first stage, the head on the last, a tied matrix on both. Activations follow the
largest step (scheduler.max_step_tokens), never the prompt.
"""

from dataclasses import dataclass

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
    stages, tp = candidate.stages, candidate.parallelism.tp
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
    parameters = model.stage_parameters(first, end, tp) + matrices + norm
    return parameters * DTYPE_BYTES[model.weight_dtype]


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
    return "bf16" if model.weight_dtype == "fp8" else model.weight_dtype


def activations_bytes(world: World, candidate: Candidate) -> int:
    """Live buffers of the largest step.

    Residual stream, its norm, one output and one copy in flight; q, k, v and the attention output;
    gate, up and their product; partial attention of the other KVP groups in fp32; fp32 logits of
    all sampled sequences, gathered over tp, and the shard they come from.
    """
    model, p = world.model, candidate.parallelism
    size = DTYPE_BYTES[activation_dtype(model)]
    heads = model.heads // p.tp
    row = size * (4 * model.hidden + qkv_width(model, p.tp) + 3 * mlp_width(model, p.tp))
    if p.kvp > 1:
        row += p.kvp * heads * (4 * partial_width(model) + 4)
    logits = 4 * world.limits.sequences * (model.vocab + model.vocab // p.tp)
    return world.scheduler.max_step_tokens * row + logits


def page_bytes(world: World, candidate: Candidate) -> int:
    """Bytes of one KV page on a rank of the deepest stage."""
    tp, layers = candidate.parallelism.tp, max(candidate.stage_layers)
    return layers * world.model.rank_page_bytes(tp, world.page_tokens, world.kv_dtype)


def shard_tokens(world: World, groups: int) -> int:
    """Tokens of one request in one of the groups that hold it: its share, in whole pages."""
    share = -(-world.limits.context_tokens // groups)
    return -(-share // world.page_tokens) * world.page_tokens


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
            if (nearest := fits * world.page_tokens * candidate.groups) >= 2
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


def reachable_context(world: World, candidate: Candidate) -> int:
    """Longest context that fits the candidate, in whole pages; 0 where the weights alone do not."""
    room = world.topology.device_memory_bytes - world.device.reserved_bytes
    room -= rank_weights_bytes(world.model, candidate) + activations_bytes(world, candidate)
    pages = max(room, 0) // page_bytes(world, candidate)
    return pages * world.page_tokens * candidate.groups


def gigabytes(size: float) -> str:
    """Decimal gigabytes, as datasheets count; megabytes below one."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def tokens_text(tokens: int) -> str:
    """Tokens as --max-context takes them, rounded down to what the suffix can say."""
    for suffix, unit in (("m", 1024 * 1024), ("k", 1024)):
        if tokens >= 16 * unit or (tokens >= unit and tokens % unit == 0):
            return f"{tokens // unit}{suffix}"
    return str(tokens)

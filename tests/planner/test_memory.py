"""Memory: exact weights, monotone in everything, honest about what does not fit."""

import dataclasses
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, reject
from hypothesis import strategies as st
from msgspec import structs
from strategies_planner import worlds

from planner.catalog import load_device, load_model, load_workload, topology_for
from planner.memory import (
    GRAPH_SEQUENCES,
    GRAPH_TOKENS,
    GRAPHS_BYTES,
    activations_bytes,
    attention_partials_bytes,
    footprint,
    graph_buffers_bytes,
    graphs_beyond_bytes,
    holds,
    local_kv_heads,
    page_bytes,
    qkv_width,
    rank_weights_bytes,
    reachable_context,
    shard_tokens,
)
from planner.space import Candidate, candidates, cut_layers
from planner.world import make_world
from plans.errors import Infeasible
from plans.mesh import Parallelism
from plans.model import DTYPE_BYTES


def candidate(world, **degrees):
    parallelism = Parallelism(**degrees)
    return Candidate(
        parallelism=parallelism, stages=cut_layers(world.model.layers, parallelism.spp)
    )


def h100s(model, devices):
    """Of the catalog."""
    device = load_device("h100")
    return make_world(
        model=load_model(model),
        device=device,
        topology=topology_for(device, devices),
        workload=load_workload("chat"),
        context_tokens=8192,
    )


@given(world=worlds())
def test_one_rank_holds_the_whole_model(world):
    assert rank_weights_bytes(world.model, candidate(world)) == world.model.weight_bytes


def test_fp8_checkpoints_keep_embedding_and_head_in_bf16():
    """On two ranks of llama3-8b: 7.0e9 parameters of layers, 2 x 128256 x 4096 of the ends."""
    world = h100s("llama3-8b", 2)
    model = structs.replace(world.model, weight_dtype="fp8")
    ends = 2 * 128256 * 4096
    norms = (2 * 32 + 1) * 4096
    layers = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert model.weight_bytes == layers + 2 * (ends + norms)
    each = candidate(dataclasses.replace(world, model=model), tp=2)
    assert rank_weights_bytes(model, each) == layers // 2 + ends + 2 * norms


@given(world=worlds(), data=st.data())
def test_the_ranks_of_a_stage_hold_the_model_once_but_for_norms_and_repeated_kv_heads(world, data):
    """Lower bound: no rank can hold less than its even share of the matrices."""
    each = data.draw(st.sampled_from(candidates(world)[0]))
    p = each.parallelism
    least = world.model.layers * world.model.layer_matmul_parameters / (p.tp * p.spp)
    size = DTYPE_BYTES[world.model.weight_dtype]
    assert rank_weights_bytes(world.model, each) >= least * size


@given(world=worlds(), data=st.data())
def test_parts_add_up_to_the_capacity(world, data):
    each = data.draw(st.sampled_from(candidates(world)[0]))
    try:
        memory = footprint(world, each).memory
    except Infeasible:
        reject()
    parts = ("weights", "activations", "reserved", "kv", "free")
    assert sum(getattr(memory, f"{part}_bytes") for part in parts) == memory.capacity_bytes


@given(world=worlds(), data=st.data())
def test_a_candidate_fits_exactly_up_to_the_context_that_the_error_names(world, data):
    each = data.draw(st.sampled_from(candidates(world)[0]))
    reach = reachable_context(world, each)
    limits = world.limits

    def at(context):
        return dataclasses.replace(world, limits=structs.replace(limits, context_tokens=context))

    if reach:
        footprint(at(reach), each)
        assert holds(at(reach), each)
    assert not holds(at(reach + 1), each)
    with pytest.raises(Infeasible) as caught:
        footprint(at(reach + 1), each)
    assert caught.value.constraint == "memory"
    assert bool(caught.value.nearest) == bool(reach)


@given(world=worlds(), data=st.data())
def test_a_higher_degree_never_needs_more(world, data):
    first = candidate(world)
    tp = data.draw(st.sampled_from([1, world.model.kv_heads]))
    spp = data.draw(st.integers(1, world.model.layers))
    assume(world.model.ffn % tp == 0 and world.model.vocab % tp == 0)
    more = candidate(world, tp=tp, spp=spp)
    assert rank_weights_bytes(world.model, more) <= rank_weights_bytes(world.model, first)
    assert activations_bytes(world, more) <= activations_bytes(world, first)
    assert page_bytes(world, more) <= page_bytes(world, first)


@given(world=worlds(), kvp=st.integers(1, 8))
def test_shards_are_whole_pages_that_cover_the_context(world, kvp):
    shard = shard_tokens(world, kvp)
    assert shard % world.page_tokens == 0
    assert shard * kvp >= world.limits.context_tokens
    assert (shard - world.page_tokens) * kvp < world.limits.context_tokens


@given(world=worlds())
def test_kv_heads_are_repeated_once_tp_exceeds_them(world):
    heads = world.model.kv_heads
    assert page_bytes(world, candidate(world, tp=heads)) == page_bytes(
        world, candidate(world, tp=4 * heads)
    )


@pytest.mark.parametrize("model", ["llama3-8b", "llama3-70b", "qwen3-0.6b"])
@pytest.mark.parametrize("tp", [1, 8])
def test_recorded_steps_fit_in_the_part_of_reserved_bytes_that_is_theirs(model, tp):
    world = h100s(model, tp)
    each = candidate(world, tp=tp)
    assert 0 < graph_buffers_bytes(world, each, 8192) < GRAPHS_BYTES
    assert graphs_beyond_bytes(world, each, 8192) == 0
    assert world.device.reserved_bytes > GRAPHS_BYTES


def test_recorded_steps_beyond_that_part_are_in_the_account():
    """A model of one layer that is several times as wide as those of the catalog."""
    small = h100s("llama3-8b", 1)
    wide = dataclasses.replace(
        small, model=structs.replace(small.model, hidden=1 << 15, ffn=1 << 17, layers=1)
    )
    beyond = [graphs_beyond_bytes(each, candidate(each), 8192) for each in (small, wide)]
    assert beyond[0] == 0
    least = 2048 * 2 * (4 * (1 << 15) + 3 * (1 << 17))  # residual stream, and the MLP
    assert beyond[1] > least - GRAPHS_BYTES
    without = dataclasses.replace(
        wide, device=structs.replace(wide.device, compute_capability=None)
    )
    assert graphs_beyond_bytes(without, candidate(without), 8192) == 0
    partials = attention_partials_bytes(wide, candidate(wide), 8192)
    assert activations_bytes(wide, candidate(wide)) - activations_bytes(
        without, candidate(without)
    ) == (beyond[1] + partials)


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"spp": 2}, {"kvp": 2}, {"tp": 2, "spp": 2}])
@pytest.mark.parametrize("context", [8192, 1 << 20])
def test_buffers_of_several_ranks_hold_what_stands_beside_their_graphs(degrees, context):
    """The tensors that the runtime makes itself, on no device; besides the pool."""
    torch = pytest.importorskip("torch")
    from runtime.parallel import graphs, pieces, stage_graphs  # noqa: PLC0415 - as torch

    assert (pieces.SIZES[-1], graphs.SIZES[-1]) == (GRAPH_TOKENS, GRAPH_SEQUENCES)
    world = h100s("llama3-8b", 4)
    each, most = candidate(world, **degrees), GRAPH_SEQUENCES
    shard = -(-context // degrees.get("kvp", 1) // world.page_tokens) * world.page_tokens
    plan = SimpleNamespace(
        kv=SimpleNamespace(tokens_per_kvp_shard=shard, page_tokens=world.page_tokens),
        model=world.model,
    )
    owner = stage_graphs.StageGraphs.__new__(stage_graphs.StageGraphs)
    owner._rank = SimpleNamespace(  # noqa: SLF001 - what its allocation reads
        plan=plan,
        device=torch.device("meta"),
        is_first="spp" not in degrees,  # one that is last and not first holds both
        is_last=True,
        place=SimpleNamespace(tp=0),
    )
    owner._hidden_BD = owner._logits_RV = owner._shares = None  # noqa: SLF001
    owner._allocate(most)  # noqa: SLF001
    if "kvp" in degrees:
        heads, head = world.model.heads // degrees.get("tp", 1), world.model.head_dim
        out = torch.zeros((most, heads, head), dtype=torch.bfloat16, device="meta")
        owner.shares(most, out, torch.zeros((most, heads), device="meta"))
    made = [held for value in vars(owner).values() for held in
            (value if isinstance(value, tuple) else (value,))
            if isinstance(held, torch.Tensor)]  # fmt: skip
    beside = sum(tensor.nbytes for tensor in made)
    # the pool holds rows of as many tokens, and logits
    narrow = graph_buffers_bytes(world, each, context)
    pool = most * (4 * world.model.vocab + 2 * 4 * world.model.hidden)
    assert pool + beside <= narrow < GRAPHS_BYTES
    assert beside >= 131_000_000  # logits of 256 sequences alone


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8"])
def test_partial_results_are_a_part_of_the_activations_that_grows_with_the_context(kv_dtype):
    world = dataclasses.replace(h100s("llama3-8b", 1), kv_dtype=kv_dtype)
    each = candidate(world)
    found = [attention_partials_bytes(world, each, 1 << power) for power in (13, 17, 20)]
    assert found == sorted(found)
    # the largest step of rows and logits is 1.4 GB, the partial results are below it
    assert 1e8 < found[0] < found[-1] < 3e9
    more = activations_bytes(world, each, 1 << 20) - activations_bytes(world, each, 1 << 13)
    assert more == found[-1] - found[0]


@pytest.mark.parametrize("tp", [1, 4])
def test_a_long_context_fits_exactly_with_its_partial_results(tp):
    world = h100s("llama3-8b", tp)
    each = candidate(world, tp=tp)
    reach = reachable_context(world, each)

    def at(context):
        limits = structs.replace(world.limits, context_tokens=context)
        return dataclasses.replace(world, limits=limits)

    footprint(at(reach), each)
    with pytest.raises(Infeasible) as caught:
        footprint(at(reach + 1), each)
    assert caught.value.constraint == "memory"


@given(world=worlds())
def test_activations_grow_with_the_step_not_with_the_prompt(world):
    each = candidate(world)
    longer = dataclasses.replace(world, limits=structs.replace(world.limits, context_tokens=10**6))
    wider = dataclasses.replace(
        world, scheduler=structs.replace(world.scheduler, max_step_tokens=16384)
    )
    assert activations_bytes(longer, each) == activations_bytes(world, each)
    assert activations_bytes(wider, each) > activations_bytes(world, each)


@pytest.mark.parametrize(("tp", "kv_heads"), [(1, 8), (2, 4), (8, 1), (16, 1), (32, 1)])
def test_a_rank_holds_its_share_of_heads_and_one_whole_kv_head_at_least(tp, kv_heads):
    model = load_model("llama3-70b")
    assert local_kv_heads(model, tp) == kv_heads
    assert qkv_width(model, tp) == (2 * 64 // tp + 2 * kv_heads) * 128  # q, output, k and v

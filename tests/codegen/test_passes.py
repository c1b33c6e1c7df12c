"""Each pass keeps the graph valid and its numbers as they were, and finds nothing a second time."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import make_plan, tiny_model
from strategies_codegen import DTYPES, logit_tolerance, named_tensor, reference
from torch import fx

from codegen import collectives
from codegen.capture import capture
from codegen.emit import emit_program
from codegen.graph import (
    INV_FREQ,
    Program,
    call,
    calls,
    op_name,
    placeholder,
    text_of,
    verify,
)
from codegen.kernels.base import Value
from codegen.models.frequencies import inverse_frequencies
from codegen.passes import PASSES
from codegen.passes.fuse import fuse_all_reduce
from plans.errors import Infeasible
from plans.mesh import Parallelism
from plans.plan import Plan

MODELS = {
    "llama": {},
    "qwen2.5": {"qkv_bias": True, "tie_embeddings": True},
    "qwen3": {"qk_norm": True, "head_dim": 32},
}
TOKENS = 20


def plan_of(family: str, **changes: Any) -> Plan:
    return make_plan(model=tiny_model(layers=3, **MODELS[family]), **changes)


def run(program: Program, plan: Plan) -> torch.Tensor:
    """Runs the graphs as they stand, one whole sequence, and checks every value's shape."""
    ids = torch.arange(0, 11 * TOKENS, 11)
    pages = -(-TOKENS // plan.kv.page_tokens)
    hidden = None
    for graph in program.graphs:
        kv_shape = (pages, plan.kv.page_tokens, plan.model.kv_heads, plan.model.head_dim)
        inputs = SimpleNamespace(
            token_ids_T=ids,
            hidden_TD=hidden,
            positions_T=torch.arange(TOKENS),
            slots_T=torch.arange(TOKENS),
            query_starts_B1=torch.tensor([0, TOKENS]),
            kv_lens_B=torch.tensor([TOKENS]),
            page_table_BP=torch.arange(pages)[None],
            sample_rows_R=torch.arange(TOKENS),
        )
        values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            args = fx.node.map_arg(node.args, values.__getitem__)
            if node.op == "output":
                hidden = args[0]
                break
            if node.op == "placeholder" and node.target == "inputs":
                values[node] = inputs
            elif node.op == "placeholder" and "_pages_" in node.target:
                values[node] = torch.full(kv_shape, torch.nan)
            elif node.op == "placeholder":
                values[node] = getattr(inputs, node.target)
            elif node.target == INV_FREQ:
                rope = inverse_frequencies(plan.model.rope, plan.model.head_dim)
                values[node] = torch.tensor(rope)
            elif node.op == "get_attr":
                sources = node.meta["parameter"].sources
                values[node] = torch.cat([named_tensor(each.name, each.shape) for each in sources])
            else:
                values[node] = node.target(*args)
            check_shape(node.meta["value"], values[node], pages)
    return hidden


def check_shape(value: Value | tuple[Value, ...], found: Any, pages: int) -> None:
    if isinstance(value, tuple):
        for each, part in zip(value, found, strict=True):
            check_shape(each, part, pages)
    elif value.dtype not in ("int", "inputs"):
        letters = {"T": TOKENS, "R": TOKENS, "pages": pages}
        assert tuple(found.shape) == tuple(letters.get(dim, dim) for dim in value.shape)
        if value.dtype in DTYPES:
            assert found.dtype == DTYPES[value.dtype]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("stages", [1, 2])
def test_passes_keep_the_numbers(family, stages):
    plan = plan_of(family, parallelism=Parallelism(spp=stages))
    program = capture(plan.model)
    verify(program)
    ids = torch.arange(0, 11 * TOKENS, 11)
    expected = reference(plan.model)(ids, torch.arange(TOKENS))
    torch.testing.assert_close(run(program, plan), expected, rtol=0, atol=0)
    for apply in PASSES:
        apply(program, plan)
        verify(program)
        found = run(program, plan)
        torch.testing.assert_close(found, expected, rtol=0, atol=logit_tolerance(expected))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    "degrees", [Parallelism(), Parallelism(tp=2, spp=2), Parallelism(tp=4, kvp=2)]
)
def test_passes_find_nothing_a_second_time(family, degrees):
    plan = plan_of(family, parallelism=degrees)
    program = capture(plan.model)
    for apply in PASSES:
        apply(program, plan)
        before = [text_of(graph) for graph in program.graphs]
        assert apply(program, plan) == 0, apply.__name__
        assert [text_of(graph) for graph in program.graphs] == before, apply.__name__


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("tp", "stages"), [(1, 1), (2, 1), (1, 3), (4, 2)])
def test_match_counts_are_those_of_the_family(family, tp, stages):
    """A pattern that silently stops matching is the usual bug of a pass."""
    plan = plan_of(family, parallelism=Parallelism(tp=tp, spp=stages))
    layers = plan.model.layers
    matches = emit_program(plan).matches
    assert matches["cut_stages"] == stages  # the cuts between them, and the selection of rows
    assert matches["shard"] == (7 * layers + 2 if tp > 1 else 0)  # and embedding and head
    assert matches["fuse_projections"] == 2 * layers  # qkv; gate and up
    assert matches["fuse_gate"] == matches["fuse_gate_up"] == layers
    # two sums a layer; the one that leaves a stage has no norm behind it
    sums = 2 * layers - (stages - 1)
    assert matches["fuse_all_reduce"] == (sums if tp > 1 else 0)
    assert matches["rowwise"] == (sums if tp == 1 else 0)
    assert matches["page_attention"] == matches["fuse_qkv_write"] == layers


def test_kv_heads_that_do_not_suffice_are_held_by_several_ranks():
    plan = plan_of("llama", parallelism=Parallelism(tp=4))
    program = capture(plan.model)
    for apply in PASSES:
        apply(program, plan)
    parameters = [
        node.meta["parameter"] for node in program.graphs[0].nodes if "parameter" in node.meta
    ]
    qkv = next(each for each in parameters if each.name.endswith("0.self_attn.qkv_proj.weight"))
    assert [source.shards for source in qkv.sources] == [4, 2, 2]
    assert qkv.shape == ((1 + 1 + 1) * plan.model.head_dim, plan.model.hidden)


def test_every_sum_over_ranks_but_a_stages_last_is_in_the_call_of_its_norm():
    plan = plan_of("llama", parallelism=Parallelism(tp=2, spp=2))
    program = capture(plan.model)
    for apply in PASSES:
        apply(program, plan)
    first, last = program.graphs
    embedding, handed_on = calls(first, "all_reduce")
    assert op_name(embedding.all_input_nodes[0]) == "embedding_share"
    assert [op_name(user) for user in handed_on.users] == ["add"]
    assert calls(last, "all_reduce") == []
    final = calls(last, "all_reduce_add_rms_norm")[-1]
    assert [user.args[1] for user in final.users] == [0]  # nothing reads its sum


def norm_behind_a_sum(reading: str) -> Program:
    """A graph of all_reduce, add and rms_norm, in which others read something, too."""
    graph = fx.Graph()
    rows = Value(shape=("T", 8), dtype="fp32")
    x, residual = (placeholder(graph, name, rows) for name in ("x_TD", "residual_TD"))
    weight = placeholder(graph, "weight_D", Value(shape=(8,), dtype="fp32"))
    for each in (x, residual, weight):
        each.meta["layer"] = 0

    def made(op: str, *args: Any) -> fx.Node:
        return call(graph, op, *args, like=x, name=op)

    total = made("all_reduce", x)
    terms = (residual, total) if reading == "swapped" else (total, residual)
    if reading == "twice":
        terms = (total, total)
    summed = made("add", *terms)
    before = made("silu", summed) if reading == "before" else summed
    normed = made("rms_norm", summed, weight, 1e-5)
    ends = made("add", before, made("add", residual, normed))
    if reading == "reduced":
        ends = made("add", ends, total)
    graph.output(ends)
    return Program(graphs=[graph], tp=2)


@pytest.mark.parametrize(
    ("reading", "matches"),
    [("behind", 1), ("swapped", 1), ("before", 0), ("reduced", 0), ("twice", 0)],
)
def test_a_sum_over_ranks_that_others_read_stays_apart(reading, matches):
    program = norm_behind_a_sum(reading)
    verify(program)
    assert fuse_all_reduce(program, plan_of("llama")) == matches
    verify(program)
    assert len(calls(program.graphs[0], "all_reduce_add_rms_norm")) == matches
    assert len(calls(program.graphs[0], "all_reduce")) == 1 - matches
    assert fuse_all_reduce(program, plan_of("llama")) == 0


@pytest.mark.parametrize("degrees", [Parallelism(), Parallelism(kvp=2)])
def test_merge_stands_behind_every_attention_only_with_kvp(degrees):
    plan = plan_of("llama", parallelism=degrees)
    program = capture(plan.model)
    for apply in PASSES:
        apply(program, plan)
    merges = calls(program.graphs[0], "merge")
    assert len(merges) == (plan.model.layers if degrees.kvp > 1 else 0)


@pytest.mark.parametrize("broken", ["shape", "dead", "order", "arity"])
def test_verify_rejects_a_broken_graph(broken):
    program = capture(tiny_model(layers=1))
    graph = program.graphs[0]
    linear = calls(graph, "linear")[0]
    if broken == "shape":
        linear.meta["value"] = Value(shape=("T", 3), dtype="fp32")
    elif broken == "dead":
        with graph.inserting_after(linear):
            dead = graph.call_function(linear.target, linear.args)
        dead.meta.update(linear.meta)
    elif broken == "order":
        linear.args[0].append(linear.args[1])
        next(iter(linear.users)).append(linear)
    else:
        linear.args = linear.args[:2]
    with pytest.raises(AssertionError):
        verify(program)


def test_fp8_weights_are_refused_with_what_runs():
    with pytest.raises(Infeasible, match="bf16, fp16, fp32"):
        capture(tiny_model(weight_dtype="fp8"))


def test_collectives_of_one_rank_change_nothing():
    x = torch.ones(2, 3)
    assert collectives.all_reduce(x) is collectives.all_gather(x) is x
    assert collectives.merge(x, x[:, 0]) is x
    assert collectives.vocab_offset(7) == 0


def test_graphs_around_each_pass_are_as_recorded(golden):
    plan = make_plan(
        model=tiny_model(layers=2, qkv_bias=True), parallelism=Parallelism(tp=2, spp=2, kvp=2)
    )
    graphs = emit_program(plan, dump_graph=True).graphs
    assert len(graphs) == len(PASSES) + 2
    for name, text in graphs.items():
        golden(f"graph_{name}.txt", text)


@pytest.mark.parametrize("target", ["torch", "triton"])
def test_a_dump_says_what_each_pass_did_and_what_each_stage_holds(target):
    plan = plan_of("llama", parallelism=Parallelism(spp=2))
    program = emit_program(plan, dump_graph=True, target=target)
    summary = program.graphs["summary"].splitlines()
    for number, (name, matches) in enumerate(program.matches.items(), 1):
        head = program.graphs[f"{number}-{name}"].splitlines()[0]
        assert head.startswith(f"# {name}, pass {number} of {len(PASSES)}: {matches} match")
        assert any(line.split()[:2] == [name, str(matches)] for line in summary)
    last = program.graphs[f"{len(PASSES)}-plan_buffers"]
    for stage, most in enumerate(program.peak_activation_bytes):
        assert any(line.startswith(f"stage {stage}: {most} in ") for line in summary)
        assert f"# stage {stage}: {most} in " in last
        assert f"holds {most}\n" in last


def test_graphs_with_pages_in_fp8_are_as_recorded(golden):
    plan = make_plan(model=tiny_model(layers=2, qk_norm=True), kv_dtype="fp8")
    graphs = emit_program(plan, dump_graph=True, target="triton").graphs
    golden("graph_fp8_summary.txt", graphs["summary"])
    golden("graph_fp8.txt", graphs[f"{len(PASSES)}-plan_buffers"])

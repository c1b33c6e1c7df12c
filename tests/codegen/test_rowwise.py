"""Row-wise regions: any graph keeps its numbers, whichever regions are found and printed.

Graphs are drawn, not chosen. The torch form of a region has to equal the ops apart bit by bit, the
Triton form within a bound that is carried through the same graph, value by value: it grows only
where exp or the order of a sum may end in another rounding.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pytest
import torch
from builders import make_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from poisoning import poison
from strategies_codegen import DTYPES, rounding_interpreter
from torch import fx

from codegen.emit import emit_program
from codegen.graph import Program, call, calls, erase_unused, item, op_name, text_of, verify
from codegen.kernels import FOLDER
from codegen.kernels.base import Value
from codegen.passes.rowwise import rowwise
from codegen.rowwise import ROW_WISE, Builder
from codegen.rowwise_library import LIBRARY, texts
from codegen.rowwise_op import load_source
from codegen.rowwise_source import reference_source, triton_source
from plans.ops import Parameter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAN = make_plan()


# --- graphs ---------------------------------------------------------------------------------------


@dataclass
class Drawn:
    """A graph under construction: row-wise ops, cuts, and collectives, which end a region."""

    graph: fx.Graph
    dtype: str
    pool: list[fx.Node] = field(default_factory=list)
    like: Any = None
    weights: int = 0

    def input(self, shape: tuple[Any, ...]) -> None:
        node = self.graph.placeholder(f"x{len(self.pool)}")
        node.meta.update(layer=None, name=node.target, value=Value(shape=shape, dtype=self.dtype))
        self.pool.append(node)

    def weight(self, like: fx.Node) -> fx.Node:
        value = like.meta["value"]
        width = value.shape[-1]
        name = f"w{self.weights}.weight"
        self.weights += 1
        node = self.graph.create_node("get_attr", name)
        parameter = Parameter(name=name, shape=(width,), dtype=value.dtype, sources=())
        node.meta.update(layer=None, name=name, parameter=parameter)
        node.meta["value"] = Value(shape=(width,), dtype=value.dtype)
        return node

    def add(self, op: str, *args: Any) -> fx.Node:
        made = call(self.graph, op, *args, like=args[0], name=op)
        if not isinstance(made.meta["value"], tuple):
            self.pool.append(made)
        return made


def graph_of(pick: Callable[[int], int]) -> tuple[fx.Graph, dict[str, Any]]:
    """A random graph; `pick(n)` chooses from n. Sizes of its inputs come along."""
    graph = fx.Graph()
    drawn = Drawn(graph, ("bf16", "fp16", "fp32")[pick(3)])
    width = (1, 2, 7, 16, 24, 33, 70)[pick(7)]
    heads = (None, 3)[pick(2)]
    shape = ("T", width) if heads is None else ("T", heads, width)
    for _ in range(1 + pick(3)):
        drawn.input(shape)
    for _ in range(1 + pick(9)):
        step(drawn, pick)
    unread = [node for node in drawn.pool if not node.users and node.op == "call_function"]
    leaving = [node for node in drawn.pool if node.users and pick(5) == 0]
    graph.output(tuple(dict.fromkeys((*unread, *leaving))) or (drawn.pool[0],))
    erase_unused(graph)
    return graph, {"T": 1 + pick(5), "heads": heads}


def step(drawn: Drawn, pick: Callable[[int], int]) -> None:
    """One more op, of values that suit it."""
    x = drawn.pool[-1 - pick(min(len(drawn.pool), 6))]
    value = x.meta["value"]
    kind = pick(8)
    if kind == 0:
        drawn.add("silu", x)
    elif kind == 1:
        drawn.add("rms_norm", x, drawn.weight(x), (1e-5, 0.1)[pick(2)])
    elif kind == 2 and value.dtype != "fp32":
        drawn.add("to_fp32", x)
    elif kind == 3 and value.shape[-1] > 1:
        first = 1 + pick(value.shape[-1] - 1)
        sizes = (first, value.shape[-1] - first)
        if value.shape[-1] % 2 == 0 and pick(2):
            sizes = (value.shape[-1] // 2, value.shape[-1] // 2)
        parts = drawn.add("split", x, sizes)
        used = [0, 1] if pick(2) else [pick(2)]
        drawn.pool += [item(drawn.graph, parts, at, "part") for at in used]
    elif kind == 4 and value.shape[-1] % 2 == 0:
        drawn.add("silu_mul", x)
    elif kind == 5:
        drawn.add("all_reduce", x)
    else:
        partners = [each for each in drawn.pool if each.meta["value"] == value]
        drawn.add(("add", "mul")[pick(2)], x, partners[pick(len(partners))])


def tensors(graph: fx.Graph, sizes: Mapping[str, Any], seed: int) -> dict[fx.Node, torch.Tensor]:
    """Random values of all inputs; rows of the first lie apart, as in a wider projection."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for node in graph.nodes:
        if node.op not in {"placeholder", "get_attr"}:
            continue
        value = node.meta["value"]
        shape = [sizes["T"] if dim == "T" else dim for dim in value.shape]
        wide = torch.randn([*shape[:-1], shape[-1] + 8], generator=generator)
        x = wide.to(DTYPES[value.dtype]).to(DEVICE)[..., : shape[-1]]
        found[str(node.target)] = x if node.op == "placeholder" and not seed % 2 else x.contiguous()
    return found


def run(
    graph: fx.Graph, given: Mapping[str, torch.Tensor], function: Callable[[fx.Node], Any]
) -> tuple[torch.Tensor, ...]:
    """The graph's outputs."""
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "output":
            return tuple(values[each] for each in node.args[0])
        if node.op == "call_function":
            args = fx.node.map_arg(node.args, values.__getitem__)
            values[node] = function(node)(*args)
        else:
            values[node] = given[str(node.target)]
    raise AssertionError


def reference_of(node: fx.Node) -> Any:
    return node.target


@dataclass
class Kernels:
    """What a bundle would run: Triton where a region has it."""

    changes: Mapping[str, int]

    def __call__(self, node: fx.Node) -> Any:
        op = op_name(node)
        own = getattr(node.target, "spec", None)
        if own is not None:
            for text in own.sources.values():
                assert max(map(len, text.splitlines())) <= 100, text
            module = load_source(op, own.sources["triton"])
        elif op in LIBRARY:
            module = load_source(op, (FOLDER / op / "triton.py").read_text())
        else:
            return node.target
        for name, value in self.changes.items():
            if hasattr(module, name):
                setattr(module, name, value)
        return getattr(module, op)


# --- the bound ------------------------------------------------------------------------------------


def unit(x: torch.Tensor) -> torch.Tensor:
    """At least the distance of x to its neighbours in its own type."""
    info = torch.finfo(x.dtype)
    return x.double().abs() * info.eps + info.tiny


def bounds(graph: fx.Graph, given: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """How far each output may be from the ops apart: 0 where every step is one exact rounding.

    A step's error is what its arguments' errors make of it, and one unit more wherever the value
    before rounding may differ at all.
    """
    exact: dict[fx.Node, Any] = {}
    error: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "output":
            return tuple(error[each] for each in node.args[0])
        if node.op != "call_function":
            exact[node] = given[str(node.target)]
            error[node] = torch.zeros(exact[node].shape, dtype=torch.float64, device=DEVICE)
            continue
        exact[node] = node.target(*fx.node.map_arg(node.args, exact.__getitem__))
        off = [error[each] for each in node.all_input_nodes if each in error]
        x = [exact[each] for each in node.all_input_nodes]
        error[node] = grown(op_name(node), node, x, off, exact[node])
    raise AssertionError


def grown(  # noqa: PLR0911 - one an op
    op: str | None, node: fx.Node, x: list, off: list, out: Any
) -> Any:
    """Error of one step."""
    if op == "split" or op is None:
        return node.target(off[0], node.args[1])
    if op in {"all_reduce", "to_fp32"}:
        return off[0]
    if op == "add":
        return spread(off[0] + off[-1], out)
    if op == "mul":
        a, b = x[0].double().abs(), x[-1].double().abs()
        return spread(a * off[-1] + b * off[0] + off[0] * off[-1], out)
    if op == "silu":
        return gate_error(x[0], off[0], out)
    if op == "silu_mul":
        (gate, up), (gate_off, up_off) = x[0].chunk(2, -1), off[0].chunk(2, -1)
        silu = torch.nn.functional.silu(gate)
        error = gate_error(gate, gate_off, silu)
        return spread(silu.double().abs() * up_off + (up.double().abs() + up_off) * error, out)
    assert op == "rms_norm"
    wide, weight, eps = x[0].double(), x[1].double().abs(), node.args[2]
    mean = wide.square().mean(-1, keepdim=True)
    # sums of n terms in two orders, and a root, a quotient and a product, all of fp32
    shift = (2 * wide.abs() * off[0] + off[0].square()).mean(-1, keepdim=True)
    shift = shift + mean * (wide.shape[-1] + 8) * 2**-23
    scale = (mean + eps).rsqrt()
    share = shift / (mean + eps) + 2**-21
    normed = (wide * scale).to(out.dtype)
    first = spread(scale * off[0] * (1 + share) + (wide * scale).abs() * share, normed)
    return spread(weight * first, out)


def gate_error(x: torch.Tensor, off: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Of silu, whose slope is at most 1.1; exp is off by some units and by its argument's."""
    return spread(1.1 * off + out.double().abs() * (x.double().abs() + 8) * 2**-22, out)


def spread(before: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The error behind a rounding of what is off by `before`."""
    return torch.where(before > 0, before + unit(out), 0)


# --- properties -----------------------------------------------------------------------------------

CHANGES = (
    {},
    {"PROGRAMS": 1},  # several rows a program
    {"MAX_BLOCK": 16, "ELEMENTS_A_WARP": 16, "BLOCK": 8},  # rows in loops, columns in blocks
)


@pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|underflow|divide by zero) encountered:RuntimeWarning"
)
@settings(max_examples=60)
@given(changes=st.sampled_from(CHANGES), seed=st.integers(0, 2**32))
def test_any_graph_keeps_its_numbers(changes, seed):
    check(seed, changes)


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(24))
def test_any_graph_keeps_its_numbers_on_the_device(number, fresh_seed):
    check(fresh_seed + number, CHANGES[number % len(CHANGES)])


def check(seed: int, changes: Mapping[str, int]) -> None:
    """Compares a drawn graph before and behind the pass, in both forms."""
    graph, sizes = graph_of(random.Random(seed).randrange)
    program = Program(graphs=[graph])
    verify(program)
    given = tensors(graph, sizes, seed)
    expected = run(graph, given, reference_of)
    allowed = bounds(graph, given)
    rowwise(program, PLAN)
    verify(program)
    for found, wanted in zip(run(graph, given, reference_of), expected, strict=True):
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
    with pytest.MonkeyPatch.context() as patch:
        rounding_interpreter(patch)
        poison(patch)
        ours = run(graph, given, Kernels(changes))
    for found, wanted, most in zip(ours, expected, allowed, strict=True):
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        assert found.isnan().sum() == wanted.isnan().sum()
        whole = wanted.isfinite() & most.isfinite()
        off = (found.double() - wanted.double()).abs()[whole]
        # twice the bound: it is carried by first order from the ops apart
        assert (off <= 2 * most[whole]).all(), f"{off.max()} for {text_of(graph)}"


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_regions_are_maximal_and_found_once(seed):
    graph, _ = graph_of(random.Random(seed).randrange)
    program = Program(graphs=[graph])
    before = sum(op_name(node) in ROW_WISE for node in graph.nodes)
    found = rowwise(program, PLAN)
    verify(program)
    text = text_of(graph)
    assert rowwise(program, PLAN) == 0
    assert text_of(graph) == text
    left = sum(op_name(node) in ROW_WISE for node in graph.nodes)
    assert found <= before - left if found else before >= left
    for node in graph.nodes:  # what a lone op reads alone and straight away would have joined it
        if op_name(node) in {"add", "mul", "silu", "to_fp32"}:
            assert not any(
                op_name(each) in {"add", "mul", "silu", "to_fp32"} and len(each.users) == 1
                for each in node.all_input_nodes
            )


def chain(widths: int = 64) -> fx.Graph:
    """h + x, its norm, a barrier, and the sum read again: two regions, one result for each use."""
    graph = fx.Graph()
    drawn = Drawn(graph, "bf16")
    for _ in range(2):
        drawn.input(("T", widths))
    x, h = drawn.pool
    total = drawn.add("add", h, x)
    normed = drawn.add("rms_norm", total, drawn.weight(total), 1e-5)
    inner = drawn.add("all_reduce", normed)
    gate_up = drawn.add("add", inner, total)
    parts = drawn.add("split", gate_up, (widths // 2, widths // 2))
    gate, up = (item(graph, parts, at, "part") for at in (0, 1))
    drawn.add("mul", drawn.add("silu", gate), up)
    graph.output((drawn.pool[-1],))
    return graph


def test_a_graph_around_the_pass_is_as_recorded(golden):
    program = Program(graphs=[chain()])
    before = text_of(program.graphs[0])
    assert rowwise(program, PLAN) == 2
    golden("rowwise_graph.txt", f"{before}\n{text_of(program.graphs[0])}")
    (made,) = [node for node in program.graphs[0].nodes if hasattr(node.target, "spec")]
    assert made.target.__name__ == "add_silu_mul"
    golden("rowwise_add_silu_mul_reference.txt", made.target.spec.sources["reference"])
    golden("rowwise_add_silu_mul_triton.txt", made.target.spec.sources["triton"])


def test_a_region_with_two_norms_and_cuts_is_as_recorded(golden):
    rows = Builder()
    x, y = rows.row(48), rows.row(32)
    inner = rows.step("rms_norm", x, rows.vector(48), eps := rows.scalar())
    total = rows.step("add", rows.cut(inner, 8, 32), y)
    outer = rows.step("to_fp32", rows.step("rms_norm", total, rows.vector(32), eps))
    region = rows.region(outer, total)
    golden("rowwise_two_norms_triton.txt", triton_source("two_norms", region))
    golden("rowwise_two_norms_reference.txt", reference_source("two_norms", region))


def test_what_stands_between_two_ops_keeps_them_apart():
    """A collective reads the sum, and the second sum its result: no region can hold both."""
    graph = fx.Graph()
    drawn = Drawn(graph, "fp32")
    drawn.input(("T", 8))
    total = drawn.add("add", drawn.pool[0], drawn.pool[0])
    drawn.add("add", drawn.add("all_reduce", total), total)
    graph.output((drawn.pool[-1],))
    assert rowwise(Program(graphs=[graph]), PLAN) == 0
    assert len(calls(graph, "add")) == 2


def test_readers_of_the_same_rows_share_one_load_and_other_columns_do_not():
    graph = fx.Graph()
    drawn = Drawn(graph, "fp32")
    drawn.input(("T", 8))
    parts = drawn.add("split", drawn.pool[0], (4, 4))
    left, right = (item(graph, parts, at, "part") for at in (0, 1))
    gates = [drawn.add("silu", each) for each in (left, left, right)]
    graph.output(tuple(gates))
    assert rowwise(Program(graphs=[graph]), PLAN) == 1
    (region,) = [node.target.region for node in graph.nodes if hasattr(node.target, "region")]
    assert region.ops == ("silu", "silu")
    assert len(calls(graph, "silu")) == 1


def test_files_of_the_library_are_what_the_generator_prints():
    """After a change of the generator: python -m codegen.rowwise_library."""
    for name, text in texts().items():
        assert (FOLDER / name).read_text() == text, name


@pytest.mark.parametrize("op", LIBRARY)
def test_graphs_get_the_names_of_the_library(op):
    module = import_module(f"codegen.kernels.{op}.spec")
    assert set(module.SPEC.fused) <= set(ROW_WISE)
    constants = load_source(op, triton_source(op, LIBRARY[op]))
    assert all(getattr(constants, name) == value for name, value in module.SPEC.params.items())


def test_bundles_hold_the_generated_sources():
    for target in ("torch", "triton"):
        program = emit_program(make_plan(), target=target)
        text = program.files["program/add_rms_norm_2.py"].decode()
        compile(text, "add_rms_norm_2", "exec")
        assert "generated by codegen/rowwise_source.py" in text.lower()
        (row,) = [kernel for kernel in program.kernels if kernel.op == "add_rms_norm_2"]
        assert row.target == target
        assert emit_program(make_plan(), target=target).files == program.files

"""Plain torch code of rows: any expression keeps its numbers, fused and printed in both forms."""

import random
from typing import Any

import pytest
import torch
from builders import make_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from poisoning import poison
from strategies_codegen import DTYPES, rounding_interpreter
from torch import fx
from torch.nn import functional

from codegen.graph import Program, erase_unused, op_name, verify
from codegen.kernels.base import Value
from codegen.passes.rowwise import rowwise
from codegen.rowwise_op import load_source
from codegen.rowwise_trace import traced
from plans.errors import Infeasible

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAN = make_plan()
UNIT = 2.0**-23
CHANGES = ({}, {"PROGRAMS": 1}, {"MAX_BLOCK": 16, "ELEMENTS_A_WARP": 16, "BLOCK": 8})
"""As they are, several rows a program, and rows in loops, columns in blocks."""


def value(tensor: torch.Tensor) -> Value:
    (dtype,) = (name for name, each in DTYPES.items() if each == tensor.dtype)
    shape = tuple(tensor.shape) if tensor.dim() == 1 else ("T", *tensor.shape[1:])
    return Value(shape=shape, dtype=dtype)


def run(graph: fx.Graph, args: Any, changes: dict[str, int] | None) -> tuple[torch.Tensor, ...]:
    """The graph's results: by the torch forms, or by Triton with such tunables."""
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = args[node.target]
        elif node.op == "output":
            return tuple(values[each] for each in node.args[0])
        else:
            function = node.target
            if changes is not None and hasattr(function, "spec"):
                module = load_source(op_name(node), function.spec.sources["triton"])
                for name in changes.keys() & vars(module).keys():
                    setattr(module, name, changes[name])
                function = getattr(module, op_name(node))
            values[node] = function(*fx.node.map_arg(node.args, values.__getitem__))
    raise AssertionError


def both(function: Any, args: Any, changes: dict[str, int]) -> tuple[torch.Tensor, ...]:
    """Triton's results of a traced function, whose torch forms equal the ops apart bit by bit."""
    graph = traced(function, *map(value, args))
    args = {each.target: arg for each, arg in zip(graph.nodes, args, strict=False)}
    erase_unused(graph)
    program = Program(graphs=[graph])
    verify(program)
    apart = run(graph, args, None)
    rowwise(program, PLAN)
    verify(program)
    for found, wanted in zip(run(graph, args, None), apart, strict=True):
        assert torch.equal(found, wanted)
    with pytest.MonkeyPatch.context() as patch:
        rounding_interpreter(patch)
        poison(patch)
        ours = run(graph, args, changes)
    for found, wanted in zip(ours, apart, strict=True):
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
    return ours


def normal(*shape: int, seed: int, dtype: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DTYPES[dtype]).to(DEVICE)


NAMED: dict[str, tuple[Any, bool]] = {
    "softmax": (lambda x, w, b: torch.softmax(x, -1), True),
    "layer_norm": (lambda x, w, b: functional.layer_norm(x, x.shape[-1:], w, b), True),
    "rms_norm": (lambda x, w, b: functional.rms_norm(x, x.shape[-1:], w, 1e-6), True),
    "gelu": (lambda x, w, b: functional.gelu(x), True),
    "gelu_tanh_mlp": (lambda x, w, b: functional.gelu(x.float(), approximate="tanh") * w, True),
    "sigmoid": (lambda x, w, b: torch.sigmoid(x.float()) - torch.tanh(x.float()), True),
}


def check_named(name: str, dtype: str, changes: dict[str, int], seed: int) -> None:
    """Against double precision. Each of at most ten ops of fp32 is off by four units of its result
    or of 4, which no intermediate of these exceeds in size beyond the result; sums of n terms by n
    units of their mean; and the result is rounded once, half a unit of its type."""
    function, width = NAMED[name][0], 70
    x = normal(5, width, seed=seed, dtype=dtype)
    w, b = (normal(width, seed=seed + at, dtype=dtype) for at in (1, 2))
    if name.endswith("_norm"):
        size = (width,)
        function = {
            "layer_norm": lambda x, w, b: functional.layer_norm(x, size, w, b),
            "rms_norm": lambda x, w, b: functional.rms_norm(x, size, w, 1e-6),
        }[name]
    (found,) = both(function, (x, w, b), changes)
    exact = function(x.double(), w.double(), b.double())
    if name in {"gelu_tanh_mlp", "sigmoid"}:  # .float() rounds the doubles to what they were
        exact = {
            "gelu_tanh_mlp": functional.gelu(x.double(), approximate="tanh") * w.double(),
            "sigmoid": torch.sigmoid(x.double()) - torch.tanh(x.double()),
        }[name]
    rounding = torch.finfo(found.dtype).eps / 2
    bound = rounding * exact.abs() + (40 + width) * UNIT * exact.abs().clamp_min(4)
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("changes", CHANGES, ids=["as they are", "together", "loops"])
@pytest.mark.parametrize("name", NAMED)
def test_named_expressions_equal_double_precision(name, changes, dtype):
    check_named(name, dtype, changes, 0)


# --- random expressions ---------------------------------------------------------------------------

POINTWISE = {
    "exp": torch.exp, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu,
    "neg": torch.neg, "gelu": functional.gelu, "silu": functional.silu,
    "log": lambda x: torch.log(torch.sigmoid(x) + 0.5),
    "sqrt": lambda x: torch.sqrt(torch.sigmoid(x) + 0.5),
    "rsqrt": lambda x: torch.rsqrt(torch.sigmoid(x) + 0.5),
    "div": lambda x: x / (torch.sigmoid(x) + 0.5),
    "scaled": lambda x: (1.5 - x) * 0.25,
    "softmax": lambda x: torch.softmax(x, -1),
    "center": lambda x: x - x.mean(-1, keepdim=True),
    "top": lambda x: torch.exp(x - x.amax(-1, keepdim=True)),
    "added": lambda x: torch.tanh(x.sum(-1, keepdim=True)) + x,
}  # fmt: skip
"""Functions whose slope is at most 4 where arguments are within a few units, as tanh keeps them."""
BINARY = {
    "plus": torch.add, "sub": torch.sub, "times": torch.mul,
    "maximum": torch.maximum, "minimum": torch.minimum,
}  # fmt: skip


def expression(pick: Any) -> Any:
    """A random function of x, y and a row w: each step is brought back to (-1, 1)."""
    steps = [
        (sorted(POINTWISE)[pick(len(POINTWISE))], sorted(BINARY)[pick(len(BINARY))], pick(3))
        for _ in range(1 + pick(3))
    ]

    def function(x, y, w):
        for unary, binary, other in steps:
            x = torch.tanh(BINARY[binary](POINTWISE[unary](x), (x, y, w)[other]))
        return x

    return function, len(steps)


def check_random(seed: int, changes: dict[str, int]) -> None:
    """fp32 against double precision.

    Behind tanh values are below 1, so that each step's ops are off by some 40 units of at most 8 (a
    sum of up to 70 terms: 70 more), and a step makes 4 times as much of an error before it, or 70
    times through the sum of a row, which tanh takes.
    """
    pick = random.Random(seed).randrange
    function, count = expression(pick)
    width = (2, 7, 16, 33, 70)[pick(5)]
    rows = 1 + pick(5)
    x, y = (normal(rows, width, seed=seed + at, dtype="fp32").tanh() for at in (2, 3))
    w = normal(width, seed=seed + 1, dtype="fp32").tanh()
    (found,) = both(function, (x, y, w), changes)
    exact = function(x.double(), y.double(), w.double())
    bound, error = 0.0, (40 * 8 + width) * UNIT
    for _ in range(count):
        bound = (width + 4) * bound + error
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid) .*:RuntimeWarning")
@settings(max_examples=40)
@given(seed=st.integers(0, 2**30), changes=st.sampled_from(CHANGES))
def test_any_expression_keeps_its_numbers(seed, changes):
    check_random(seed, changes)


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(24))
def test_any_expression_keeps_its_numbers_on_the_device(number, fresh_seed):
    check_random(fresh_seed + number, CHANGES[number % len(CHANGES)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", NAMED)
def test_named_expressions_equal_double_precision_on_the_device(name, dtype, fresh_seed):
    for changes in CHANGES:
        check_named(name, dtype, changes, fresh_seed)


@pytest.mark.parametrize("name", NAMED)
def test_a_named_expression_is_one_region(name):
    size = (64,)
    function = {
        "layer_norm": lambda x, w, b: functional.layer_norm(x, size, w, b),
        "rms_norm": lambda x, w, b: functional.rms_norm(x, size, w, 1e-6),
    }.get(name, NAMED[name][0])
    values = [Value(shape=shape, dtype="bf16") for shape in (("T", 64), (64,), (64,))]
    graph = traced(function, *values)
    erase_unused(graph)
    rowwise(Program(graphs=[graph]), PLAN)
    assert sum(node.op == "call_function" for node in graph.nodes) == 1


@pytest.mark.parametrize(
    "function",
    [lambda x: torch.sort(x, -1), lambda x: x.sum(0), lambda x: x.mean(-1), lambda x: x.t()],
    ids=["sort", "rows", "dropped", "turned"],
)
def test_what_is_no_op_of_a_row_is_refused(function):
    with pytest.raises(Infeasible, match="row"):
        traced(function, Value(shape=("T", 8), dtype="fp32"))

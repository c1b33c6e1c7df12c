"""The row-wise ops: how each is written in Triton and in torch, and what it costs.

A pointwise op takes tiles, numbers of each row, columns that all rows share, and scalars; a
reduction makes a number of each row from all its columns. What torch does in one call, such as
softmax or a layer norm, is several of them (codegen/rowwise_trace.py).

NaN: maximum, minimum and relu hand it on as torch does; `max` of a row may not.
"""

from collections.abc import Mapping
from dataclasses import dataclass

SPREAD = "propagate_nan=tl.PropagateNan.ALL"


@dataclass(frozen=True, kw_only=True)
class RowOp:
    """One op."""

    name: str
    """What its result is called in the sources."""
    triton: str = ""
    """Expression of fp32 operands {0} and {1}; of a reduction, how two partial results join."""
    torch: str = ""
    """The same in torch; empty where codegen/kernels has a reference of it."""
    args: int = 1
    cost: int = 1
    """Instructions an element, roughly: exp and division are several."""
    exact: bool = True
    """Whether both forms round the same number, so that results are equal bit by bit."""
    zero: bool = False
    """Whether zeros give zero, so that columns beyond the last add nothing to a sum."""
    multiplies: bool = False
    """Whether a sum with its result could become one rounding (fma)."""
    start: str = ""
    """Of a reduction: what it begins with; empty for pointwise ops."""


TABLE: Mapping[str, RowOp] = {  # add and mul have two values alike, plus and times any operands
    "add": RowOp(name="total", triton="{0} + {1}", args=2, zero=True),
    "sub": RowOp(name="difference", triton="{0} - {1}", torch="{0} - {1}", args=2, zero=True),
    "mul": RowOp(name="product", triton="{0} * {1}", args=2, zero=True, multiplies=True),
    "div": RowOp(
        name="quotient", triton="{0} / {1}", torch="{0} / {1}", args=2, cost=8, exact=False
    ),
    "plus": RowOp(name="total", triton="{0} + {1}", torch="{0} + {1}", args=2, zero=True),
    "times": RowOp(
        name="product", triton="{0} * {1}", torch="{0} * {1}", args=2, zero=True, multiplies=True
    ),
    "neg": RowOp(name="negative", triton="-{0}", torch="-{0}", zero=True),
    "exp": RowOp(
        name="power", triton="tl.exp({0})", torch="torch.exp({0})", cost=4, exact=False
    ),
    "log": RowOp(
        name="logarithm", triton="tl.log({0})", torch="torch.log({0})", cost=4, exact=False
    ),
    "sqrt": RowOp(
        name="root", triton="tl.sqrt({0})", torch="torch.sqrt({0})", cost=4, exact=False, zero=True
    ),
    "rsqrt": RowOp(
        name="scale", triton="tl.rsqrt({0})", torch="torch.rsqrt({0})", cost=4, exact=False
    ),
    "tanh": RowOp(
        name="bent",
        triton="2.0 / (1.0 + tl.exp(-2.0 * {0})) - 1.0",
        torch="torch.tanh({0})",
        cost=14,
        exact=False,
        zero=True,
    ),
    "sigmoid": RowOp(
        name="share",
        triton="1.0 / (1.0 + tl.exp(-{0}))",
        torch="torch.sigmoid({0})",
        cost=13,
        exact=False,
    ),
    "silu": RowOp(
        name="gate", triton="{0} / (1.0 + tl.exp(-{0}))", cost=13, exact=False, zero=True
    ),
    "gelu": RowOp(
        name="gate",
        triton="0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))",
        torch="torch.nn.functional.gelu({0})",
        cost=20,
        exact=False,
        zero=True,
        multiplies=True,
    ),
    "gelu_tanh": RowOp(
        name="gate",
        triton="{0} / (1.0 + tl.exp(-1.5957691216 * ({0} + 0.044715 * {0} * {0} * {0})))",
        torch='torch.nn.functional.gelu({0}, approximate="tanh")',
        cost=18,
        exact=False,
        zero=True,
    ),
    "relu": RowOp(
        name="positive", triton=f"tl.maximum({{0}}, 0.0, {SPREAD})", torch="torch.relu({0})",
        zero=True,
    ),
    "maximum": RowOp(
        name="larger", triton=f"tl.maximum({{0}}, {{1}}, {SPREAD})",
        torch="torch.maximum({0}, {1})", args=2, zero=True,
    ),
    "minimum": RowOp(
        name="smaller", triton=f"tl.minimum({{0}}, {{1}}, {SPREAD})",
        torch="torch.minimum({0}, {1})", args=2, zero=True,
    ),
    "to_fp32": RowOp(name="wide", cost=0, zero=True),
    "cast": RowOp(name="narrow", triton="{0}", torch="{0}.to({1}.dtype)", args=2, zero=True),
    "rms_norm": RowOp(name="normed", args=3, cost=4, exact=False, zero=True, multiplies=True),
    "sum": RowOp(
        name="added", triton="{0} + {1}", torch="{0}.sum(-1, keepdim=True)", start="0.0",
        exact=False,
    ),
    "mean": RowOp(
        name="mean", triton="{0} + {1}", torch="{0}.mean(-1, keepdim=True)", start="0.0",
        exact=False,
    ),
    "max": RowOp(
        name="most", triton="tl.maximum({0}, {1})", torch="{0}.amax(-1, keepdim=True)",
        start='float("-inf")',
    ),
}  # fmt: skip
REDUCED = tuple(op for op, each in TABLE.items() if each.start)
"""Those that make a number of each row."""

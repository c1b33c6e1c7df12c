"""The ops of a graph that a rank cannot do alone.

The functions say what each one is for a group of one rank; an emitted program calls the method of
that name on its `comm` (plans/ops.py), which the runtime implements.
"""

from typing import TYPE_CHECKING

from codegen.kernels.base import Value

if TYPE_CHECKING:
    import torch


def all_gather(x_RV: "torch.Tensor") -> "torch.Tensor":
    """The tp ranks' shares joined on the last dim."""
    return x_RV


def all_reduce(x_TD: "torch.Tensor") -> "torch.Tensor":
    """Sum over the tp ranks."""
    return x_TD


def merge(out_TNH: "torch.Tensor", lse_TN: "torch.Tensor") -> "torch.Tensor":
    """Partial attention of the kvp groups joined."""
    return out_TNH


def vocab_offset(share: int) -> int:
    """First vocabulary row of this rank, where each rank holds `share` rows."""
    return 0


COLLECTIVES = (all_gather, all_reduce, merge, vocab_offset)


def infer(op: str, args: tuple[Value, ...], tp: int) -> Value:
    """Value of a collective over tp ranks."""
    if op == "vocab_offset":
        return Value(shape=(), dtype="int")
    first = args[0]
    if op == "merge":
        assert args[1].shape == first.shape[:-1], f"lse {args[1]} for {first}"
    if op == "all_gather":
        width = first.shape[-1]
        assert isinstance(width, int), "the last dim has a size"
        return Value(shape=(*first.shape[:-1], width * tp), dtype=first.dtype)
    return first

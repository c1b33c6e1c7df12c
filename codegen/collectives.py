"""The ops of a graph that a rank cannot do alone.

The functions say what each one is for a group of one rank; an emitted program calls the method of
that name on its `comm` (plans/ops.py), which the runtime implements.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from codegen.kernels.base import DTYPE_BYTES, Value

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
IN_PLACE = ("all_reduce",)
"""Those whose result is their argument."""


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


def scratch(
    op: str, args: tuple[Value, ...], sizes: Mapping[str, int], *, tp: int, kvp: int
) -> int:
    """Most bytes that the runtime allocates for a collective besides its result.

    A gather holds the shares beside their join. A merge of rows that all groups share sends its
    (out, lse), receives theirs, and where no kernel of ours merges holds both again, unpacked, and
    once more in fp32.
    """
    first = args[0] if args else None
    if not isinstance(first, Value):
        return 0
    if op == "all_gather":
        return tp * first.storage_bytes(sizes)
    if op == "merge":
        out, lse = (each.storage_bytes(sizes) for each in args)
        return kvp * (3 * (out + lse) + 2 * (4 * out // DTYPE_BYTES[first.dtype]))
    return 0

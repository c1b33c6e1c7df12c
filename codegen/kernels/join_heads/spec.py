"""Rules of `join_heads`: the inverse of `split_heads`; a view, since attention writes densely."""

from codegen.kernels.base import Spec, Value


def infer(x: Value) -> Value:
    """The last two dims as one."""
    heads, head_dim = x.shape[-2:]
    assert isinstance(heads, int), "heads have a number"
    assert isinstance(head_dim, int), "heads have a size"
    return Value(shape=(*x.shape[:-2], heads * head_dim), dtype=x.dtype)


SPEC = Spec(op="join_heads", infer=infer, view=True)

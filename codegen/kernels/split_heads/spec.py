"""Rules of `split_heads`: the last dim is whole heads; the result is a view."""

from codegen.kernels.base import Spec, Value


def infer(x: Value, head_dim: int) -> Value:
    """The last dim as (heads, head_dim)."""
    width = x.shape[-1]
    assert isinstance(width, int), "the last dim has a size"
    assert width % head_dim == 0, f"{width} columns are no whole heads of {head_dim}"
    return Value(shape=(*x.shape[:-1], width // head_dim, head_dim), dtype=x.dtype)


SPEC = Spec(op="split_heads", infer=infer, view=True)

"""Rules of `split`: sizes add up to the last dim; the parts are views."""

from codegen.kernels.base import Spec, Value


def infer(x: Value, sizes: tuple[int, ...]) -> tuple[Value, ...]:
    """One value a size."""
    assert sum(sizes) == x.shape[-1], f"{sizes} do not cut {x}"
    return tuple(Value(shape=(*x.shape[:-1], size), dtype=x.dtype) for size in sizes)


SPEC = Spec(op="split", infer=infer, view=True)

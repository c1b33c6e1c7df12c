"""Rules of `select_rows`: the first dim becomes that of the row numbers."""

from codegen.kernels.base import Spec, Value


def infer(x: Value, rows: Value) -> Value:
    """Rows of x."""
    return Value(shape=(rows.shape[0], *x.shape[1:]), dtype=x.dtype)


SPEC = Spec(op="select_rows", infer=infer)

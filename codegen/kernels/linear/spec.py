"""Rules of `linear`."""

from codegen.kernels.base import Spec, Value


def infer(x: Value, weight: Value, bias: Value | None) -> Value:
    """x with the weight's rows as its last dim."""
    assert x.shape[-1] == weight.shape[1], f"{x} times {weight}"
    assert bias is None or bias.shape == weight.shape[:1], f"bias {bias} for {weight}"
    return Value(shape=(*x.shape[:-1], weight.shape[0]), dtype=x.dtype)


SPEC = Spec(op="linear", infer=infer)

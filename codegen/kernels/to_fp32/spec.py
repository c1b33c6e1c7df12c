"""Rules of `to_fp32`."""

from codegen.kernels.base import Spec, Value


def infer(x: Value) -> Value:
    """Same shape, fp32."""
    return Value(shape=x.shape, dtype="fp32")


SPEC = Spec(op="to_fp32", infer=infer)

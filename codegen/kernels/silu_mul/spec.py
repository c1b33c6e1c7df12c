"""Rules of `silu_mul`: the last dim halves."""

from codegen.kernels.base import Spec, Value


def infer(gate_up: Value) -> Value:
    """Half as wide."""
    width = gate_up.shape[-1]
    assert isinstance(width, int), "the last dim has a size"
    assert width % 2 == 0, f"{width} columns have no two halves"
    return Value(shape=(*gate_up.shape[:-1], width // 2), dtype=gate_up.dtype)


SPEC = Spec(op="silu_mul", infer=infer)

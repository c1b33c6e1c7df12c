"""Rules of `rope`: one frequency for each pair of a head's elements."""

from codegen.kernels.base import Spec, Value


def infer(x: Value, positions: Value, inv_freq: Value, scale: float) -> Value:
    """As x."""
    half = inv_freq.shape[0]
    assert isinstance(half, int), "frequencies have a number"
    assert x.shape[-1] == 2 * half, f"{half} frequencies for {x}"
    assert positions.shape[0] == x.shape[0], f"positions {positions} for {x}"
    return x


SPEC = Spec(op="rope", infer=infer)

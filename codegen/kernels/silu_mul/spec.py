"""Rules of `silu_mul`: the last dim halves."""

from codegen.kernels.base import Compilation, Spec, Value


def infer(gate_up: Value) -> Value:
    """Half as wide."""
    width = gate_up.shape[-1]
    assert isinstance(width, int), "the last dim has a size"
    assert width % 2 == 0, f"{width} columns have no two halves"
    return Value(shape=(*gate_up.shape[:-1], width // 2), dtype=gate_up.dtype)


SPEC = Spec(
    op="silu_mul",
    infer=infer,
    params={"BLOCK": 2048},
    cases=(
        {"shape": (1, 64), "dtype": "fp32"},
        {"shape": (3, 5120), "dtype": "bf16"},
        {"shape": (2, 1000), "dtype": "fp16"},
        {"shape": (5, 1, 96), "dtype": "bf16"},
    ),
    # The sigmoid is off by some units of fp32, so silu may round to the other neighbour, and the
    # product again: two units.
    tolerance={"fp32": 2**-20, "bf16": 2**-6, "fp16": 2**-9},
    compilations=(
        Compilation(
            kernel="silu_mul_kernel",
            types={"gate_up_ptr": "*bf16", "out_ptr": "*bf16", "width": "i32"},
            constants={"BLOCK": 2048},
            multiples_of_16=("width",),
            num_stages=1,
            streams=True,
        ),
    ),
)

"""Rules, cases and tolerance of `add_rms_norm`."""

from codegen.kernels.base import Compilation, Spec, Value

POINTERS = ("x_ptr", "residual_ptr", "weight_ptr", "normed_ptr", "sum_ptr")


def infer(x: Value, residual: Value, weight: Value, eps: float) -> tuple[Value, Value]:
    """(normed, sum), both as x."""
    assert x == residual, f"add of {x} and {residual}"
    assert weight.shape == x.shape[-1:], f"weight {weight} for {x}"
    return x, x


SPEC = Spec(
    op="add_rms_norm",
    infer=infer,
    params={"MAX_BLOCK": 16384, "ELEMENTS_A_WARP": 1024},
    cases=(
        {"shape": (1, 64), "dtype": "fp32"},
        {"shape": (3, 5120), "dtype": "bf16"},
        {"shape": (5, 96), "dtype": "bf16"},
        {"shape": (2, 1000), "dtype": "fp32"},
        {"shape": (1, 20000), "dtype": "bf16"},  # wider than MAX_BLOCK: the row is read twice
        {"shape": (2, 8192), "dtype": "fp16"},
    ),
    # The sum is one rounded addition, so it is equal bit by bit; the norm is off as that of
    # rms_norm is: the order of the sum of squares, and from it one unit in each of two roundings.
    tolerance={"fp32": 2**-20, "bf16": 2**-6, "fp16": 2**-9},
    compilations=tuple(
        Compilation(
            kernel="add_rms_norm_kernel",
            types={
                **dict.fromkeys(POINTERS, f"*{dtype}"),
                "width": "i32",
                "eps": "fp32",
            },
            constants={"BLOCK": block, "WHOLE": whole},
            multiples_of_16=("width",),
            num_warps=warps,
            streams=True,
        )
        for dtype, block, whole, warps in (
            ("bf16", 4096, True, 4),
            ("bf16", 8192, True, 8),
            ("bf16", 16384, True, 16),
            ("bf16", 16384, False, 16),
            ("fp32", 8192, True, 8),
        )
    ),
)

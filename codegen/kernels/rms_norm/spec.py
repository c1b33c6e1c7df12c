"""Rules, cases and tolerance of `rms_norm`."""

from codegen.kernels.base import Compilation, Spec, Value


def infer(x: Value, weight: Value, eps: float) -> Value:
    """As x."""
    assert weight.shape == x.shape[-1:], f"weight {weight} for {x}"
    return x


SPEC = Spec(
    op="rms_norm",
    infer=infer,
    params={"MAX_BLOCK": 16384, "ELEMENTS_A_WARP": 1024},
    cases=(
        {"shape": (1, 64), "dtype": "fp32"},
        {"shape": (3, 5120), "dtype": "bf16"},
        {"shape": (5, 96), "dtype": "bf16"},
        {"shape": (2, 1000), "dtype": "fp32"},
        {"shape": (1, 20000), "dtype": "bf16"},  # wider than MAX_BLOCK: the row is read twice
        {"shape": (7, 3, 128), "dtype": "bf16", "columns": 1024},  # heads of a fused projection
        {"shape": (2, 8192), "dtype": "fp16"},
    ),
    # Only the order of the sum of squares differs from the reference, so 1 / rms differs by a few
    # parts in 2^24 (pairwise sums of at most 2^15 terms: 15 / 2, plus rsqrt, division, product):
    # below 2^-20 for fp32. In 16 bits that can move each of the two roundings, of the normed value
    # and of the product, to the neighbour: 2 units of at most 2^-7 (bf16) or 2^-10 (fp16).
    tolerance={"fp32": 2**-20, "bf16": 2**-6, "fp16": 2**-9},
    compilations=tuple(
        Compilation(
            kernel="rms_norm_kernel",
            types={
                **dict.fromkeys(("x_ptr", "weight_ptr", "normed_ptr"), f"*{dtype}"),
                **dict.fromkeys(("heads", "stride_t", "stride_n", "width"), "i32"),
                "eps": "fp32",
            },
            constants={"BLOCK": block, "WHOLE": whole},
            multiples_of_16=("stride_t", "stride_n", "width"),
            num_warps=warps,
            streams=block > 1024,  # a short row has too few bytes for a warp's 512
        )
        for dtype, block, whole, warps in (
            ("bf16", 128, True, 1),
            ("bf16", 4096, True, 4),
            ("bf16", 8192, True, 8),
            ("bf16", 16384, True, 16),
            ("bf16", 16384, False, 16),
            ("fp32", 8192, True, 8),
        )
    ),
)

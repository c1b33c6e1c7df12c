"""Rules, cases and tolerance of `silu_mul`, a generated region (codegen/rowwise_library.py)."""

from codegen.rowwise_library import named

SPEC = named(
    "silu_mul",
    cases=(
        {"shape": (1, 64), "dtype": "fp32"},
        {"shape": (3, 5120), "dtype": "bf16"},
        {"shape": (2, 1000), "dtype": "fp16"},
        {"shape": (5, 1, 96), "dtype": "bf16"},
    ),
    # The sigmoid is off by some units of fp32, so silu may round to the other neighbour, and the
    # product again: two units.
    tolerance={"fp32": 2**-20, "bf16": 2**-6, "fp16": 2**-9},
    compiled=(("bf16", 14336), ("bf16", 1024), ("fp32", 14336)),
)

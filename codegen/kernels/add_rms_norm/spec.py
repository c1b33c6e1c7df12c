"""Rules, cases and tolerance of `add_rms_norm`, a generated region (codegen/rowwise_library.py)."""

from codegen.rowwise_library import named

SPEC = named(
    "add_rms_norm",
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
    compiled=(
        ("bf16", 4096),
        ("bf16", 8192),
        ("bf16", 16384),
        ("bf16", 20480),
        ("fp32", 8192),
    ),
)

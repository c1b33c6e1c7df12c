"""Cases and tolerance of `rms_norm`, whose kernel is generated (codegen/rowwise_library.py)."""

from codegen.rowwise_library import named

SPEC = named(
    "rms_norm",
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
    compiled=(
        ("bf16", 128),
        ("bf16", 4096),
        ("bf16", 8192),
        ("bf16", 16384),
        ("bf16", 20480),
        ("fp32", 8192),
    ),
)

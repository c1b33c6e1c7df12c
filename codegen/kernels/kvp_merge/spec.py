"""Rules of `kvp_merge`: the groups' partial attention joined in the rows of this group's own.

No graph calls it: a program of several kvp groups hands it on with `kvp_pack` (see there).
"""

from codegen.kernels.base import DTYPE_BYTES, Compilation, Spec, Value
from codegen.kernels.kvp_pack.spec import infer as packed
from codegen.kernels.kvp_pack.spec import takes


def infer(
    out: Value, lse: Value, rows: Value, shares: Value, places: Value, received: Value
) -> Value:
    """The heads, whose shared rows are new."""
    entries = Value(shape=places.shape[1:], dtype="int64")
    assert received == packed(out, lse, entries, places), f"received {received} by {places}"
    assert rows.dtype == "int64", f"rows {rows}"
    assert shares == Value(shape=(shares.shape[0], *rows.shape), dtype="int32"), f"shares {shares}"
    return out


def _compilation(dtype: str, head_dim: int, groups: int) -> Compilation:
    return Compilation(
        kernel="kvp_merge_kernel",
        types={
            "out_ptr": f"*{dtype}",
            "lse_ptr": "*fp32",
            "rows_ptr": "*i64",
            "places_ptr": "*i32",
            "shares_ptr": "*i32",
            "received_ptr": f"*{dtype}",
            "received_lse_ptr": "*fp32",
            **dict.fromkeys(("entries", "shared", "heads"), "i32"),
        },
        constants={
            "GROUPS": groups,
            "HEAD": head_dim,
            "HEADS": 8,
            "SIZE": DTYPE_BYTES[dtype],
            "ALIGNED": True,
        },
        num_stages=3,  # as launched: Triton's own default
        streams=head_dim * DTYPE_BYTES[dtype] >= 256,  # else HEADS have no 16 bytes for a thread
    )


SPEC = Spec(
    op="kvp_merge",
    infer=infer,
    view=True,
    params={"HEADS": 8},
    # The same sums in the same order, for values up to 4 and 8 groups: weights differ by 2 units of
    # fp32, the 8 products, sums and the quotient of either side round by half a unit each, so
    # 4 x (2 x 2^-23 + 18 x 2^-24) < 2^-17. In 16 bits that can move the one rounding to the
    # neighbour: a unit of at most 2^-7 (bf16) or 2^-10 (fp16) of the value.
    tolerance={"fp32": 2**-17, "bf16": 2**-7, "fp16": 2**-10},
    compilations=(
        _compilation("bf16", 128, 2),
        _compilation("bf16", 128, 8),
        _compilation("bf16", 64, 4),
        _compilation("fp32", 128, 4),
    ),
    takes=takes,
)

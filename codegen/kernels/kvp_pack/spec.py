"""Rules of `kvp_pack`: the shared tokens' partial attention as bytes, peer behind peer.

No graph calls it: a program of several kvp groups hands it on with `kvp_merge`, for the runtime's
exchange (runtime/parallel/kvp.py), which swaps the bytes between the two.
"""

from codegen.kernels.base import DTYPE_BYTES, Compilation, Spec, Value


def infer(out: Value, lse: Value, rows: Value, places: Value) -> Value:
    """As many bytes as the entries take."""
    assert len(out.shape) == 3, f"heads {out}"
    assert lse == Value(shape=out.shape[:2], dtype="fp32"), f"log sums {lse} of {out}"
    assert rows.dtype == "int64", f"rows {rows}"
    assert places == Value(shape=(3, *rows.shape), dtype="int32"), f"places {places} of {rows}"
    (entries,), (_, heads, head_dim) = rows.shape, out.shape
    assert isinstance(entries, int), "an exchange knows its entries"
    assert isinstance(heads, int), "heads are counted"
    assert isinstance(head_dim, int), "heads have a size"
    return Value(shape=(entries * heads * (head_dim * DTYPE_BYTES[out.dtype] + 4),), dtype="uint8")


def takes(out: Value, *_others: Value) -> bool:
    """Heads of a power of two: tiles are."""
    head_dim = out.shape[-1]
    assert isinstance(head_dim, int), "heads have a size"
    return head_dim & (head_dim - 1) == 0


def _compilation(dtype: str, head_dim: int) -> Compilation:
    return Compilation(
        kernel="kvp_pack_kernel",
        types={
            "out_ptr": f"*{dtype}",
            "lse_ptr": "*fp32",
            "rows_ptr": "*i64",
            "places_ptr": "*i32",
            "sent_ptr": f"*{dtype}",
            "sent_lse_ptr": "*fp32",
            **dict.fromkeys(("entries", "heads"), "i32"),
        },
        constants={"HEAD": head_dim, "HEADS": 8, "SIZE": DTYPE_BYTES[dtype], "ALIGNED": True},
        num_stages=3,  # as launched: Triton's own default
        streams=head_dim * DTYPE_BYTES[dtype] >= 256,  # else HEADS have no 16 bytes for a thread
    )


SPEC = Spec(
    op="kvp_pack",
    infer=infer,
    params={"HEADS": 8},
    # A copy; tests/codegen/test_kvp_kernels.py compares the bytes.
    tolerance=dict.fromkeys(("fp32", "bf16", "fp16"), 0.0),
    compilations=(_compilation("bf16", 128), _compilation("bf16", 64), _compilation("fp32", 128)),
    parts=("places",),
    takes=takes,
)

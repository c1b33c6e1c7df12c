"""Rules of `paged_attention`: as attention, keys from the pages, with the softmax's log sum."""

from codegen.kernels.base import Compilation, Spec, Value

FIELDS = 9
"""As work.ITEM_FIELDS."""
TYPES = {
    "q_ptr": "*bf16",
    "out_ptr": "*bf16",
    "lse_ptr": "*fp32",
    "partial_ptr": "*fp32",
    "partial_lse_ptr": "*fp32",
    "items_ptr": "*i32",
    "table_ptr": "*i32",
    "scale2": "fp32",
    "items": "i32",
    "table_stride": "i32",
    "kv_heads": "i32",
    "group": "i32",
    "tile_tokens": "i32",
    "heads_together": "i32",
}


def infer(
    q: Value, k_pages: Value, v_pages: Value, written: Value, inputs: Value, scale: float
) -> tuple[Value, Value]:
    """(out, lse): out as q, lse fp32."""
    heads, kv_heads = q.shape[-2], k_pages.shape[-2]
    assert isinstance(heads, int), "heads have a number"
    assert isinstance(kv_heads, int), "KV heads have a number"
    assert heads % kv_heads == 0, f"{heads} heads share {kv_heads} KV heads"
    assert q.shape[-1] == k_pages.shape[-1], f"heads of {q} and pages {k_pages}"
    assert written == k_pages == v_pages, f"pages {k_pages}, {v_pages}, written {written}"
    return q, Value(shape=q.shape[:-1], dtype="fp32")


def takes(
    q: Value, k_pages: Value, v_pages: Value, written: Value, inputs: Value, scale: float
) -> bool:
    """Head sizes and pages that the kernels are checked for; 16 bits, as tensor cores want them."""
    (_, page_tokens, kv_heads, head_dim), heads = k_pages.shape, q.shape[-2]
    assert isinstance(heads, int), "heads have a number"
    assert isinstance(kv_heads, int), "KV heads have a number"
    types = q.dtype in {"bf16", "fp16"} and k_pages.dtype in {q.dtype, "fp8"}
    return (
        types
        and page_tokens in {16, 32, 64, 128, 256}
        and head_dim in {64, 128}
        and heads // kv_heads <= 64
    )


def _triton(rows: int, keys: int, head: int, page: int, stages: int, warps: int) -> Compilation:
    return Compilation(
        kernel="attention_kernel",
        types={**TYPES, **dict.fromkeys(("k_desc", "v_desc"), f"tensordesc<bf16[{keys}, {head}]>")},
        constants={
            "HEAD": head,
            "PAGE": page,
            "BLOCK_M": rows,
            "BLOCK_S": keys,
            "MASK_ALL": rows < 64,
            "STAGES": stages,
            "FIELDS": FIELDS,
        },
        num_warps=warps,
        num_stages=stages,
        tile_rows=rows,
        # mma.sync takes operands from registers, so its pipeline holds one tile less
        buffers=stages if rows >= 64 else stages - 1,
    )


def _gluon(head: int, page: int, *, one_masked_tile: bool) -> Compilation:
    return Compilation(
        kernel="attention_kernel",
        module="gluon",
        types={**TYPES, **dict.fromkeys(("k_desc", "v_desc"), f"tensordesc<bf16[{page}, {head}]>")},
        constants={
            "HEAD": head,
            "PAGE": page,
            "BLOCK_S": 128,
            "ONE_MASKED_TILE": one_masked_tile,
            "STAGES": 2,
            "CONSUMER": 240,
            "PRODUCER": 24,
            "FIELDS": FIELDS,
        },
        num_warps=4,
        specialised_warps=8,  # a second group of four, and the fetching warp, padded to four
        tile_rows=64,
        buffers=2,
        overlaps=True,
    )


MERGE = Compilation(
    kernel="merge_kernel",
    types={**{name: each for name, each in TYPES.items() if name.endswith("_ptr")},
           "merges_ptr": "*i32"},
    constants={
        "KV_HEADS": 8,
        "GROUP": 4,
        "HEAD": 128,
        "BLOCK_M": 16,
        "TILE_ROWS": 16,
        "SLOTS": 16,
        "FIELDS": 5,
    },
    streams=True,
)  # fmt: skip


SPEC = Spec(
    op="paged_attention",
    infer=infer,
    params={
        "CHUNK_ROWS": 64,
        "CHUNK_KEYS": 64,
        "CHUNK_STAGES": 3,
        "CHUNK_WARPS": 4,
        "HOPPER_KEYS": 128,
        "DECODE_KEYS": 128,
        "DECODE_STAGES": 3,
        "DECODE_WARPS": 4,
        "GLUON": 1,
        "L2_BYTES": 41943040,
        "MERGE_SLOTS": 16,
    },
    # Checked by tests/codegen/test_attention_kernels.py, whose steps are no plain shapes. P and the
    # result are rounded to 16 bits, |out| is at most the largest |v|, which is below 8 in normal
    # data: each rounding is off by half a unit of a value below 8, and P by half a unit of one
    # below 1, weighing |v|. fp32: sums of up to 16384 products in another order.
    tolerance={"fp32": 2**-16, "bf16": 2**-5, "fp16": 2**-8},
    compilations=(
        _triton(16, 128, 128, 128, 3, 4),
        _triton(16, 64, 64, 64, 3, 4),
        _triton(64, 64, 128, 128, 3, 4),
        _triton(64, 64, 64, 64, 3, 4),
        _triton(64, 16, 128, 16, 3, 4),
        MERGE,
        _gluon(128, 128, one_masked_tile=True),
        _gluon(128, 64, one_masked_tile=False),
        _gluon(64, 128, one_masked_tile=True),
    ),
    parts=("work", "gluon"),
    takes=takes,
)

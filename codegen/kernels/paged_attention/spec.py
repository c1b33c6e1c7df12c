"""Rules of `paged_attention`: as attention, keys from the pages, with the softmax's log sum."""

from collections.abc import Mapping

from codegen.kernels.base import Compilation, Search, Spec, Value

from .scratch import library_scratch, torch_scratch, triton_kept

FIELDS = 12
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
    q: Value,
    k_pages: Value,
    v_pages: Value,
    written: Value,
    inputs: Value,
    scale: float,
    k_scales: Value | None = None,
    v_scales: Value | None = None,
) -> tuple[Value, Value]:
    """(out, lse): out as q, lse fp32."""
    heads, kv_heads = q.shape[-2], k_pages.shape[-2]
    assert isinstance(heads, int), "heads have a number"
    assert isinstance(kv_heads, int), "KV heads have a number"
    assert heads % kv_heads == 0, f"{heads} heads share {kv_heads} KV heads"
    assert q.shape[-1] == k_pages.shape[-1], f"heads of {q} and pages {k_pages}"
    assert written == k_pages == v_pages, f"pages {k_pages}, {v_pages}, written {written}"
    assert k_scales == v_scales, f"scales {k_scales} and {v_scales}"
    assert (k_scales is None) == (k_pages.dtype != "fp8"), f"scales {k_scales} of {k_pages}"
    return q, Value(shape=q.shape[:-1], dtype="fp32")


def takes(
    q: Value,
    k_pages: Value,
    v_pages: Value,
    written: Value,
    inputs: Value,
    scale: float,
    k_scales: Value | None = None,
    v_scales: Value | None = None,
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


def flash_attn_takes(
    q: Value,
    k_pages: Value,
    v_pages: Value,
    written: Value,
    inputs: Value,
    scale: float,
    k_scales: Value | None = None,
    v_scales: Value | None = None,
) -> bool:
    """What all versions of FlashAttention take: 16 bits everywhere, heads up to 256 in steps of 8.

    FA2 wants pages of a multiple of 256, others are gathered.
    """
    head_dim = k_pages.shape[-1]
    assert isinstance(head_dim, int), "heads have a size"
    types = q.dtype in {"bf16", "fp16"} and k_pages.dtype == q.dtype
    return types and head_dim % 8 == 0 and head_dim <= 256


def _triton(
    rows: int,
    keys: int,
    head: int,
    page: int,
    stages: int,
    warps: int,
    pages: str = "bf16",
    *,
    merged: bool = False,
) -> Compilation:
    scales = dict.fromkeys(("k_scales_ptr", "v_scales_ptr"), "*fp32")
    boxes = dict.fromkeys(("k_desc", "v_desc"), f"tensordesc<{pages}[{keys}, {head}]>")
    return Compilation(
        kernel="attention_kernel",
        module="tiles",
        types={**TYPES, "counters_ptr": "*i32", **scales, **boxes},
        constants={
            "HEAD": head,
            "PAGE": page,
            "BLOCK_M": rows,
            "BLOCK_S": keys,
            "MASK_ALL": rows < 64,
            "SCALED": pages != "bf16",
            "CAST_ASM": pages != "bf16",
            "MERGED": merged,
            "MERGE_ROWS": 4,
            "MERGE_SLOTS": 32,
            "STAGES": stages,
            "FIELDS": FIELDS,
            "OVERLAP": int(rows < 64),
        },
        num_warps=warps,
        num_stages=stages,
        tile_rows=rows,
        # mma.sync takes operands from registers, as does what casts fp8: one tile less in flight
        buffers=stages if rows >= 64 and pages == "bf16" else stages - 1,
    )


def _gluon(head: int, page: int, *, one_masked_tile: bool, mixed: bool = False) -> Compilation:
    return Compilation(
        kernel="attention_kernel",
        module="gluon",
        types={**TYPES, **dict.fromkeys(("k_desc", "v_desc"), f"tensordesc<bf16[{page}, {head}]>")},
        constants={
            "HEAD": head,
            "PAGE": page,
            "BLOCK_S": 128,
            "ONE_MASKED_TILE": one_masked_tile,
            "MIXED": mixed,
            "STAGES": 3 if mixed else 2,
            "CONSUMER": 240,
            "PRODUCER": 24,
            "FIELDS": FIELDS,
        },
        num_warps=4,
        specialised_warps=8,  # a second group of four, and the fetching warp, padded to four
        tile_rows=64,
        buffers=3 if mixed else 2,
        overlaps=True,
    )


def _decode(params: Mapping[str, int], sizes: Mapping[str, int]) -> tuple[Compilation, ...]:
    """The kernel of a decode: 16 rows, or a token's query heads where those are more."""
    rows = max(16, 1 << (sizes["heads"] // sizes["kv_heads"] - 1).bit_length())
    keys = min(params["DECODE_KEYS"], sizes["page_tokens"])
    stages, warps = params["DECODE_STAGES"], params["DECODE_WARPS"]
    return (_triton(rows, keys, sizes["head_dim"], sizes["page_tokens"], stages, warps),)


def _short(params: Mapping[str, int], sizes: Mapping[str, int]) -> tuple[Compilation, ...]:
    """The portable kernel of a chunk."""
    rows, keys = params["CHUNK_ROWS"], min(params["CHUNK_KEYS"], sizes["page_tokens"])
    stages, warps = params["CHUNK_STAGES"], params["CHUNK_WARPS"]
    return (_triton(rows, keys, sizes["head_dim"], sizes["page_tokens"], stages, warps),)


def _merge(rows: int, slots: int) -> Compilation:
    pointers = {name: each for name, each in TYPES.items() if name.endswith("_ptr")}
    return Compilation(
        kernel="merge_kernel",
        module="tiles",
        types={**pointers, "merges_ptr": "*i32", "tile_tokens": "i32"},
        constants={
            "KV_HEADS": 8,
            "GROUP": 4,
            "HEAD": 128,
            "BLOCK_M": 16,
            "ROWS": rows,
            "SLOTS": slots,
            "FIELDS": 5,
            "OVERLAP": 1,
        },
        num_warps=1,
        streams=True,
    )


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
        "MERGE_SLOTS": 32,
        "DECODE_LEAST": 1,
        "FUSE_MERGE": 1,
        "APART_TILES": 4,
        "MIXED": 1,
        "FUSED_ROWS": 128,
        "MERGE_WARPS": 1,
        "MERGE_ROWS": 32,
        "FEW_TOKENS": 16,
        "FEW_SLOTS": 8,
        "OVERLAP": 1,
        "DECODE_RESIDENT": 3,
        "DECODE_WAVES": 1,
        "DECODE_COST_HOPPER": 70,
        "DECODE_COST": 100,
        "FP8_KEYS": 128,
        "FP8_STAGES": 2,
    },
    searches=(
        Search(
            regime="decode",
            values={
                "DECODE_KEYS": (32, 64, 128),
                "DECODE_STAGES": (2, 3, 4, 5),
                "DECODE_WARPS": (2, 4, 8),
            },
            compilations=_decode,
        ),
        Search(
            regime="short",  # so few rows that Hopper takes this kernel too
            values={
                "CHUNK_ROWS": (64, 128),
                "CHUNK_KEYS": (64, 128),
                "CHUNK_STAGES": (2, 3, 4),
                "CHUNK_WARPS": (4, 8),
            },
            compilations=_short,
        ),
        Search(regime="chunk", values={"L2_BYTES": (20971520, 31457280, 41943040, 52428800)}),
    ),
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
        _triton(16, 128, 128, 128, 3, 4, "fp8e4nv"),
        _triton(64, 128, 128, 128, 2, 4, "fp8e4nv"),
        _triton(64, 64, 64, 64, 2, 4, "fp8e4nv"),
        _triton(16, 128, 128, 128, 3, 4, merged=True),
        _merge(4, 8),
        _merge(1, 8),
        _merge(1, 32),
        _gluon(128, 128, one_masked_tile=True),
        _gluon(128, 64, one_masked_tile=False),
        _gluon(64, 128, one_masked_tile=True),
        _gluon(128, 128, one_masked_tile=True, mixed=True),
        _gluon(128, 64, one_masked_tile=False, mixed=True),
    ),
    parts=("work", "recorded", "launch", "tiles", "gluon"),
    takes=takes,
    libraries={"flash_attn": flash_attn_takes},
    scratch={"torch": torch_scratch, "flash_attn": library_scratch},
    kept={"triton": triton_kept},
)

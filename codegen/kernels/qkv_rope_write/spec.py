"""Rules of `qkv_rope_write`: rows of the weight are heads of queries, of keys, of values."""

from codegen.kernels.base import Compilation, Largest, Range, Spec, Value
from codegen.kernels.linear.spec import DEFAULTS, TUNABLES, kept, product, searches


def infer(
    x: Value,
    weight: Value,
    bias: Value | None,
    q_norm: Value | None,
    k_norm: Value | None,
    eps: float,
    cos_sin: Value,
    k_pages: Value,
    v_pages: Value,
    slots: Value,
    k_scales: Value | None = None,
    v_scales: Value | None = None,
) -> tuple[Value, Value]:
    """(queries, the written pages)."""
    kv_heads, head_dim = k_pages.shape[2:]
    assert isinstance(kv_heads, int), "KV heads have a number"
    assert isinstance(head_dim, int), "heads have a size"
    rows = weight.shape[0]
    assert isinstance(rows, int), "weights have sizes"
    heads, rest = divmod(rows - 2 * kv_heads * head_dim, head_dim)
    assert rest == 0, f"{rows} rows are no heads of {head_dim}"
    assert heads >= kv_heads, f"{heads} heads and {kv_heads} KV heads in {weight}"
    assert x.shape[-1] == weight.shape[1], f"{x} times {weight}"
    assert bias is None or bias.shape == weight.shape[:1], f"bias {bias} for {weight}"
    assert q_norm == k_norm, f"norms {q_norm} and {k_norm}"
    assert q_norm is None or q_norm.shape == (head_dim,), f"norm {q_norm} of heads of {head_dim}"
    assert cos_sin.shape == (x.shape[0], 2, head_dim // 2), f"turns {cos_sin} for {x}"
    assert k_pages == v_pages, f"pages {k_pages} and {v_pages}"
    scales = Value(shape=(k_pages.shape[0], kv_heads), dtype="fp32")
    scaled = scales if k_pages.dtype == "fp8" else None
    assert k_scales == v_scales == scaled, f"scales {k_scales}, {v_scales} of pages {k_pages}"
    assert k_pages.dtype in {x.dtype, "fp8"}, f"pages {k_pages} for {x}"
    assert slots.shape == x.shape[:1], f"slots {slots} for {x}"
    return Value(shape=(x.shape[0], heads, head_dim), dtype=x.dtype), k_pages


def takes(x: Value, weight: Value, *others: Value) -> bool:
    """Any heads; for pages in fp8, those that kv_write takes."""
    head_dim = others[5].shape[-1]
    assert isinstance(head_dim, int), "heads have a size"
    return others[5].dtype != "fp8" or head_dim & (head_dim - 1) == 0


def scratch(steps: Largest, x: Value, weight: Value, *others: Value) -> int:
    """The whole projection, where the library multiplies; keys and values before they are fp8."""
    pages, tokens = others[5], x.shape[0]
    found = [Value(shape=(tokens, weight.shape[0]), dtype=x.dtype)]
    if pages.dtype == "fp8":
        row = Value(shape=(tokens, *pages.shape[2:]), dtype=x.dtype)
        found += [row, row, Value(shape=(tokens,), dtype="int64")]
    return sum(each.storage_bytes(steps.sizes) for each in found)


def _pointwise(head: int, *, norm: bool, block_n: int = 16) -> Compilation:
    pointers = ("y", "out", "q_norm", "k_norm", "k_pages", "v_pages")
    return Compilation(
        kernel="finish_heads_kernel",
        module="pointwise",
        types={
            **{f"{name}_ptr": "*bf16" for name in pointers},
            "cos_sin_ptr": "*fp32",
            "slots_ptr": "*i64",
            "heads": "i32",
            "kv_heads": "i32",
            "eps": "fp32",
        },
        constants={"NORM": norm, "HALF": head // 2, "BLOCK_N": block_n, "BLOCK_H2": head // 2},
        num_warps=min(max(block_n * head // 512, 1), 8),
        streams=True,
    )


SPEC = Spec(
    op="qkv_rope_write",
    infer=infer,
    scratch={"triton": scratch},
    kept={"triton": kept},
    params={**DEFAULTS, "NORM_TOKENS_MAX": 32, "HEADS_A_BLOCK": 16},
    searches=searches(2),
    ranges=(
        Range(tokens_max="TOKENS_MAX", target="triton", params=(*TUNABLES, "NORM_TOKENS_MAX")),
        Range(target="triton", params=("HEADS_A_BLOCK",)),  # the library's product, and one pass
    ),
    # Checked by tests/codegen/test_gemm_kernels.py. The reference rounds the product, the norm, its
    # weighting and the rotation, ours only the last: half a unit each, of values below 8 in normal
    # data, of which the rotation adds two.
    tolerance={"bf16": 2**-4, "fp16": 2**-7, "fp32": 2**-16},
    compilations=(
        product(2, 32, 16, 256, split=False),
        product(2, 64, 16, 256, split=True, norm=True),
        product(2, 32, 64, 128, split=False, head=64, norm=True),
        _pointwise(128, norm=False),
        _pointwise(64, norm=True),
    ),
    parts=("pointwise",),
    takes=takes,
)

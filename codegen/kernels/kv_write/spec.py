"""Rules of `kv_write`: the pages hold heads of K and V; the result stands for their new content."""

from collections.abc import Mapping

from codegen.kernels.base import Compilation, Search, Spec, Value


def infer(
    k: Value,
    v: Value,
    k_pages: Value,
    v_pages: Value,
    slots: Value,
    k_scales: Value | None = None,
    v_scales: Value | None = None,
) -> Value:
    """The written pages."""
    scales = Value(shape=(k_pages.shape[0], k_pages.shape[2]), dtype="fp32")
    wanted = scales if k_pages.dtype == "fp8" else None
    assert k_scales == v_scales == wanted, f"scales {k_scales}, {v_scales} of pages {k_pages}"
    assert k == v, f"K {k} and V {v}"
    assert k_pages == v_pages, f"pages {k_pages} and {v_pages}"
    assert k.shape[-2:] == k_pages.shape[-2:], f"heads of {k} in pages {k_pages}"
    assert slots.shape[0] == k.shape[0], f"slots {slots} for {k}"
    return k_pages


def takes(
    k: Value,
    v: Value,
    k_pages: Value,
    v_pages: Value,
    slots: Value,
    k_scales: Value | None = None,
    v_scales: Value | None = None,
) -> bool:
    """Any rows; heads in fp8 are a power of two."""
    head_dim = k_pages.shape[-1]
    assert isinstance(head_dim, int), "heads have a size"
    return k_scales is None or head_dim & (head_dim - 1) == 0


def _compilation(pages: str, block: int, warps: int) -> Compilation:
    return Compilation(
        kernel="kv_write_kernel",
        types={
            "k_ptr": "*bf16",
            "v_ptr": "*bf16",
            "k_pages_ptr": f"*{pages}",
            "v_pages_ptr": f"*{pages}",
            "slots_ptr": "*i64",
            **dict.fromkeys(("k_stride", "v_stride", "width"), "i32"),
        },
        constants={"BLOCK": block},
        multiples_of_16=("k_stride", "v_stride", "width"),
        num_warps=warps,
        num_stages=1,
        streams=True,
    )


SCALED = Compilation(
    kernel="kv_write_scaled_kernel",
    types={
        **dict.fromkeys(("k_ptr", "v_ptr"), "*bf16"),
        **dict.fromkeys(("k_pages_ptr", "v_pages_ptr"), "*fp8e4nv"),
        **dict.fromkeys(("k_scales_ptr", "v_scales_ptr"), "*fp32"),
        "slots_ptr": "*i64",
        **dict.fromkeys(("k_stride", "v_stride", "kv_heads"), "i32"),
    },
    constants={"PAGE": 128, "HEADS": 8, "HEAD": 128},
    multiples_of_16=("k_stride", "v_stride"),
    num_warps=4,
    num_stages=1,
    streams=True,
)


def _compilations(params: Mapping[str, int], sizes: Mapping[str, int]) -> tuple[Compilation, ...]:
    """The kernel for a token's KV heads."""
    block = 1 << (sizes["heads"] * sizes["head_dim"] - 1).bit_length()
    return (_compilation("bf16", block, min(max(block // params["ELEMENTS_A_WARP"], 1), 8)),)


SPEC = Spec(
    op="kv_write",
    infer=infer,
    view=True,
    params={"ELEMENTS_A_WARP": 256},
    searches=(
        Search(
            regime="rows",
            values={"ELEMENTS_A_WARP": (128, 256, 512)},
            compilations=_compilations,
        ),
    ),
    # Stores without arithmetic; tests compare the pages bit by bit.
    tolerance=dict.fromkeys(("fp32", "bf16", "fp16"), 0.0),
    compilations=(_compilation("bf16", 1024, 4), SCALED),
    takes=takes,
)

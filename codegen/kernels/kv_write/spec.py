"""Rules of `kv_write`: the pages hold heads of K and V; the result stands for their new content."""

from codegen.kernels.base import Compilation, Spec, Value


def infer(k: Value, v: Value, k_pages: Value, v_pages: Value, slots: Value) -> Value:
    """The written pages."""
    assert k == v, f"K {k} and V {v}"
    assert k_pages == v_pages, f"pages {k_pages} and {v_pages}"
    assert k.shape[-2:] == k_pages.shape[-2:], f"heads of {k} in pages {k_pages}"
    assert slots.shape[0] == k.shape[0], f"slots {slots} for {k}"
    return k_pages


SPEC = Spec(
    op="kv_write",
    infer=infer,
    view=True,
    params={"ELEMENTS_A_WARP": 256},
    # Stores without arithmetic; tests compare the pages bit by bit.
    tolerance=dict.fromkeys(("fp32", "bf16", "fp16"), 0.0),
    compilations=tuple(
        Compilation(
            kernel="kv_write_kernel",
            types={
                "k_ptr": "*bf16",
                "v_ptr": "*bf16",
                "k_pages_ptr": f"*{pages}",
                "v_pages_ptr": f"*{pages}",
                "slots_ptr": "*i64",
                **dict.fromkeys(("k_stride", "v_stride", "width"), "i32"),
            },
            constants={"BLOCK": 1024},
            multiples_of_16=("k_stride", "v_stride", "width"),
            num_warps=4,
            num_stages=1,
            streams=True,
        )
        for pages in ("bf16", "fp8e4nv")
    ),
)

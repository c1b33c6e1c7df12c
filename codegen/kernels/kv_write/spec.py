"""Rules of `kv_write`: the pages hold heads of K and V; the result stands for their new content."""

from codegen.kernels.base import Spec, Value


def infer(k: Value, v: Value, k_pages: Value, v_pages: Value, slots: Value) -> Value:
    """The written pages."""
    assert k == v, f"K {k} and V {v}"
    assert k_pages == v_pages, f"pages {k_pages} and {v_pages}"
    assert k.shape[-2:] == k_pages.shape[-2:], f"heads of {k} in pages {k_pages}"
    assert slots.shape[0] == k.shape[0], f"slots {slots} for {k}"
    return k_pages


SPEC = Spec(op="kv_write", infer=infer, view=True)

"""Rules of `paged_attention`: as attention, keys from the pages, with the softmax's log sum."""

from codegen.kernels.base import Spec, Value


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


SPEC = Spec(op="paged_attention", infer=infer)

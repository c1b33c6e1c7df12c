"""Rules of `attention`: grouped-query heads over one sequence."""

from codegen.kernels.base import Spec, Value


def infer(q: Value, k: Value, v: Value, scale: float) -> Value:
    """As q."""
    heads, kv_heads = q.shape[-2], k.shape[-2]
    assert isinstance(heads, int), "heads have a number"
    assert isinstance(kv_heads, int), "KV heads have a number"
    assert heads % kv_heads == 0, f"{heads} heads share {kv_heads} KV heads"
    assert k == v, f"K {k} and V {v}"
    assert q.shape[-1] == k.shape[-1], f"heads of {q} and {k}"
    return q


SPEC = Spec(op="attention", infer=infer)

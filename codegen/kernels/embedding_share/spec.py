"""Rules of `embedding_share`: as `embedding`, with the number of the share's first row."""

from codegen.kernels.base import Spec, Value


def infer(token_ids: Value, weight: Value, first_row: Value) -> Value:
    """A row of the matrix for each token."""
    assert first_row.dtype == "int", f"first_row is {first_row}"
    return Value(shape=(*token_ids.shape, weight.shape[1]), dtype=weight.dtype)


SPEC = Spec(op="embedding_share", infer=infer)

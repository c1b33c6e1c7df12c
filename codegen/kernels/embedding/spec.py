"""Rules of `embedding`."""

from codegen.kernels.base import Spec, Value


def infer(token_ids: Value, weight: Value) -> Value:
    """A row of the matrix for each token."""
    return Value(shape=(*token_ids.shape, weight.shape[1]), dtype=weight.dtype)


SPEC = Spec(op="embedding", infer=infer)

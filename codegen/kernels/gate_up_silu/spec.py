"""Rules of `gate_up_silu`: gate above up in one weight; the result is as wide as one of them."""

from codegen.kernels.base import Largest, Range, Spec, Value
from codegen.kernels.linear.spec import DEFAULTS, TUNABLES, kept, product, searches


def infer(x: Value, weight: Value) -> Value:
    """x with half the weight's rows as its last dim."""
    rows, width = weight.shape
    assert x.shape[-1] == width, f"{x} times {weight}"
    assert isinstance(rows, int), "weights have sizes"
    assert rows % 2 == 0, f"{rows} rows have no two halves"
    return Value(shape=(*x.shape[:-1], rows // 2), dtype=x.dtype)


def scratch(steps: Largest, x: Value, weight: Value) -> int:
    """Gate and up, where the library multiplies."""
    return Value(shape=(*x.shape[:-1], weight.shape[0]), dtype=x.dtype).storage_bytes(steps.sizes)


SPEC = Spec(
    op="gate_up_silu",
    infer=infer,
    scratch={"triton": scratch},
    kept={"triton": kept},
    params=DEFAULTS,
    searches=searches(1),
    ranges=(
        Range(tokens_max="TOKENS_MAX", target="triton", params=TUNABLES),
        Range(target="triton"),  # the library's product, and silu_mul
    ),
    # Checked by tests/codegen/test_gemm_kernels.py. The reference rounds gate, up, silu and their
    # product, ours the product alone: half a unit of each factor and two of the result, where |up|
    # and |silu| are below 8 in normal data, three units of which are those of a value below 8.
    tolerance={"bf16": 2**-5, "fp16": 2**-8},
    compilations=(product(1, 64, 16, 256, split=False), product(1, 64, 64, 128, split=False)),
)

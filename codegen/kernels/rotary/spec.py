"""Rules of `rotary`: a cosine and a sine for each position and frequency."""

from collections.abc import Mapping

from codegen.kernels.base import Compilation, Spec, Value


def infer(positions: Value, inv_freq: Value, scale: float) -> Value:
    """fp32 [T, 2, H / 2]."""
    return Value(shape=(*positions.shape, 2, *inv_freq.shape), dtype="fp32")


def _compilation(params: Mapping[str, int]) -> Compilation:
    return Compilation(
        kernel="rotary_kernel",
        types={
            "positions_ptr": "*i64",
            "inv_freq_ptr": "*fp32",
            "cos_sin_ptr": "*fp32",
            "half": "i32",
            "scale": "fp32",
        },
        constants={"BLOCK_H2": 64},
        multiples_of_16=("half",),
        num_warps=params["WARPS"],
    )


PARAMS = {"WARPS": 1}
SPEC = Spec(
    op="rotary",
    infer=infer,
    params=PARAMS,
    cases=(
        {"shape": (5, 64), "dtype": "fp32"},
        {"shape": (3, 8), "dtype": "fp32"},
        {"shape": (1, 48), "dtype": "fp32"},
    ),
    # As rope/spec.py has it: half a turn in fp32, and sines and cosines of two sides, 4.3e-7.
    tolerance={"fp32": 2**-21},
    compilations=(_compilation(PARAMS),),
)

"""Rules of `rope`: one frequency for each pair of a head's elements."""

from collections.abc import Mapping

from codegen.kernels.base import Compilation, Search, Spec, Value


def infer(x: Value, positions: Value, inv_freq: Value, scale: float) -> Value:
    """As x."""
    half = inv_freq.shape[0]
    assert isinstance(half, int), "frequencies have a number"
    assert x.shape[-1] == 2 * half, f"{half} frequencies for {x}"
    assert positions.shape[0] == x.shape[0], f"positions {positions} for {x}"
    return x


def _compilation(heads: int, half: int, warps: int) -> Compilation:
    return Compilation(
        kernel="rope_kernel",
        types={
            "x_ptr": "*bf16",
            "positions_ptr": "*i64",
            "inv_freq_ptr": "*fp32",
            "out_ptr": "*bf16",
            **dict.fromkeys(("x_stride", "heads", "half"), "i32"),
            "scale": "fp32",
        },
        constants={"BLOCK_N": heads, "BLOCK_H2": half},
        multiples_of_16=("x_stride", "half"),
        num_warps=warps,
        num_stages=1,
        streams=True,
    )


def _compilations(params: Mapping[str, int], sizes: Mapping[str, int]) -> tuple[Compilation, ...]:
    """The kernel for so many heads of a size."""
    heads = min(1 << (sizes["heads"] - 1).bit_length(), params["HEADS"])
    half = 1 << (sizes["head_dim"] // 2 - 1).bit_length()
    warps = min(max(heads * half // params["ELEMENTS_A_WARP"], 1), 8)
    return (_compilation(heads, half, warps),)


SPEC = Spec(
    op="rope",
    infer=infer,
    params={"ELEMENTS_A_WARP": 512, "HEADS": 16},
    searches=(
        Search(
            regime="rows",
            values={"ELEMENTS_A_WARP": (128, 256, 512, 1024)},
            compilations=_compilations,
        ),
    ),
    cases=(
        {"shape": (3, 4, 128), "dtype": "bf16"},
        {"shape": (5, 3, 64), "dtype": "fp16"},
        {"shape": (2, 5, 16), "dtype": "fp32"},
        {"shape": (4, 2, 96), "dtype": "fp32", "columns": 600},
        {"shape": (3, 19, 32), "dtype": "fp32", "columns": 1300},
    ),
    # Both sides round position x frequency to the same fp32 angle, at most 2^20 in cases and rates.
    # The kernel takes whole turns off in fp64: 2^20 / 2 pi turns are off by 2^-36 of one,
    # which is nothing; then half a turn in fp32 is off by pi x 2^-24 = 1.9e-7. Sines and cosines
    # are off by two units, 2^-23 each side. Together 4.3e-7, times two elements whose sizes add up
    # to 8 in normal data: 3.4e-6, below 2^-18 = 3.8e-6.
    # In 16 bits that is far below half a unit of a value of 1 or more, so a result is the same or
    # its neighbour, one unit off. A unit is at most 2^-7 (2^-10) of the value, and that much where
    # the value is a power of two: among 67 million elements some are, and the bound is reached.
    tolerance={"fp32": 2**-18, "bf16": 2**-7, "fp16": 2**-10},
    compilations=tuple(_compilation(heads, 64, warps) for heads, warps in ((8, 1), (16, 2))),
)

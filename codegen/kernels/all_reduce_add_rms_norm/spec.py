"""Rules of `all_reduce_add_rms_norm`, and what the gate compiles for groups of several sizes."""

from codegen.kernels.base import Compilation, Range, Spec, Value

PARAMS = {
    "MARGIN": 8,
    "REGISTERS": 64,
    "REGISTERS_LEAN": 32,
    "WIDTH_LEAN": 8192,
    "TOKENS_MAX": 256,
    "PAIR_READ_KIB_MAX": 4096,
    "READ_KIB_MAX": 2048,
    "WIDTH_MAX": 16384,
    "ELEMENTS_A_WARP": 256,
    "OVERLAP": 1,
}


def infer(x: Value, residual: Value, weight: Value, eps: float, comm: Value) -> tuple[Value, Value]:
    """(normed, sum), both as the residual stream."""
    assert x == residual, f"{x} added to {residual}"
    assert weight.shape == x.shape[-1:], f"weight {weight} for {x}"
    assert comm.dtype == "comm", f"collectives of {comm}"
    return x, x


def takes(x: Value, residual: Value, weight: Value, eps: float, comm: Value) -> bool:
    """Rows of tokens; others are for the ops apart, which the reference is."""
    return len(x.shape) == 2


def _one_shot(ranks: int, width: int, *, dtype: str = "bf16", rank: int = 1) -> Compilation:
    block = 1 << (width - 1).bit_length()
    pointers = ("x", "residual", "weight", "normed", "total")
    return Compilation(
        kernel="all_reduce_add_rms_norm_kernel",
        types={
            **{f"{name}_ptr": f"*{dtype}" for name in pointers},
            **dict.fromkeys(("buffers_ptr", "flags_ptr"), "*i64"),
            "epochs_ptr": "*i32",
            "eps": "fp32",
            **dict.fromkeys(("x_stride", "residual_stride", "slot", "slots"), "i32"),
        },
        constants={
            "RANK": rank,
            "RANKS": ranks,
            "LANES": ranks,
            "WIDTH": width,
            "BLOCK": block,
            "OVERLAP": True,
        },
        multiples_of_16=("x_stride", "residual_stride", "slot", "slots"),
        num_warps=min(max(block // PARAMS["ELEMENTS_A_WARP"], 1), 32),
        streams=True,
    )


SPEC = Spec(
    op="all_reduce_add_rms_norm",
    infer=infer,
    params=PARAMS,
    ranges=(
        Range(tokens_max="TOKENS_MAX", target="triton", params=tuple(PARAMS)),
        Range(target="triton"),  # Comm.all_reduce, and the kernel of add_rms_norm
    ),
    # Checked by tests/codegen/test_all_reduce_kernel.py. The sum has the roundings of its
    # definition, so it is equal bit by bit; the norm is off as that of add_rms_norm is.
    tolerance={"fp32": 2**-20, "bf16": 2**-6, "fp16": 2**-9},
    compilations=(
        _one_shot(2, 4096),
        _one_shot(2, 8192),
        _one_shot(4, 5120),
        _one_shot(8, 8192, rank=7),
        _one_shot(8, 16384, rank=0),
    ),
    takes=takes,
)

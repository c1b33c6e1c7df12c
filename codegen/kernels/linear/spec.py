"""Rules of `linear`, and what the gate compiles for products of few tokens."""

from collections.abc import Mapping

from codegen.kernels.base import Compilation, Largest, Range, Search, Spec, Value

POINTERS = ("out", "bias", "q_norm", "k_norm", "k_pages", "v_pages")
COUNTS = ("tokens", "outputs", "second", "heads", "kv_heads", "tiles", "pieces", "k_blocks")
TUNABLES = ("TOKENS_MAX", "SHORT_K", "LONG_K", "LEAST_BLOCKS", "WIDE_TILES", "OVERLAP")
DEFAULTS = dict(zip(TUNABLES, (64, 256, 128, 64, 264, 1), strict=True))
"""Of all ops that take their products from core.py."""
SHARED_SCRATCH_BYTES = 4 * (512 * 2 * 64 * 64 + 65_536)
"""As core._scratch: pieces of tiles, and counters, of all ops that take their products there."""
REGIMES = ("few", "some")
"""At most 32 tokens, and more, up to TOKENS_MAX; as core.SHORT_TOKENS."""


def infer(x: Value, weight: Value, bias: Value | None) -> Value:
    """x with the weight's rows as its last dim."""
    assert x.shape[-1] == weight.shape[1], f"{x} times {weight}"
    assert bias is None or bias.shape == weight.shape[:1], f"bias {bias} for {weight}"
    return Value(shape=(*x.shape[:-1], weight.shape[0]), dtype=x.dtype)


def product(
    mode: int,
    rows: int,
    tokens: int,
    block_k: int,
    *,
    split: bool,
    head: int = 128,
    norm: bool = False,
    gluon: bool = True,
) -> Compilation:
    """A kernel of core.py or its twin of gluon.py for tiles of 2 x rows outputs."""
    half, stages = head // 2, shared_stages(rows, tokens, block_k)
    box = min(half, rows) if mode == 2 else rows
    types = {
        **{f"{name}_ptr": "*bf16" for name in POINTERS},
        **dict.fromkeys((*COUNTS, "token_tiles"), "i32"),
        "cos_sin_ptr": "*fp32",
        "slots_ptr": "*i64",
        "partial_ptr": "*fp32",
        "arrived_ptr": "*i32",
        "eps": "fp32",
    }
    constants: dict[str, int | bool] = {
        "MODE": mode,
        "BIAS": mode == 2,
        "NORM": norm,
        "ROWS": rows,
        "BOX": box,
        "STEP": (2 * rows, rows, head)[mode],
        "PARTS": max(half // rows, 1) if mode == 2 else 1,
        "HALF": half,
        "SPLIT": split,
        "BLOCK_T": tokens,
        "BLOCK_K": block_k,
        "STAGES": stages if gluon else min(stages, 3),
    }
    if not gluon:
        operands = {"x_ptr": "*bf16", "w_ptr": "*bf16", "width": "i32", "weight_rows": "i32"}
        return Compilation(
            kernel="stream_kernel",
            folder="linear",
            module="core",
            types={**operands, **types},
            constants=constants,
            multiples_of_16=("outputs", "width"),
            num_warps=4,
            num_stages=3,
            tile_rows=rows,
        )
    boxes = {"x_desc": (tokens, block_k), "w_desc": (box, block_k)}
    descriptors = {name: f"tensordesc<bf16[{a}, {b}]>" for name, (a, b) in boxes.items()}
    return Compilation(
        kernel="stream_kernel",
        folder="linear",
        module="gluon",
        types={**types, **descriptors},
        constants={**constants, "PRODUCER": 40},
        multiples_of_16=("outputs",),
        num_warps=4,
        specialised_warps=4,  # the fetching warp, padded
        tile_rows=64,
        buffers=stages,
    )


def shared_stages(rows: int, tokens: int, block_k: int) -> int:
    """As core.Form.stages."""
    return (232_448 - 2048 - 4 * 64 * tokens) // (2 * block_k * (2 * rows + tokens))


def products(
    mode: int, params: Mapping[str, int], sizes: Mapping[str, int]
) -> tuple[Compilation, ...]:
    """What a problem of so many tokens, n rows and k inputs runs, as core.Choice says."""
    tokens, n = sizes["tokens"], sizes["n"]
    if tokens > params["TOKENS_MAX"]:
        return ()
    rows = 64 if -(-n // 64) >= params["WIDE_TILES"] else 32
    block_t = min(max(1 << (tokens - 1).bit_length(), 16), 64)
    block_k = params["SHORT_K"] if tokens <= 32 else params["LONG_K"]
    block_k = block_k if shared_stages(rows, block_t, block_k) >= 3 else params["LONG_K"]
    split = -(-n // (2 * rows)) < params["LEAST_BLOCKS"]
    return (product(mode, rows, block_t, block_k, split=split),)


def searches(mode: int) -> tuple[Search, ...]:
    """The space of an op whose products are core.py's."""
    few = {"SHORT_K": (128, 256), "LEAST_BLOCKS": (48, 64, 96, 128), "WIDE_TILES": (132, 264, 528)}
    return (
        Search(
            regime=REGIMES[0],
            values=few,
            compilations=lambda params, sizes: products(mode, params, sizes),
        ),
        Search(
            regime=REGIMES[1],
            values={"LONG_K": (64, 128)},
            compilations=lambda params, sizes: products(mode, params, sizes),
        ),
    )


def takes(x: Value, weight: Value, bias: Value | None) -> bool:
    """16 bits, and rows that TMA can address."""
    width = weight.shape[1]
    assert isinstance(width, int), "weights have sizes"
    return x.dtype == weight.dtype and x.dtype in {"bf16", "fp16"} and width % 8 == 0


def kept(steps: Largest, x: Value, *others: object) -> int:
    """What the first product of a process allocates for all later ones."""
    return SHARED_SCRATCH_BYTES if x.dtype in {"bf16", "fp16"} else 0


RANGES = (
    Range(tokens_max="TOKENS_MAX", target="triton", params=TUNABLES),
    Range(target="torch"),
)

SPEC = Spec(
    op="linear",
    infer=infer,
    params=DEFAULTS,
    searches=searches(0),
    ranges=RANGES,
    # Checked by tests/codegen/test_gemm_kernels.py. Both sides round one fp32 sum of K products to
    # 16 bits, and the sums differ by their order: K x 2^-24 of the terms' size at most, below half
    # a unit of bf16; so one unit, and for fp16 another.
    tolerance={"bf16": 2**-7, "fp16": 2**-9},
    compilations=(
        product(0, 32, 16, 256, split=False),
        product(0, 32, 64, 128, split=True),
        product(0, 64, 16, 64, split=True, gluon=False),
    ),
    parts=("core", "gluon"),
    takes=takes,
    kept={"triton": kept},
)

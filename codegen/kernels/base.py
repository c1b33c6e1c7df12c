"""What every `spec.py` is made of: abstract values, and the rules and cases of an op."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Dim = int | str
"""A size, or one of the letters that only a step fixes: T tokens, R sampled rows."""

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1, "int32": 4, "int64": 8}


@dataclass(frozen=True, kw_only=True)
class Value:
    """What a node of a graph yields, without its numbers."""

    shape: tuple[Dim, ...]
    dtype: str
    """As plans.model.Dtype, or int32 and int64; `int` and `inputs` are no tensors."""

    def storage_bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes of the tensor for given sizes of its letters; 0 for what is no tensor."""
        dims = [sizes[dim] if isinstance(dim, str) else dim for dim in self.shape]
        return math.prod(dims) * DTYPE_BYTES.get(self.dtype, 0)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The largest steps of a plan, for what their calls hold."""

    sizes: Mapping[str, int]
    """Of the letters of values."""
    keys: int
    """Of the longest sequence on one rank."""
    pool: int
    """Tokens that a rank's pages hold."""
    chunks: tuple[tuple[int, int], ...] = ()
    """Tokens of the schedule's chunks, and keys of their sequence up to the last of them."""


Scratch = Callable[..., int]
"""From a Largest and an op's arguments, as Spec.infer has them, bytes."""


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """One way in which a Triton kernel is used: what the gate compiles for sm_90."""

    kernel: str
    """Name of the jitted function."""
    folder: str = ""
    """Op in whose folder it stands; empty for its own."""
    module: str = "triton"
    """File of the folder that it stands in, such as `triton` or `gluon`."""
    types: Mapping[str, str]
    """Triton type of each argument that is no constant, such as `*bf16`, `i32`, `fp32`, or
    `tensordesc<bf16[64, 128]>` for the box that a TMA descriptor copies."""
    constants: Mapping[str, int | bool]
    multiples_of_16: tuple[str, ...] = ()
    """Integers that divide by 16 in every launch; Triton specialises on it, pointers always are."""
    num_warps: int = 4
    num_stages: int = 1
    tile_rows: int = 1
    """Rows of the tile that a matrix product sees; from 64 on it has to be a wgmma."""
    streams: bool = False
    """Bound by memory: has to load 16 bytes a thread."""
    buffers: int = 0
    """Least tiles of an operand in flight: a pipeline that lost a stage is slow in silence."""
    specialised_warps: int = 0
    """Warps besides num_warps that have a part of their own, by `gl.warp_specialize`."""
    overlaps: bool = False
    """A softmax has to run under a matrix product: exp2 between two waits for wgmma."""
    source: str = ""
    """Text of its module, where that stands in no folder: a generated one."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Tunables that are chosen together, on problems of one regime (codegen/tune.py)."""

    regime: str
    """Which problems of codegen/problems.py time them."""
    values: Mapping[str, tuple[int, ...]]
    """What each tunable may be; all combinations are the space."""
    compilations: Callable[[Mapping[str, int], Mapping[str, int]], tuple[Compilation, ...]] = (
        lambda params, sizes: ()
    )
    """From all params and a problem's sizes, what the gate compiles before anything is timed."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Steps of some sizes, for which an op's file has a way of its own.

    The file chooses by the tokens it is given, which are fixed when a CUDA graph is recorded.
    """

    tokens_max: str | None = None
    """Name of the tunable that bounds them; None has no bound."""
    target: Literal["torch", "triton"]
    """Whose kernel runs: ours, or only the library's."""
    params: tuple[str, ...] = ()
    """Tunables that this way reads."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The rules of an op, and how its kernels are checked."""

    op: str
    infer: Callable[..., Any]
    """From the op's arguments, tensors as Value, to its Value or tuple of them; asserts."""
    view: bool | Callable[..., bool] = False
    """The result shares its first argument's storage; a function says for which arguments."""
    params: Mapping[str, int] = field(default_factory=dict)
    """Tunables of triton.py and their defaults, module constants there; empty without a kernel."""
    ranges: tuple[Range, ...] = ()
    """Ways of triton.py by tokens, fewest first; empty where there is one for all steps."""
    scratch: Mapping[str, Scratch] = field(default_factory=dict)
    """By target, most bytes that a call allocates besides its results. Not named: none for kernels
    of ours; for torch, what its operations are seen to allocate (codegen/meta.py)."""
    kept: Mapping[str, Scratch] = field(default_factory=dict)
    """By target, bytes that the first call leaves for later ones; ops that share them name the same
    function."""
    searches: tuple[Search, ...] = ()
    """What medha-tune tries; a tunable in none of them keeps its default."""
    cases: tuple[Mapping[str, Any], ...] = ()
    """Shapes and dtypes over which each kernel is compared with the reference."""
    tolerance: Mapping[str, float] = field(default_factory=dict)
    """Largest |kernel - reference| by dtype, as a share of max(1, |reference|)."""
    compilations: tuple[Compilation, ...] = ()
    parts: tuple[str, ...] = ()
    """Files of the folder that triton.py imports, without `.py`; a bundle has them beside it."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Texts of `reference` and `triton` of an op that is made with the graph and has no folder."""
    fused: tuple[str, ...] = ()
    """Ops of the region that a generated op stands for, in order."""
    takes: Callable[..., bool] | None = None
    """From the op's arguments, as `infer` has them, whether triton.py is made for them."""
    libraries: Mapping[str, Callable[..., bool]] = field(default_factory=dict)
    """Packages that compute the op where they are installed and a plan asks for them, each with a
    file of that name beside triton.py; and whether it takes the op's arguments."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Targets that the op has, best last."""
        return ("torch", "triton") if self.params else ("torch",)

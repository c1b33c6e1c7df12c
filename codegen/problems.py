"""Calls of ops on random data, for whoever times or compares them: tuner, profile, benchmarks.

A problem holds several calls of one op, each on a copy of its data, so that calls that follow each
other in a CUDA graph find nothing in L2. Ops are called as a bundle calls them, through the
registry of codegen/kernels, so that a problem outlives any change inside a kernel.

Sizes by op: tokens and width (norms, silu_mul: of its result); tokens, heads and head_dim (rope,
and kv_write, whose heads are KV heads); tokens, n and k (linear: k columns in, n out); for
paged_attention heads, kv_heads, head_dim, page_tokens, keys with the queries' own, and either
tokens (one chunk of so many queries) or batch (so many decodes).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from codegen.kernels import load_kernel, load_reference, load_spec
from plans.errors import UsageError

Sizes = Mapping[str, int]
Arguments = tuple[Any, ...]

COLD_BYTES = 256 << 20
"""Bytes that the calls of a graph go through: four times the L2 of an H200."""
COPIES_MAX = 32
POOL_BYTES = 6 << 30
"""Pages that all attention problems of one kind share, at most."""
PAGE_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Calls of an op, and what each has to do at least."""

    op: str
    calls: Sequence[Callable[[], Any]]
    arguments: Arguments
    """Of the first call."""
    moved_bytes: int
    """Each input read once, each output written once."""
    flops: float = 0.0
    keeps: list[Any] = field(default_factory=list)
    """What has to live as long as the calls do."""

    def floor_s(self, *, flops_per_s: float, bytes_per_s: float) -> float:
        """No kernel is faster on a device of these rates."""
        return max(self.flops / flops_per_s, self.moved_bytes / bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where a problem's data lies, and what it is."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    cold: bool = True
    """As many copies as L2 cannot hold; else one."""

    def normal(self, *shape: int) -> Tensor:
        """From a normal distribution."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def copies(self, moved_bytes: int) -> int:
        """Calls of a graph, each of which moves so much."""
        if not self.cold:
            return 1
        return min(max(math.ceil(COLD_BYTES / max(moved_bytes, 1)), 1), COPIES_MAX)


def make(op: str, sizes: Sizes, where: Where) -> Problem:
    """A problem of an op; raises UsageError where no problem of it is known."""
    if op not in MAKERS:
        raise UsageError(f"no problems are known for op {op}; known: {', '.join(sorted(MAKERS))}")
    return MAKERS[op](op, sizes, where)


def difference(problem: Problem) -> float:
    """|kernel - reference| of the first call at its worst, as a share of the op's tolerance.

    Infinite where anything is not finite. Results that a kernel leaves in an argument are compared
    there, from copies with equal content.
    """
    kernel, reference = load_kernel(problem.op), load_reference(problem.op)
    if problem.op == "kv_write":
        k, v, k_pages, v_pages, slots = problem.arguments
        ours, theirs = ([k_pages.clone(), v_pages.clone()] for _ in range(2))
        kernel(k, v, *ours, slots)
        reference(k, v, *theirs, slots)
        return 0.0 if all(map(torch.equal, ours, theirs)) else math.inf
    found, expected = kernel(*problem.arguments), reference(*problem.arguments)
    if isinstance(found, tuple):
        found, expected = found[0], expected[0]
    bound = load_spec(problem.op).tolerance.get(_dtype_name(expected.dtype))
    if bound is None:  # computed by the library that also defines it
        return 0.0 if torch.equal(found, expected) else math.inf
    share = (found.float() - expected.float()).abs() / expected.float().abs().clamp_min(1)
    worst = float(share.max())
    return worst / bound if bool(found.isfinite().all()) else math.inf


def _dtype_name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def _problem(
    op: str, sets: Sequence[Arguments], *, moved_bytes: int, flops: float = 0.0
) -> Problem:
    kernel = load_kernel(op)
    return Problem(
        op=op,
        calls=[lambda each=each: kernel(*each) for each in sets],  # type: ignore[misc]
        arguments=sets[0],
        moved_bytes=moved_bytes,
        flops=flops,
    )


# --- row-wise ops -------------------------------------------------------------------------------


def _norm(op: str, sizes: Sizes, where: Where) -> Problem:
    tokens, width = sizes["tokens"], sizes["width"]
    streams = 2 if op == "add_rms_norm" else 1  # residual added: another read, another write
    moved = 4 * streams * tokens * width

    def arguments() -> Arguments:
        rows = [where.normal(tokens, width) for _ in range(streams)]
        return (*rows, where.normal(width), 1e-5)

    sets = [arguments() for _ in range(where.copies(moved))]
    return _problem(op, sets, moved_bytes=moved)


def _silu_mul(op: str, sizes: Sizes, where: Where) -> Problem:
    tokens, width = sizes["tokens"], sizes["width"]
    moved = 6 * tokens * width
    count = where.copies(moved)
    sets = [(where.normal(tokens, 2 * width),) for _ in range(count)]
    return _problem(op, sets, moved_bytes=moved)


def _rope(op: str, sizes: Sizes, where: Where) -> Problem:
    """Heads are part of the wider rows of a fused projection."""
    tokens, heads, head_dim = (sizes[name] for name in ("tokens", "heads", "head_dim"))
    moved = 4 * tokens * heads * head_dim
    frequencies = torch.logspace(0, -5.7, head_dim // 2, device=where.device)
    positions = torch.randint(0, 1 << 20, (tokens,), device=where.device)

    def arguments() -> Arguments:
        wide = where.normal(tokens, 2 * heads * head_dim)
        return (
            wide[:, : heads * head_dim].view(tokens, heads, head_dim),
            positions,
            frequencies,
            1.0,
        )

    sets = [arguments() for _ in range(where.copies(moved))]
    return _problem(op, sets, moved_bytes=moved)


def _kv_write(op: str, sizes: Sizes, where: Where) -> Problem:
    tokens, heads, head_dim = (sizes[name] for name in ("tokens", "heads", "head_dim"))
    moved = 8 * tokens * heads * head_dim

    def arguments() -> Arguments:
        rows = where.normal(tokens, 4 * heads * head_dim)
        k, v = (
            rows[:, at * heads * head_dim : (at + 1) * heads * head_dim].view(tokens, heads, -1)
            for at in (1, 2)
        )
        pages = tokens // PAGE_TOKENS + 2
        cache = [
            torch.zeros(
                (pages, PAGE_TOKENS, heads, head_dim), device=where.device, dtype=where.dtype
            )
            for _ in "kv"
        ]
        slots = torch.randperm(pages * PAGE_TOKENS, device=where.device)[:tokens]
        return (k, v, *cache, slots)

    sets = [arguments() for _ in range(where.copies(moved))]
    return _problem(op, sets, moved_bytes=moved)


def _linear(op: str, sizes: Sizes, where: Where) -> Problem:
    tokens, n, k = sizes["tokens"], sizes["n"], sizes["k"]
    moved = 2 * (n * k + tokens * (n + k))
    count = where.copies(2 * n * k)
    inputs = [where.normal(tokens, k) for _ in range(min(count, 4))]
    weights = _weights(n, k, where, count)
    sets = [(inputs[at % len(inputs)], weight, None) for at, weight in enumerate(weights)]
    return _problem(op, sets, moved_bytes=moved, flops=2.0 * tokens * n * k)


def _gate_up_silu(op: str, sizes: Sizes, where: Where) -> Problem:
    """n columns out of the product, half as many of the result."""
    tokens, n, k = sizes["tokens"], sizes["n"], sizes["k"]
    moved = 2 * (n * k + tokens * (n // 2 + k))
    weights = _weights(n, k, where, where.copies(2 * n * k))
    inputs = [where.normal(tokens, k) for _ in weights[:4]]
    sets = [(inputs[at % len(inputs)], weight) for at, weight in enumerate(weights)]
    return _problem(op, sets, moved_bytes=moved, flops=2.0 * tokens * n * k)


def _qkv_rope_write(op: str, sizes: Sizes, where: Where) -> Problem:
    """n columns out: heads of 128, of which a sixth are keys and a sixth values, at least one."""
    tokens, n, k = sizes["tokens"], sizes["n"], sizes["k"]
    kv_heads = max(n // 128 // 6, 1)
    moved = 2 * (n * k + tokens * (n + k))
    weights = _weights(n, k, where, where.copies(2 * n * k))
    x = where.normal(tokens, k)
    turns = torch.rand(tokens, 2, 64, device=where.device)
    pages = tokens // PAGE_TOKENS + 2
    shape = (pages, PAGE_TOKENS, kv_heads, 128)
    cache = [torch.zeros(shape, device=where.device, dtype=where.dtype) for _ in "kv"]
    slots = torch.randperm(pages * PAGE_TOKENS, device=where.device)[:tokens]
    sets = [(x, weight, None, None, None, 1e-5, turns, *cache, slots) for weight in weights]
    return _problem(op, sets, moved_bytes=moved, flops=2.0 * tokens * n * k)


_HELD: dict[str, tuple[Any, Any]] = {}
"""The largest tensors of the last problem of a kind by key: making them costs more than timing."""


def _held(kind: str, key: Any, build: Callable[[], Any]) -> Any:
    if kind not in _HELD or _HELD[kind][0] != key:
        _HELD.pop(kind, None)  # frees the memory before the next is made
        _HELD[kind] = (key, build())
    return _HELD[kind][1]


def release() -> None:
    """Lets go of what problems share."""
    _HELD.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _weights(n: int, k: int, where: Where, count: int) -> list[Tensor]:
    def build() -> list[Tensor]:
        # of the size that keeps the products' sums near 1
        return [where.normal(n, k).mul_(k**-0.5) for _ in range(count)]

    found: list[Tensor] = _held("weights", (n, k, where, count), build)
    return found


# --- attention ----------------------------------------------------------------------------------


def _attention(op: str, sizes: Sizes, where: Where) -> Problem:
    """One chunk, its list made as an eager step makes it; or decodes as a CUDA graph has them."""
    heads, kv_heads, head_dim = (sizes[name] for name in ("heads", "kv_heads", "head_dim"))
    page, keys = sizes.get("page_tokens", PAGE_TOKENS), sizes["keys"]
    batch = sizes.get("batch", 1)
    queries = sizes.get("tokens", 1) if "batch" not in sizes else 1
    used = -(-keys // page)
    token_bytes = 4 * kv_heads * head_dim
    layers = min(where.copies(batch * keys * token_bytes), 12)
    pool = _pool(kv_heads, head_dim, page, where)
    if batch * used > len(pool[0]):
        raise UsageError(
            f"{batch} sequences of {keys} keys need {batch * used} pages of {page}, the pool of"
            f" problems has {len(pool[0])}"
        )
    layers = max(1, min(layers, len(pool[0]) // (batch * used)))
    inputs = _inputs(batch, queries, keys, page, where)
    size = batch * used
    q = [where.normal(batch * queries, heads, head_dim) for _ in range(layers)]
    caches = [[pages[at * size : (at + 1) * size] for pages in pool] for at in range(layers)]
    sets = [
        (q[at], k_pages, v_pages, k_pages, inputs, head_dim**-0.5)
        for at, (k_pages, v_pages) in enumerate(caches)
    ]
    past = keys - queries
    pairs = batch * (queries * past + queries * (queries + 1) / 2)
    moved = batch * (keys * token_bytes + 4 * queries * heads * head_dim)
    problem = _problem(op, sets, moved_bytes=moved, flops=4.0 * heads * head_dim * pairs)
    if queries == 1 and where.device.type == "cuda":
        problem.keeps.append(_record_list(problem.calls[0], inputs))
    return problem


def _record_list(call: Callable[[], Any], inputs: SimpleNamespace) -> torch.cuda.CUDAGraph:
    """Fills the step's memo as a recorded step does, on the device, in a graph of its own."""
    call()  # compiles
    inputs.memo.clear()
    inputs.host, inputs.recorded = None, True
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _inputs(batch: int, queries: int, keys: int, page: int, where: Where) -> SimpleNamespace:
    """Of a step of equal sequences, whose pages are in random order."""
    used = -(-keys // page)
    starts = [b * queries for b in range(batch + 1)]
    return SimpleNamespace(
        slots_T=torch.zeros(starts[-1], dtype=torch.int64, device=where.device),
        query_starts_B1=torch.tensor(starts, dtype=torch.int32, device=where.device),
        kv_lens_B=torch.full((batch,), keys, dtype=torch.int32, device=where.device),
        page_table_BP=torch.randperm(batch * used, device=where.device).int().view(batch, used),
        host=SimpleNamespace(
            query_starts=tuple(starts), kv_lens=(keys,) * batch, causal=(True,) * batch
        ),
        recorded=False,
        memo={},
    )


def _pool(kv_heads: int, head_dim: int, page: int, where: Where) -> list[Tensor]:
    """K and V pages that all problems of these heads read."""
    page_bytes = 2 * page * kv_heads * head_dim
    most = POOL_BYTES if where.device.type == "cuda" else 1 << 22
    pages = max(most // (2 * page_bytes), 16)

    def build() -> list[Tensor]:
        return [where.normal(pages, page, kv_heads, head_dim) for _ in "kv"]

    found: list[Tensor] = _held("pool", (kv_heads, head_dim, page, where), build)
    return found


Maker = Callable[[str, Sizes, Where], Problem]
MAKERS: dict[str, Maker] = {
    "add_rms_norm": _norm,
    "gate_up_silu": _gate_up_silu,
    "kv_write": _kv_write,
    "linear": _linear,
    "paged_attention": _attention,
    "qkv_rope_write": _qkv_rope_write,
    "rms_norm": _norm,
    "rope": _rope,
    "silu_mul": _silu_mul,
}


@cache
def rates(device: torch.device) -> tuple[float, float]:
    """(FLOP/s, bytes/s) that this device reaches: a large product, and a copy, both directions."""
    from codegen.clock import GraphClock  # noqa: PLC0415 - only where there is a GPU

    size = 8192
    a, b = (Where(device=device).normal(size, size) for _ in range(2))
    # a kernel, since the copy engine that copy_ may take in a graph is slower on large tensors
    source, target = (Where(device=device).normal(1 << 29) for _ in range(2))
    product, copy = GraphClock()([[lambda: a @ b], [lambda: torch.neg(source, out=target)]])
    return 2 * size**3 / product.us * 1e6, 2 * source.nbytes / copy.us * 1e6

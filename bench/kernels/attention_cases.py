"""The attention problems that the benches time: packed steps over shuffled pages, and their check.

Dense keys and values for a peer without pages; a copy of them in pages in random order for ours.
"""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

HEAD_DIM = 128


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch of equal sequences: `queries` new tokens at the end of `keys` keys each."""

    name: str
    queries: int
    keys: int
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    page_tokens: int = 128
    graph: bool = False
    """Timed as replays of a CUDA graph over several caches, so that L2 is cold."""

    @property
    def flops(self) -> float:
        """Of the pairs that no mask hides."""
        past = self.keys - self.queries
        pairs = self.queries * past + self.queries * (self.queries + 1) / 2
        return 4 * self.batch * self.heads * HEAD_DIM * pairs

    @property
    def kv_bytes(self) -> int:
        """Keys and values read once, 16 bits each."""
        return self.batch * self.keys * self.kv_heads * HEAD_DIM * 4

    def floor_s(self, *, flops: float, bytes_s: float) -> float:
        """The larger of the times at the chip's rate of products and of memory."""
        return max(self.flops / flops, self.kv_bytes / bytes_s)


@dataclass(kw_only=True)
class Problem:
    """Tensors of a case; `inputs` are those of a step whose work lists are built once."""

    q_TNH: torch.Tensor
    k_BSKH: torch.Tensor
    v_BSKH: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    inputs: SimpleNamespace
    scale: float = field(default=HEAD_DIM**-0.5)


def make(case: Case, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Normal data; slots behind the last key hold a finite value that no result may show."""
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

    page = case.page_tokens
    used = -(-case.keys // page)
    q_TNH = normal(case.batch * case.queries, case.heads, HEAD_DIM)
    dense = [normal(case.batch, case.keys, case.kv_heads, HEAD_DIM) for _ in "kv"]
    order = torch.randperm(case.batch * used, generator=generator, device="cuda")
    paged = []
    for each in dense:
        padded = each
        if used * page != case.keys:
            padded = torch.full((case.batch, used * page, *each.shape[2:]), 3.0, device="cuda")
            padded = padded.to(dtype)
            padded[:, : case.keys] = each
        pages = torch.empty(
            (case.batch * used, page, case.kv_heads, HEAD_DIM), device="cuda", dtype=dtype
        )
        pages[order] = padded.view(-1, page, case.kv_heads, HEAD_DIM)
        paged.append(pages)
    starts = [b * case.queries for b in range(case.batch + 1)]
    host = SimpleNamespace(
        query_starts=starts, kv_lens=[case.keys] * case.batch, causal=[True] * case.batch
    )
    inputs = SimpleNamespace(
        slots_T=torch.zeros(starts[-1], dtype=torch.int64, device="cuda"),
        query_starts_B1=torch.tensor(starts, dtype=torch.int32, device="cuda"),
        kv_lens_B=torch.full((case.batch,), case.keys, dtype=torch.int32, device="cuda"),
        page_table_BP=order.view(case.batch, used).int().contiguous(),
        host=host,
        memo={},
    )
    return Problem(
        q_TNH=q_TNH,
        k_BSKH=dense[0],
        v_BSKH=dense[1],
        k_pages=paged[0],
        v_pages=paged[1],
        inputs=inputs,
    )


def relative_error(case: Case, problem: Problem, out_TNH: torch.Tensor, rows: int = 12) -> float:
    """|out - exact| / |exact| in fp32 arithmetic, over tokens spread over the step; NaN if any is.

    Tokens at tile borders are among them: the first, the last, and those around 31, 32 and 127.
    """
    total = case.batch * case.queries
    spread = torch.linspace(0, total - 1, rows).long().tolist()
    tokens = sorted({*spread, *(t for t in (0, 31, 32, 127, 128, total - 1) if t < total)})
    wrong = exact = 0.0
    group = case.heads // case.kv_heads
    for token in tokens:
        b, at = divmod(token, case.queries)
        seen = case.keys - case.queries + at + 1
        for head in range(case.kv_heads):
            q_GH = problem.q_TNH[token, head * group : (head + 1) * group].float()
            k_SH, v_SH = (each[b, :seen, head].float() for each in (problem.k_BSKH, problem.v_BSKH))
            share_GS = (q_GH @ k_SH.T * problem.scale).softmax(-1)
            expected = share_GS @ v_SH
            found = out_TNH[token, head * group : (head + 1) * group].float()
            wrong += (found - expected).square().sum().item()
            exact += expected.square().sum().item()
    return math.sqrt(wrong / exact)


def ours(problem: Problem, module: Any) -> Any:
    """A call of our op, whose work list is built now."""

    def run() -> torch.Tensor:
        out, _ = module.paged_attention(
            problem.q_TNH,
            problem.k_pages,
            problem.v_pages,
            problem.k_pages,
            problem.inputs,
            problem.scale,
        )
        return out

    run()
    return run


def portable(problem: Problem, module: Any) -> Any:
    """The same without the Gluon kernel."""
    inputs = SimpleNamespace(**{**vars(problem.inputs), "memo": {}})
    hopper, module._hopper = module._hopper, lambda device, heads: None  # noqa: SLF001 - a bench
    try:
        alone = Problem(**{**vars(problem), "inputs": inputs})
        return ours(alone, module)
    finally:
        module._hopper = hopper  # noqa: SLF001


def flash_attention_3(case: Case, problem: Problem) -> Any:
    """FlashAttention-3 on dense keys: prefill, chunk and decode alike, causal at the end."""
    from fa3_fwd_interface import flash_attn_with_kvcache  # noqa: PLC0415 - may be absent

    q = problem.q_TNH.view(case.batch, case.queries, case.heads, HEAD_DIM)
    lengths = problem.inputs.kv_lens_B

    def run() -> torch.Tensor:
        out = flash_attn_with_kvcache(
            q, problem.k_BSKH, problem.v_BSKH, cache_seqlens=lengths, causal=True
        )
        return (out[0] if isinstance(out, tuple) else out).view_as(problem.q_TNH)

    return run

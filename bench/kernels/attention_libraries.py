"""What other libraries offer for the same attention: calls on the tensors of a problem.

Each function gives a call that returns out_TNH, or raises Unsuited where the library has no such
attention (or is not installed). Dense keys, but for FlashInfer, which reads the pages that ours
reads. FlashInfer compiles its kernels on the first call, for a minute or two.
"""

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.kernels.attention_cases import HEAD_DIM, Case, Problem, flash_attention_3

Run = Callable[[], torch.Tensor]
WORKSPACE_BYTES = 256 << 20


class Unsuited(Exception):
    """The library has no such attention."""


def fa3(case: Case, problem: Problem) -> Run:
    """FlashAttention-3 (package fa3_fwd), dense."""
    run: Run = flash_attention_3(case, problem)
    return run


def _heads_first(case: Case, problem: Problem) -> tuple[torch.Tensor, ...]:
    """q, k, v as [batch, heads, tokens, H] views."""
    q = problem.q_TNH.view(case.batch, case.queries, case.heads, HEAD_DIM)
    return tuple(each.transpose(1, 2) for each in (q, problem.k_BSKH, problem.v_BSKH))


def sdpa_flash(case: Case, problem: Problem) -> Run:
    """torch's FlashAttention-2; its operator itself, whose mask is aligned to the last key."""
    q, k, v = _heads_first(case, problem)
    operator = torch.ops.aten._scaled_dot_product_flash_attention  # noqa: SLF001 - see above

    def run() -> torch.Tensor:
        causal = case.queries > 1
        out = operator(q, k, v, 0.0, causal, False, scale=problem.scale)[0]  # noqa: FBT003
        return out.transpose(1, 2).reshape(problem.q_TNH.shape)

    return run


def sdpa_cudnn(case: Case, problem: Problem) -> Run:
    """torch's cuDNN attention, whose causal mask is aligned to the first key."""
    if 1 < case.queries < case.keys:
        raise Unsuited("its causal mask is aligned to the first key")
    q, k, v = _heads_first(case, problem)

    def run() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=case.queries > 1, scale=problem.scale, enable_gqa=True
            )
        return out.transpose(1, 2).reshape(problem.q_TNH.shape)

    return run


def flashinfer(case: Case, problem: Problem) -> Run:
    """FlashInfer over the same pages: its FA3 for chunks, its tensor-core decode for one query."""
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    library: Any = importlib.import_module("flashinfer")
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    pages = -(-case.keys // case.page_tokens)
    last = case.keys - (pages - 1) * case.page_tokens

    def counted(step: int) -> torch.Tensor:
        return torch.arange(0, step * case.batch + 1, step, dtype=torch.int32, device="cuda")

    indices = problem.inputs.page_table_BP.reshape(-1)
    lasts = torch.full((case.batch,), last, dtype=torch.int32, device="cuda")
    sizes = (case.heads, case.kv_heads, HEAD_DIM, case.page_tokens)
    cache = (problem.k_pages, problem.v_pages)
    options = {"q_data_type": problem.q_TNH.dtype, "kv_data_type": problem.q_TNH.dtype}
    if case.queries == 1:
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True
        )
        wrapper.plan(counted(pages), indices, lasts, *sizes, sm_scale=problem.scale, **options)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa3")
        wrapper.plan(
            counted(case.queries),
            counted(pages),
            indices,
            lasts,
            *sizes,
            causal=True,
            sm_scale=problem.scale,
            **options,
        )

    def run() -> torch.Tensor:
        out: torch.Tensor = wrapper.run(problem.q_TNH, cache)
        return out

    return run


LIBRARIES: dict[str, Callable[[Case, Problem], Run]] = {
    "fa3": fa3,
    "sdpa flash": sdpa_flash,
    "sdpa cudnn": sdpa_cudnn,
    "flashinfer": flashinfer,
}


def compile_all(kinds: Collection[int]) -> None:
    """Lets FlashInfer compile what the rows need, before anything is timed; all kinds at once.

    kinds  numbers of queries: 1 for decodes, any other for chunks
    """
    line = [sys.executable, __file__]
    children = [
        subprocess.Popen([*line, queries], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        for queries in map(str, kinds)
    ]
    for child in children:
        child.wait()  # one that failed fails again where it is called, and says why


def compile_one(queries: int) -> None:
    """Calls FlashInfer once for so many queries."""
    from bench.kernels.attention_cases import make  # noqa: PLC0415 - builds tensors

    case = Case(name="small", queries=queries, keys=256)
    flashinfer(case, make(case))()
    torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("queries", nargs="*", type=int, default=[64, 1], help="by default 64 and 1")
    for each in parser.parse_args().queries:
        compile_one(each)

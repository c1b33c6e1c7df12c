"""Attention under pytest-benchmark: `pytest bench/kernels --benchmark-only`, on a CUDA device.

For ratios to peers, which need interleaved runs, see attention_peers.py.
"""

import pytest
import torch

from bench.kernels.attention_cases import Case, make, ours, relative_error
from codegen.kernels.paged_attention import triton as kernel

CASES = (
    Case(name="prefill", queries=8192, keys=8192),
    Case(name="chunk", queries=512, keys=131_072),
    Case(name="chunk", queries=32, keys=131_072),
    Case(name="decode", queries=1, keys=131_072),
    Case(name="decode", queries=1, keys=4096, batch=32),
)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.queries}-{case.keys}")
@pytest.mark.parametrize("page_tokens", [64, 128])
def test_paged_attention(benchmark, case, page_tokens):
    case = Case(**{**vars(case), "page_tokens": page_tokens})
    problem = make(case)
    run = ours(problem, kernel)
    assert relative_error(case, problem, run()) < 6e-3  # as in attention_check.py

    def finished() -> None:
        run()
        torch.cuda.synchronize()

    benchmark.extra_info["tflop"] = case.flops / 1e12
    benchmark.extra_info["kv_gb"] = case.kv_bytes / 1e9
    benchmark.pedantic(finished, rounds=20, warmup_rounds=3)

"""FlashAttention behind the contract of paged_attention: the packages are stood in for on a CPU.

The stand-ins take the arguments of the packages' functions and compute the definition; on a GPU
whatever is installed runs as it is.
"""

import importlib
import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import msgspec
import pytest
import torch
from builders import make_plan, tiny_model

from codegen.emit import emit_program
from codegen.kernels import load_reference
from plans.codec import dumps, loads
from plans.plan import Plan

MODULE = "codegen.kernels.paged_attention.flash_attn"
PACKAGES = ("flash_attn_interface", "fa3_fwd_interface", "flash_attn")


def attend(q_TNH, k_SKH, v_SKH, scale, *, causal) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence; the mask is aligned to the last key."""
    group = q_TNH.shape[1] // k_SKH.shape[1]
    k_SNH, v_SNH = (each.double().repeat_interleave(group, 1) for each in (k_SKH, v_SKH))
    logits_NTS = torch.einsum("tnh,snh->nts", q_TNH.double(), k_SNH) * scale
    tokens, keys = logits_NTS.shape[1:]
    if causal:
        seen_TS = torch.arange(keys) <= torch.arange(tokens)[:, None] + keys - tokens
        logits_NTS = logits_NTS.masked_fill(~seen_TS, -torch.inf)
    out = torch.einsum("nts,snh->tnh", logits_NTS.softmax(-1), v_SNH)
    return out.to(q_TNH.dtype), logits_NTS.logsumexp(-1).float()


def packed(q, keys_of, starts, scale, *, causal) -> tuple[torch.Tensor, torch.Tensor]:
    spans = [slice(*each) for each in pairwise(starts)]
    parts = [attend(q[s], *keys_of(b), scale, causal=causal) for b, s in enumerate(spans)]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)


def of_pages(k, v, table, lens):
    def keys(b: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(each[table[b].long()].flatten(0, 1)[: int(lens[b])] for each in (k, v))

    return keys


def varlen(  # noqa: PLR0917 - the packages' own signature
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
    causal, return_attn_probs, block_table=None, num_splits=1,
):  # fmt: skip
    assert return_attn_probs
    sizes, lens = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    assert (max_seqlen_q, max_seqlen_k) == (sizes.max(), lens.max())
    starts = cu_seqlens_k.tolist()
    keys = of_pages(k, v, block_table, lens) if block_table is not None else (
        lambda b: (k[starts[b] : starts[b + 1]], v[starts[b] : starts[b + 1]])
    )  # fmt: skip
    return packed(q, keys, cu_seqlens_q.tolist(), softmax_scale, causal=causal)


def with_kvcache(  # noqa: PLR0917 - the packages' own signature
    q, k_cache, v_cache, cache_seqlens, page_table, cu_seqlens_q, max_seqlen_q, softmax_scale,
    causal, return_softmax_lse,
):  # fmt: skip
    assert return_softmax_lse
    assert max_seqlen_q == cu_seqlens_q.diff().max()
    keys = of_pages(k_cache, v_cache, page_table, cache_seqlens)
    out, lse = packed(q, keys, cu_seqlens_q.tolist(), softmax_scale, causal=causal)
    return out, lse, None


@pytest.fixture(params=PACKAGES)
def backend(request, monkeypatch) -> Iterator[ModuleType]:
    """The module, with one package to be found; a GPU has the real one or none."""
    if torch.cuda.is_available():
        pytest.importorskip(request.param)
    else:
        stand_in = ModuleType(request.param)
        stand_in.flash_attn_varlen_func = varlen
        stand_in.flash_attn_with_kvcache = with_kvcache
        monkeypatch.setitem(sys.modules, request.param, stand_in)
    for other in PACKAGES:
        if other != request.param:
            monkeypatch.setitem(sys.modules, other, None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


@pytest.mark.parametrize("page", [64, 256])
@pytest.mark.parametrize("known", [False, True])
def test_every_package_computes_the_same_as_the_reference(backend, page, known):
    """Chunks, decodes, queries whose keys are elsewhere, a sequence without keys, padding."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [(1, 300, True), (40, 300, True), (9, 70, False), (1, 0, False), (1, 1, True)]
    used = [-(-keys // page) for _, keys, _ in rows]
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(sum(used) + 1, generator=random).tolist()
    tables = [[order.pop() for _ in range(count)] for count in used]
    starts = torch.tensor([0, *(queries for queries, _, _ in rows)]).cumsum(0)
    lens = [keys for _, keys, _ in rows]
    slots = [0 if here else -1 for queries, _, here in rows for _ in range(queries)]
    host = SimpleNamespace(
        query_starts=starts.tolist(), kv_lens=lens, causal=[here for _, _, here in rows]
    )
    inputs = SimpleNamespace(
        slots_T=torch.tensor([*slots, -1, -1]).to(device),
        query_starts_B1=starts.int().to(device),
        kv_lens_B=torch.tensor(lens).int().to(device),
        page_table_BP=torch.tensor([t + [0] * (max(used) - len(t)) for t in tables])
        .int()
        .to(device),
        host=host if known else None,
        memo={},
    )
    q, k, v = (
        torch.randn(shape, generator=random).bfloat16().to(device)
        for shape in [
            (len(slots) + 2, 8, 64),
            (sum(used) + 1, page, 2, 64),
            (sum(used) + 1, page, 2, 64),
        ]
    )
    found, lse = backend.paged_attention(q, k, v, k, inputs, 0.125)
    expected, expected_lse = load_reference("paged_attention")(q, k, v, k, inputs, 0.125)
    # bf16 results below 4, and P in bf16 where the package runs: 2^-8 x 4 once or twice
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=2**-5)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=2**-14)


def test_a_missing_package_is_named(monkeypatch):
    for each in PACKAGES:
        monkeypatch.setitem(sys.modules, each, None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(ImportError, match=r"flash_attn_interface.*install flash-attn"):
        importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


def test_a_plan_may_ask_for_it_and_other_ops_keep_their_kernels():
    model = tiny_model(heads=4, kv_heads=1, head_dim=64, weight_dtype="bf16")
    plan = make_plan(model=model, kv_dtype="bf16", page_tokens=64)
    program = emit_program(plan, target="flash_attn")
    by_op = {each.op: each.target for each in program.kernels}
    assert by_op["paged_attention"] == "flash_attn"
    assert by_op["rms_norm"] == "triton"
    assert b"flash_attn_varlen_func" in program.files["program/paged_attention.py"]
    assert "program/paged_attention_work.py" not in program.files


def test_what_it_does_not_take_is_computed_by_our_kernels():
    model = tiny_model(heads=4, kv_heads=1, head_dim=64, weight_dtype="bf16")
    plan: Plan = make_plan(model=model, kv_dtype="fp8", page_tokens=64)
    program = emit_program(plan, target="flash_attn")
    (target,) = (each.target for each in program.kernels if each.op == "paged_attention")
    assert target == "triton"


def test_a_plan_with_it_is_written_and_read_again():
    model = tiny_model(heads=4, kv_heads=1, head_dim=64, weight_dtype="bf16")
    plan = make_plan(model=model, kv_dtype="bf16", page_tokens=64)
    kernels = emit_program(plan, target="flash_attn").kernels
    text = dumps(msgspec.structs.replace(plan, kernels=kernels))
    assert loads(text, Plan).kernels == kernels

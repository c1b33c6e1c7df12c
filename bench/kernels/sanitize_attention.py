"""Cases of sanitize.py: paged attention in each of its forms, on steps of a few short sequences."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import torch

from bench.kernels.sanitize_data import GOOD, Case, normal, on_host, typed, worst
from codegen.kernels import load_reference
from codegen.kernels.kv_write.triton import kv_write
from codegen.kernels.paged_attention import gluon
from codegen.kernels.paged_attention import triton as attention

Rows = Sequence[tuple[int, int, bool]]
"""Sequences of a step: queries, keys, whether the queries' own keys are among them."""


def step(rows: Rows, *, page: int) -> tuple[int, SimpleNamespace]:
    """Pages in use, and a step's inputs on the host; pages in reversed order, one unused."""
    used = [-(-keys // page) for _, keys, _ in rows]
    pool = list(range(sum(used) + 1))
    starts = [0]
    for queries, _, _ in rows:
        starts.append(starts[-1] + queries)
    tables = [[pool.pop() for _ in range(count)] for count in used]
    width = max(1, *used)
    return len(pool) + sum(used), SimpleNamespace(
        slots_T=torch.tensor([0 if here else -1 for count, _, here in rows for _ in range(count)]),
        query_starts_B1=torch.tensor(starts, dtype=torch.int32),
        kv_lens_B=torch.tensor([keys for _, keys, _ in rows], dtype=torch.int32),
        page_table_BP=torch.tensor([each + [0] * (width - len(each)) for each in tables],
                                   dtype=torch.int32),
        host=SimpleNamespace(query_starts=starts, kv_lens=[keys for _, keys, _ in rows],
                             causal=[here for _, _, here in rows]),
        memo={},
    )  # fmt: skip


def placed(inputs: SimpleNamespace, device: torch.device) -> SimpleNamespace:
    """The same on the device, with a list of its own."""
    moved = {
        name: each.to(device) if isinstance(each, torch.Tensor) else each
        for name, each in vars(inputs).items()
    }
    return SimpleNamespace(**{**moved, "memo": {}})


def lists_of(inputs: SimpleNamespace) -> list[tuple[attention.Form, attention.WorkList]]:
    """What the op decided to launch for a step: forms and their lists."""
    kept = [each for lists in inputs.memo.values() for each in lists]
    return [each for each in kept if isinstance(each[0], attention.Form)]


def _nothing(device: torch.device, heads: attention.Heads) -> None:
    """Instead of a trial."""


def attended(
    device: torch.device,
    rows: Rows,
    *,
    constants: Mapping[str, int],
    kv_heads: int = 2,
    group: int = 4,
    head: int = 128,
    page: int = 128,
    narrow: bool = False,
    hopper: bool = False,
    tried: bool = False,
) -> float:
    """One step under some constants of triton.py, twice from one list: counters have to be zero.

    tried  with the trial of all forms, on a token without keys, that a device begins with
    """
    pages, inputs = step(rows, page=page)
    tokens = len(inputs.slots_T)
    q, *kv = typed(device, normal(tokens, kv_heads * group, head, seed=1),
                   normal(pages, page, kv_heads, head, seed=2),
                   normal(pages, page, kv_heads, head, seed=3))  # fmt: skip
    scales: list[torch.Tensor] = []
    if narrow:
        wide, kv = kv, [torch.zeros(each.shape, dtype=torch.float8_e4m3fn, device=device)
                        for each in kv]  # fmt: skip
        scales = [torch.ones(pages, kv_heads, device=device) for _ in "kv"]
        slots = torch.arange(pages * page, device=device)
        kv_write(*(each.flatten(0, 1) for each in wide), *kv, slots, *scales)
    here = placed(inputs, device)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(attention, **constants))
        if not tried:
            stack.enter_context(mock.patch.object(attention, "_compile_all", _nothing))
            stack.enter_context(mock.patch.object(gluon, "try_out", _nothing))
        attention._hopper.cache_clear()  # noqa: SLF001 - as the constants say
        out, lse = attention.paged_attention(q, *kv, kv[0], here, head**-0.5, *scales)
        again, _ = attention.paged_attention(q, *kv, kv[0], here, head**-0.5, *scales)
        forms = [form for form, _ in lists_of(here)]
    attention._hopper.cache_clear()  # noqa: SLF001
    assert not hopper or any(form.hopper for form in forms), "no Gluon kernel here"
    expected, expected_lse = load_reference("paged_attention")(
        q.cpu().float(), *on_host(kv), kv[0].cpu(), inputs, head**-0.5, *on_host(scales)
    )
    finite = expected_lse.isfinite()
    off = (out.cpu().float() - expected).norm() / expected.norm()
    apart = (lse.cpu() - expected_lse)[finite].abs().max()
    same = torch.equal(out, again) and torch.equal(lse.cpu().isfinite(), finite)
    return worst(float(off) / GOOD, float(apart) / 1e-3, 0.0 if same else math.inf)


DECODES: Rows = ((1, 1, True), (1, 100, True), (1, 0, False), (1, 700, True))
CHUNKS: Rows = ((40, 300, True), (33, 77, False), (20, 130, True))
BOTH: Rows = (*DECODES, *CHUNKS)
PLAIN: Mapping[str, int] = {"GLUON": 0, "MIXED": 0}
FUSED: Mapping[str, int] = {**PLAIN, "APART_TILES": 0, "FUSE_MERGE": 2}

ATTENTION = "paged_attention/tiles:attention_kernel"
MERGE = "paged_attention/tiles:merge_kernel"
GLUON = "paged_attention/gluon:attention_kernel"
FP8_WRITE = "kv_write/triton:kv_write_scaled_kernel"
CASES: dict[str, Case] = {
    "attention Gluon, chunks": Case(
        kernels=(GLUON,), hopper=True,
        run=lambda device: attended(device, CHUNKS, constants={"GLUON": 1, "MIXED": 0},
                                    hopper=True, tried=True),
    ),
    "attention Gluon, pieces": Case(
        kernels=(GLUON, MERGE), hopper=True,
        run=lambda device: attended(device, ((33, 2000, True),), kv_heads=1, hopper=True,
                                    constants={"GLUON": 1, "MIXED": 0}),
    ),
    "attention Gluon, one list": Case(
        kernels=(GLUON,), hopper=True,
        run=lambda device: attended(device, BOTH, constants={"GLUON": 1, "MIXED": 2},
                                    hopper=True),
    ),
    "attention Gluon, small pages": Case(
        kernels=(GLUON,), hopper=True,
        run=lambda device: attended(device, CHUNKS, kv_heads=1, group=7, head=64, page=16,
                                    constants={"GLUON": 1, "MIXED": 0}, hopper=True),
    ),
    "attention decode, merged apart": Case(
        kernels=(ATTENTION, MERGE),
        run=lambda device: attended(device, DECODES, constants={**PLAIN, "FUSE_MERGE": 0}),
    ),
    "attention decode, last block merges": Case(
        kernels=(ATTENTION,),
        run=lambda device: attended(device, DECODES, constants=FUSED),
    ),
    "attention chunks, portable": Case(
        kernels=(ATTENTION, MERGE),
        run=lambda device: attended(device, (*CHUNKS, (5, 600, True)), constants=PLAIN),
    ),
    "attention one list, portable": Case(
        kernels=(ATTENTION,),
        run=lambda device: attended(device, BOTH, constants={"GLUON": 0, "MIXED": 2}),
    ),
    "attention fp8": Case(
        kernels=(ATTENTION, FP8_WRITE),
        run=lambda device: attended(device, BOTH, constants=FUSED,
                                    narrow=True),
    ),
}  # fmt: skip

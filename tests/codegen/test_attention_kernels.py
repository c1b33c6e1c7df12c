"""Paged attention on Triton: kernels equal the definition, in the interpreter and on a GPU."""

import math
from types import SimpleNamespace

import pytest
import torch
from builders import make_plan, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from poisoning import poison
from strategies_codegen import DTYPES, loaded

from codegen.emit import emit_program
from codegen.kernels import load_reference, load_spec
from codegen.kernels.kv_write import triton as writing
from codegen.kernels.paged_attention import triton as kernel
from codegen.kernels.paged_attention.work import (
    ITEM_FIELDS,
    WorkList,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Rows = list[tuple[int, int, bool]]
"""Sequences: queries, keys, whether the queries' own keys are among them."""


def step(rows: Rows, *, page: int, seed: int, padding: int = 0) -> SimpleNamespace:
    """Inputs with pages in random order; their number is `pages`."""
    used = [-(-keys // page) for _, keys, _ in rows]
    pool = torch.randperm(sum(used) + 1, generator=torch.Generator().manual_seed(seed)).tolist()
    starts, tables = [0], []
    for (queries, _, _), pages in zip(rows, used, strict=True):
        starts.append(starts[-1] + queries)
        tables.append([pool.pop() for _ in range(pages)])
    width = max(1, *used)
    slots = [0 if here else -1 for count, _, here in rows for _ in range(count)]
    return SimpleNamespace(
        pages=sum(used) + 1,
        slots_T=torch.tensor(slots + [-1] * padding).to(DEVICE),
        query_starts_B1=torch.tensor(starts).int().to(DEVICE),
        kv_lens_B=torch.tensor([keys for _, keys, _ in rows]).int().to(DEVICE),
        page_table_BP=torch.tensor([row + [0] * (width - len(row)) for row in tables])
        .int()
        .to(DEVICE),
        host=None,
        memo={},
    )


def exact(q_TNH, k_pages, v_pages, inputs, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in double precision: a token at a time, all its keys laid out."""
    out = torch.zeros(q_TNH.shape, device=DEVICE).double()
    lse = torch.full(q_TNH.shape[:2], -torch.inf, device=DEVICE).double()
    group = q_TNH.shape[1] // k_pages.shape[2]
    starts = inputs.query_starts_B1.tolist()
    for b, keys in enumerate(inputs.kv_lens_B.tolist()):
        k_SNH, v_SNH = (
            pages[inputs.page_table_BP[b].long()]
            .flatten(0, 1)[:keys]
            .double()
            .repeat_interleave(group, 1)
            for pages in (k_pages, v_pages)
        )
        for t in range(starts[b], starts[b + 1]) if keys else ():
            seen = keys if inputs.slots_T[starts[b]] < 0 else keys - (starts[b + 1] - 1 - t)
            logits_NS = torch.einsum("nh,snh->ns", q_TNH[t].double(), k_SNH[:seen]) * scale
            lse[t] = logits_NS.logsumexp(-1)
            out[t] = torch.einsum("ns,snh->nh", logits_NS.softmax(-1), v_SNH[:seen])
    return out.cpu(), lse.cpu()


UNIT = 2**-23
"""Of fp32: most by which one operation is off, relatively, where tensor cores cut what others
round."""


def lse_bound(q_TNH: torch.Tensor, k_pages: torch.Tensor, scale: float, keys: int) -> float:
    """Most that a log sum in fp32 is off, to first order; `keys` of the longest sequence.

    A logit, at most `size`, is a sum of H products in any order, which has H roundings, and then
    has one each by the scale in base 2, its own rounding, and the difference from the largest,
    which is twice as large: H + 5 of `size` with that of the product itself. That error shifts the
    log sum as it is. A tile's powers, each off by two units, are added in any order, 128 at most,
    and each tile is joined to the sum with three roundings: the change of the largest, product,
    sum. The result is a logarithm, off by two units, and two roundings of size + log(keys).
    """
    norms = [float(each.double().norm(dim=-1).max()) for each in (q_TNH, k_pages)]
    size = scale * norms[0] * norms[1]
    tiles = -(-keys // min(k_pages.shape[1], 64))
    logits = (q_TNH.shape[-1] + 5) * size
    result = 4 + 2 * (size + math.log(max(keys, 1)))
    return UNIT * (logits + 128 + 3 * tiles + result)


def check(
    rows: Rows,
    *,
    kv_heads: int,
    group: int,
    head: int,
    page: int,
    dtype: str,
    padding: int = 0,
    seed: int = 0,
) -> None:
    """The kernel against the definition, on random data with NaN for what is not written."""
    inputs = step(rows, page=page, seed=len(rows), padding=padding)
    tokens = len(inputs.slots_T)
    random = torch.Generator().manual_seed(tokens + seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(DTYPES[dtype]).to(DEVICE)

    q = normal(tokens, kv_heads * group, head)
    k, v = (normal(inputs.pages, page, kv_heads, head) for _ in "kv")
    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        out, lse = kernel.paged_attention(q, k, v, k, inputs, head**-0.5)
    expected, expected_lse = exact(q, k, v, inputs, head**-0.5)
    assert out.dtype == q.dtype
    bound = load_spec("paged_attention").tolerance[dtype]
    assert ((out.cpu().double() - expected).abs() <= bound).all()
    bound = lse_bound(q, k, head**-0.5, max(keys for _, keys, _ in rows))
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=0, atol=bound)


MIXED: Rows = [(1, 130, True), (40, 300, True), (1, 1, True), (1, 0, False), (9, 70, False)]


@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        (MIXED, {"kv_heads": 2, "group": 4, "head": 64, "page": 64}),
        (MIXED, {"kv_heads": 1, "group": 8, "head": 128, "page": 128, "padding": 3}),
        # a decode of many keys is cut in pieces; a chunk's diagonal crosses two tiles
        ([(1, 1500, True), (17, 129, True)], {"kv_heads": 1, "group": 16, "head": 64, "page": 64}),
        ([(130, 131, True)], {"kv_heads": 1, "group": 1, "head": 64, "page": 64}),
        ([(12, 700, True), (64, 64, True)], {"kv_heads": 2, "group": 1, "head": 64, "page": 128}),
        # pieces that hold nothing that some of their rows may see
        ([(33, 80, True), (1, 40, True)], {"kv_heads": 1, "group": 2, "head": 64, "page": 16}),
        # groups that do not divide a tile
        ([(3, 200, True), (21, 90, True)], {"kv_heads": 1, "group": 7, "head": 64, "page": 64}),
        ([(1, 65, True), (2, 2, True)], {"kv_heads": 1, "group": 3, "head": 64, "page": 64}),
        ([(1, 0, False), (30, 0, False)], {"kv_heads": 1, "group": 4, "head": 64, "page": 64}),
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("mixed", [0, 2])
def test_kernels_equal_the_definition(rows, shape, dtype, mixed, monkeypatch):
    """Chunks and decodes of a step apart, and in one list whatever it gains."""
    kinds = {queries * shape["group"] > 16 for queries, _, _ in rows}
    if mixed and len(kinds) == 1:
        pytest.skip("one kind of sequence")
    monkeypatch.setattr(kernel, "MIXED", mixed)
    if torch.cuda.is_available() and dtype == "fp32":
        pytest.skip("tiles of fp32 do not fit into shared memory")
    check(rows, **shape, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("gluon", [0, 1])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
def test_long_chunks_on_the_device(gluon, group, monkeypatch, fresh_seed):
    monkeypatch.setattr(kernel, "GLUON", gluon)
    kernel._hopper.cache_clear()  # noqa: SLF001 - one process, both kernels
    rows = [
        (300, 5000, True),
        (1, 9000, True),
        (128, 128, True),
        (200, 700, False),
        (64, 995, True),
    ]
    sizes = {"kv_heads": 2, "group": group, "dtype": "bf16", "seed": fresh_seed}
    check(rows, head=128, page=64, **sizes)
    check(rows, head=64, page=128, **sizes)
    kernel._hopper.cache_clear()  # noqa: SLF001


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [[(33, 1_050_000, True)], [(1, 1_050_000, True)]])
def test_prefixes_past_a_million_on_the_device(rows, fresh_seed):
    check(rows, kv_heads=1, group=4, head=128, page=128, dtype="bf16", seed=fresh_seed)


def test_a_recorded_step_merges_its_pieces_and_leaves_its_counters_as_they_were(monkeypatch):
    """Twice from one list: the last piece of a tile sets the counter back for the next launch."""
    monkeypatch.setattr(kernel, "FUSE_MERGE", 2)
    lens = [1500, 70, 0, 333]
    inputs = step([(1, keys, True) for keys in lens], page=64, seed=0)
    inputs.recorded = True
    q = torch.randn(len(lens), 4, 64, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    k, v = (
        torch.randn(inputs.pages, 64, 1, 64, generator=torch.Generator().manual_seed(seed))
        .half()
        .to(DEVICE)
        for seed in (1, 2)
    )
    expected, expected_lse = exact(q, k, v, inputs, 0.125)
    for _ in range(2):
        out, lse = kernel.paged_attention(q, k, v, k, inputs, 0.125)
        assert ((out.cpu().double() - expected).abs() <= 2**-8).all()
        bound = lse_bound(q, k, 0.125, max(lens))
        torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=0, atol=bound)
        ((form, work),) = inputs.memo[next(iter(inputs.memo))]
        assert form.fused
        assert (work.items_IF[:, 8] >= 0).sum() > 2
        assert not work.counters.any()


@pytest.mark.parametrize("keys", [100, 6000])
def test_pieces_are_merged_by_the_last_of_them_only_where_they_are_long(keys, monkeypatch):
    monkeypatch.setattr(kernel, "APART_TILES", 1)
    monkeypatch.setattr(kernel, "FUSE_MERGE", 2)
    inputs = step([(1, keys, True)], page=64, seed=0)
    q = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    k = torch.randn(inputs.pages, 64, 1, 64, generator=torch.Generator().manual_seed(1)).half()
    k = k.to(DEVICE)
    out, _ = kernel.paged_attention(q, k, k, k, inputs, 0.125)
    expected, _ = exact(q, k, k, inputs, 0.125)
    assert ((out.cpu().double() - expected).abs() <= 2**-8).all()
    ((form, work),) = inputs.memo[next(iter(inputs.memo))]
    assert work.merges_MF is not None
    assert form.fused == (keys > 1000)


def test_keys_at_a_million_positions_are_masked_where_they_stand():
    """One item that begins far into a table of 8192 pages; all pages are the same few."""
    keys, page, tile = 1_048_570, 128, 128
    tiles = -(-keys // tile)
    inputs = step([(20, 3 * page, True)], page=page, seed=0)
    table = torch.zeros(1, tiles, dtype=torch.int32)
    table[0, -2:] = torch.tensor([1, 2])
    inputs.page_table_BP = table.to(DEVICE)
    q, k, v = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half().to(DEVICE)
        for seed, shape in enumerate([(20, 4, 64), (4, page, 1, 64), (4, page, 1, 64)])
    )
    heads = kernel.Heads(
        kv_heads=1, group=4, head_dim=64, page_tokens=page, dtype=q.dtype, page_dtype=k.dtype
    )
    form = kernel.Form(rows=128, keys=tile, tile_tokens=32, stages=2, warps=8, resident=1)
    item = [0, 0, 0, 20, keys - 20, keys, tiles - 2, tiles, -1, -1, 0, 1]
    assert len(item) == ITEM_FIELDS
    work = WorkList(
        items_IF=torch.tensor([item], dtype=torch.int32).to(DEVICE),
        merges_MF=None,
        slots=0,
        one_masked_tile=True,
    )
    inputs.memo["paged_attention", heads] = [(form, work)]
    out, lse = kernel.paged_attention(q, k, v, k, inputs, 0.125)
    near = step([(20, keys - (tiles - 2) * tile, True)], page=page, seed=0)
    near.page_table_BP = torch.tensor([[1, 2]])
    expected, expected_lse = exact(q, k, v, near, 0.125)
    assert ((out.cpu().double() - expected).abs() <= 2**-8).all()  # as the spec's, for fp16
    bound = lse_bound(q, k, 0.125, 2 * tile)  # the item's, where the keys begin
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=0, atol=bound)


def test_a_step_builds_its_lists_once_and_asks_no_tensor(monkeypatch):
    """With the host's lengths at hand, nothing but the page table is read, by the kernels; results
    may have a place already."""
    inputs = step([(1, 100, True), (20, 90, True)], page=64, seed=0)
    starts, lens = inputs.query_starts_B1.tolist(), inputs.kv_lens_B.tolist()
    inputs.host = SimpleNamespace(query_starts=starts, kv_lens=lens, causal=[True, True])
    q = torch.randn(21, 4, 64, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    k = torch.randn(inputs.pages, 64, 1, 64).half().to(DEVICE)
    expected, _ = exact(q, k, k, inputs, 0.125)
    inputs.slots_T = inputs.query_starts_B1 = inputs.kv_lens_B = None
    for _ in range(2):  # layers
        out, _ = kernel.paged_attention(q, k, k, k, inputs, 0.125)
        assert ((out.cpu().double() - expected).abs() <= 2**-8).all()
        monkeypatch.setattr(kernel, "_launches", None)
    lse = torch.full((21, 4), torch.nan, device=DEVICE)
    inputs.results = (torch.full_like(q, torch.nan), lse)
    found = kernel.paged_attention(q, k, k, k, inputs, 0.125)
    assert all(one is other for one, other in zip(found, inputs.results, strict=True))
    assert ((found[0].cpu().double() - expected).abs() <= 2**-8).all()
    assert lse.isfinite().all()


# --- the cache, and bundles -----------------------------------------------------------------------


@given(
    slots=st.lists(st.integers(-1, 11), min_size=0, max_size=8, unique_by=lambda x: x % 100),
    kinds=st.sampled_from([("fp32", torch.float32), ("fp16", torch.float16)]),
)
@settings(max_examples=20)
def test_kv_write_equals_the_reference_bit_by_bit(slots, kinds):
    name, page_dtype = kinds
    wide = torch.randn(len(slots), 4, 2, 6, generator=torch.Generator().manual_seed(0))
    wide = wide.to(DTYPES[name]).to(DEVICE)
    k, v = wide[:, 0], wide[:, 2]  # parts of wider rows, as a fused projection leaves them
    before = [torch.randn(3, 4, 2, 6).to(page_dtype).to(DEVICE) for _ in "kv"]
    expected = [each.clone() for each in before]
    where = torch.tensor(slots, dtype=torch.int64).to(DEVICE)
    load_reference("kv_write")(k, v, *expected, where)
    writing.kv_write(k, v, *before, where)
    for found, wanted in zip(before, expected, strict=True):
        assert torch.equal(found, wanted)


def test_an_emitted_file_finds_its_parts_and_computes_the_same(tmp_path):
    model = tiny_model(heads=4, kv_heads=1, head_dim=64, weight_dtype="bf16")
    plan = make_plan(model=model, kv_dtype="bf16", page_tokens=64)
    program = emit_program(plan, target="triton")
    by_op = {each.op: each.target for each in program.kernels}
    assert by_op["paged_attention"] == "triton"
    inputs = step([(1, 70, True), (20, 90, True)], page=64, seed=0)
    q = torch.randn(21, 4, 64).half().to(DEVICE)
    k, v = (torch.randn(inputs.pages, 64, 1, 64).half().to(DEVICE) for _ in "kv")
    with loaded(program, tmp_path) as load:
        out, _ = load("paged_attention").paged_attention(q, k, v, k, inputs, 0.125)
    expected, _ = exact(q, k, v, inputs, 0.125)
    assert ((out.cpu().double() - expected).abs() <= 2**-8).all()


@pytest.mark.parametrize(
    ("page_tokens", "head_dim", "dtype", "target"),
    [
        (64, 64, "bf16", "triton"),
        (128, 128, "fp16", "triton"),
        (16, 64, "bf16", "triton"),
        (64, 16, "bf16", "torch"),
        (64, 64, "fp32", "torch"),
    ],
)
def test_what_the_kernels_are_not_made_for_takes_the_reference(
    page_tokens, head_dim, dtype, target
):
    model = tiny_model(heads=4, kv_heads=2, head_dim=head_dim, weight_dtype=dtype)
    plan = make_plan(model=model, kv_dtype=dtype, page_tokens=page_tokens)
    program = emit_program(plan, target="triton")
    (found,) = (each.target for each in program.kernels if each.op == "paged_attention")
    assert found == target

"""Every op equals what it stands for, and every Triton kernel equals its op's reference."""

import ast
import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from poisoning import poison
from strategies_codegen import DTYPES, rounding_interpreter

from codegen.graph import COLLECTIVES
from codegen.kernels import KERNELS, load_reference, load_spec, source_texts
from codegen.kernels.add_rms_norm.reference import add_rms_norm
from codegen.kernels.attention.reference import attention
from codegen.kernels.embedding_share.reference import embedding_share
from codegen.kernels.kv_write.reference import kv_write
from codegen.kernels.paged_attention import reference as paged
from codegen.kernels.rms_norm.reference import rms_norm
from codegen.kernels.rope.reference import rope
from plans.errors import UnknownName
from plans.ops import OPS

TRITON = [op for op in KERNELS if "triton" in load_spec(op).targets]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_every_op_has_one_meaning():
    assert set(KERNELS) | set(COLLECTIVES) == set(OPS)
    assert not set(KERNELS) & set(COLLECTIVES)


@pytest.mark.parametrize("op", KERNELS)
def test_references_take_what_the_vocabulary_says(op):
    parameters = list(load_reference(op).__annotations__)[: len(OPS[op].inputs)]
    assert parameters == list(OPS[op].inputs)
    assert load_spec(op).op == op


def test_unknown_ops_are_named():
    with pytest.raises(UnknownName, match="rms_norm"):
        load_spec("rmsnorm")


# --- triton ---------------------------------------------------------------------------------------


def randn(*shape: int, dtype: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DTYPES[dtype]).to(DEVICE)


def arguments(op: str, case: dict) -> tuple:
    """Random ones; with `columns`, x is part of wider rows, as a fused projection gives."""
    shape, dtype = case["shape"], case["dtype"]
    if op == "silu_mul":
        return (randn(*shape, dtype=dtype, seed=0),)
    if op == "rotary":  # as for rope below
        positions = torch.tensor([0, 1, 777, 1_048_575, 131_072])[-shape[0] :].to(DEVICE)
        return (positions, torch.logspace(0, -5, shape[1]).to(DEVICE), 1.3)
    weight = randn(shape[-1], dtype=dtype, seed=2)
    if "columns" in case:
        wide = randn(shape[0], case["columns"], dtype=dtype, seed=0)
        width = math.prod(shape[1:])
        x = wide[:, width : 2 * width].view(shape)
    else:
        x = randn(*shape, dtype=dtype, seed=0)
    if op == "rope":  # angles past a thousand turns, as behind a million tokens
        positions = torch.tensor([0, 1, 777, 1_048_575, 131_072])[-shape[0] :].to(DEVICE)
        return (x, positions, torch.logspace(0, -5, shape[2] // 2).to(DEVICE), 1.3)
    residual = (randn(*shape, dtype=dtype, seed=1),) if op == "add_rms_norm" else ()
    return (x, *residual, weight, 1e-5)


@pytest.fixture
def rounding(monkeypatch) -> None:
    rounding_interpreter(monkeypatch)


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize(
    ("op", "case"), [(op, case) for op in TRITON for case in load_spec(op).cases]
)
def test_triton_equals_the_reference(op, case, monkeypatch):
    module = importlib.import_module(f"codegen.kernels.{op}.triton")
    args = arguments(op, case)
    expected = load_reference(op)(*args)
    poison(monkeypatch)
    found = getattr(module, op)(*args)
    if op == "add_rms_norm":
        assert torch.equal(found[1], expected[1])  # one rounded addition: no freedom
        found, expected = found[0], expected[0]
    assert found.dtype == expected.dtype
    bound = load_spec(op).tolerance[case["dtype"]]
    share = (found.float() - expected.float()).abs() / expected.float().abs().clamp_min(1)
    assert share.max() <= bound


@pytest.mark.parametrize("op", TRITON)
def test_tunables_are_constants_of_the_kernel_file(op):
    """Emission can then write tuned values into the file, and the spec tells their defaults."""
    tree = ast.parse(source_texts(op, "triton")[op])
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
    }
    assert constants == load_spec(op).params


# --- references -----------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 70),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    seed=st.integers(0, 99),
)
def test_rms_norm_equals_its_formula_in_double_precision(rows, width, eps, seed):
    x, weight = randn(rows, width, dtype="fp32", seed=seed), randn(width, dtype="fp32", seed=1)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt() * weight
    # a sum of 70 squares, a root, a quotient and two products, each rounded: below 80 x 2^-24
    torch.testing.assert_close(rms_norm(x, weight, eps).double(), exact, rtol=5e-6, atol=1e-12)
    normed, total = add_rms_norm(x, x.flip(0), weight, eps)
    assert torch.equal(total, x + x.flip(0))
    assert torch.equal(normed, rms_norm(total, weight, eps))


@given(seed=st.integers(0, 99), scale=st.sampled_from([1.0, 1.3]))
def test_rope_turns_pairs_as_complex_numbers(seed, scale):
    x, positions = randn(4, 3, 8, dtype="fp32", seed=seed).cpu(), torch.tensor([0, 1, 50, 999])
    frequencies = torch.tensor([1.0, 0.3, 0.01, 0.0001])
    turned = rope(x, positions, frequencies, scale)
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    angle = (positions[:, None].float() * frequencies).double()
    exact = pairs * torch.polar(torch.full_like(angle, scale), angle)[:, None]
    expected = torch.cat((exact.real, exact.imag), dim=-1)
    # cos and sin of fp32 angles up to 1000 are good to 2^-23; two products and a sum of |x| < 5
    torch.testing.assert_close(turned.double(), expected, rtol=0, atol=40 * 2**-23)


@given(
    slots=st.lists(st.integers(0, 11), unique=True, max_size=8),
    skipped=st.lists(st.integers(0, 8), max_size=4),
    dtype=st.sampled_from(["fp32", "bf16"]),
)
def test_kv_write_stores_rows_at_slots_and_skips_minus_one(slots, skipped, dtype):
    slots = list(slots)
    for at in skipped:
        slots.insert(at, -1)
    pages = [randn(3, 4, 2, 5, dtype=dtype, seed=seed) for seed in (0, 1)]
    rows = [randn(len(slots), 2, 5, dtype="fp32", seed=seed) for seed in (2, 3)]
    expected = [each.clone() for each in pages]
    for at, slot in enumerate(slots):
        if slot >= 0:
            for into, row in zip(expected, rows, strict=True):
                into[slot // 4, slot % 4] = row[at].to(into.dtype)
    kv_write(*rows, *pages, torch.tensor(slots, dtype=torch.int64).to(DEVICE))
    for found, wanted in zip(pages, expected, strict=True):
        assert torch.equal(found, wanted)


@given(ids=st.lists(st.integers(0, 11), min_size=1, max_size=9))
def test_shares_of_the_embedding_add_up(ids):
    weight, ids = randn(12, 3, dtype="fp32", seed=0).cpu(), torch.tensor(ids)
    parts = [embedding_share(ids, weight[first : first + 4], first) for first in (0, 4, 8)]
    assert torch.equal(sum(parts), weight[ids])


# --- attention ------------------------------------------------------------------------------------


def step(
    rows: list[tuple[int, int, bool]], *, page_tokens: int, seed: int, pool: list[int] | None = None
) -> SimpleNamespace:
    """Inputs of sequences (queries, keys, whether their keys are here), pages in random order."""
    starts, tables = [0], []
    used = [-(-keys // page_tokens) for _, keys, _ in rows]
    if pool is None:
        pool = torch.randperm(sum(used) + 1, generator=torch.Generator().manual_seed(seed)).tolist()
    for (queries, _, _), pages in zip(rows, used, strict=True):
        starts.append(starts[-1] + queries)
        tables.append([pool.pop() for _ in range(pages)])
    width = max(1, *used)
    return SimpleNamespace(
        slots_T=torch.tensor([0 if here else -1 for count, _, here in rows for _ in range(count)]),
        query_starts_B1=torch.tensor(starts, dtype=torch.int32),
        kv_lens_B=torch.tensor([keys for _, keys, _ in rows], dtype=torch.int32),
        page_table_BP=torch.tensor([row + [0] * (width - len(row)) for row in tables]).int(),
    )


def brute_force(q, k_pages, v_pages, inputs, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """One query, one head, one key at a time, in double precision."""
    heads, group = q.shape[1], q.shape[1] // k_pages.shape[2]
    out, lse = torch.zeros(q.shape).double(), torch.full(q.shape[:2], -torch.inf).double()
    flat = [pages.flatten(0, 1).double() for pages in (k_pages, v_pages)]
    for b, keys in enumerate(inputs.kv_lens_B.tolist()):
        first, end = inputs.query_starts_B1[b : b + 2].tolist()
        table = inputs.page_table_BP[b].tolist()
        rows = [table[at // k_pages.shape[1]] * k_pages.shape[1] + at % k_pages.shape[1]
                for at in range(keys)]  # fmt: skip
        for t in range(first, end):
            seen = keys if inputs.slots_T[first] < 0 else keys - (end - 1 - t)
            for n in range(heads if seen else 0):
                k, v = (each[rows[:seen], n // group] for each in flat)
                logits = k @ q[t, n].double() * scale
                lse[t, n] = logits.logsumexp(0)
                out[t, n] = (logits - lse[t, n]).exp() @ v
    return out, lse


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[int, int, bool]]:
    """Decodes, chunks behind prefixes, shards that are only read, and empty ones."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        queries = draw(st.sampled_from([1, 1, 1, 3, 9]))
        here = draw(st.booleans())
        prefix = draw(st.integers(0, 20))
        rows.append((queries, prefix + queries if here else prefix, here))
    return rows


@settings(max_examples=60)
@given(
    rows=batches(),
    page_tokens=st.sampled_from([1, 4, 16]),
    group=st.sampled_from([1, 2, 4]),
    room=st.sampled_from([1, 64, 1 << 24]),
    padding=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_paged_attention_equals_brute_force(*, rows, page_tokens, group, room, padding, seed):
    inputs = step(rows, page_tokens=page_tokens, seed=seed)
    pool = sum(-(-keys // page_tokens) for _, keys, _ in rows) + 1
    pages = [randn(pool, page_tokens, 2, 8, dtype="fp32", seed=seed + at).cpu() for at in (1, 2)]
    poison_unused(pages, rows, inputs, page_tokens)
    tokens = sum(queries for queries, _, _ in rows) + padding
    q = randn(tokens, 2 * group, 8, dtype="fp32", seed=seed).cpu()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged, "LOGITS", room)  # blocks of one query, of some, of all
        out, lse = paged.paged_attention(q, *pages, pages[0], inputs, 0.3)
    expected, expected_lse = brute_force(q, *pages, inputs, 0.3)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    off, lse_off = attention_bounds(q, *pages, 0.3, max(keys for _, keys, _ in rows))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=off)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=lse_off)


def attention_bounds(q, k, v, scale, keys) -> tuple[float, float]:
    """Most that results and log sums in fp32 are off, to first order, whatever the order of sums.

    A logit, at most `size`, is off by H units of it after the sum of H products, one more by the
    scale, and two by the difference from the largest, which may be twice as large: `logit`, one
    spare. Its power is off by that and two units of its own (torch's exp), the sum of all powers by
    as much and a unit a key. A result is a sum of values, by weights with both errors, with a unit
    a key more, one for the product and one for the quotient. A log sum has the error of the sum,
    and that of a logarithm and of one addition, which are rounded as what they are.
    """
    unit = 2**-24
    norms = [each.double().nan_to_num().norm(dim=-1).max().item() for each in (q, k)]
    size = scale * norms[0] * norms[1]
    logit = (q.shape[-1] + 4) * size
    value = v.double().nan_to_num().abs().max().item()
    results = value * (2 * (logit + 2 + keys) + 2)
    return unit * results, unit * (logit + 4 + keys + size + math.log(max(keys, 1)))


def poison_unused(pages, rows, inputs, page_tokens) -> None:
    """NaN wherever no sequence has a key."""
    used = torch.zeros(pages[0].shape[:2], dtype=torch.bool)
    for b, (_, keys, _) in enumerate(rows):
        for at in range(keys):
            used[inputs.page_table_BP[b, at // page_tokens], at % page_tokens] = True
    for each in pages:
        each[~used] = torch.nan


def test_whole_sequences_need_no_pages_to_be_the_same():
    """Both definitions of attention agree: torch's own, and ours over pages."""
    q = randn(40, 4, 16, dtype="fp32", seed=0).cpu()
    k, v = (randn(40, 2, 16, dtype="fp32", seed=seed).cpu() for seed in (1, 2))
    inputs = step([(40, 40, True)], page_tokens=40, seed=0, pool=[0])
    out, _ = paged.paged_attention(q, k[None], v[None], k[None], inputs, 0.25)
    off, _ = attention_bounds(q, k, v, 0.25, 40)
    # each is off by as much from what is exact
    torch.testing.assert_close(out, attention(q, k, v, 0.25), rtol=0, atol=2 * off)


def test_a_long_chunk_of_eight_heads_stays_within_its_memory():
    """512 queries on 8192 keys: every block of logits is at most LOGITS."""
    q = randn(512, 8, 16, dtype="fp32", seed=0).cpu()
    pages = [randn(128, 64, 2, 16, dtype="fp32", seed=seed).cpu() for seed in (1, 2)]
    inputs = step([(512, 8192, True)], page_tokens=64, seed=0)
    inputs.page_table_BP %= 128
    sizes = []
    softmax = paged._softmax  # noqa: SLF001 - its argument is what has to stay small
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged, "_softmax", lambda x: (sizes.append(x.numel()), softmax(x))[1])
        paged.paged_attention(q, *pages, pages[0], inputs, 0.25)
    assert max(sizes) <= paged.LOGITS
    assert sum(sizes) <= 512 * 8 * 8192

"""Products of few tokens and what follows them: kernels and references equal the definitions.

Everything is compared with double precision, outputs are poisoned, and pages hold a value that
nothing else has: what is not written shows.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from builders import make_plan, tiny_model
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from strategies_codegen import DTYPES, Machine, Sequence, loaded

from codegen.emit import emit_program
from codegen.kernels import load_reference, load_spec
from codegen.kernels.gate_up_silu import triton as gating
from codegen.kernels.linear import core
from codegen.kernels.linear import spec as linear_spec
from codegen.kernels.linear import triton as multiplying
from codegen.kernels.qkv_rope_write import triton as projecting
from codegen.kernels.qkv_rope_write.pointwise import finish_heads
from codegen.kernels.rotary.reference import rotary

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = "bf16" if GPU else "fp16"
"""The interpreter multiplies bf16 as if its bits were integers."""
EMPTY = -1000.0
"""Of pages before anything is written."""


def normal(*shape: int, seed: int, scale: float = 1.0, dtype: str = DTYPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DTYPES[dtype]).to(DEVICE)


@pytest.fixture(autouse=True)
def own_scratch() -> None:
    """Pieces of an earlier test would be no NaN."""
    core._scratch.cache_clear()  # noqa: SLF001 - as tests of its kernels may


def assert_close(op: str, found: torch.Tensor, exact: torch.Tensor, dtype: str = DTYPE) -> None:
    assert found.dtype == DTYPES[dtype]
    assert found.shape == exact.shape
    share = (found.double() - exact).abs() / exact.abs().clamp_min(1)
    assert share.max() <= load_spec(op).tolerance[dtype]


# --- products -------------------------------------------------------------------------------------

FORMS = [
    core.Form(rows=rows, block_t=16, block_k=64, pieces=pieces)
    for rows in (32, 64)
    for pieces in (1, 3)
]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.rows} rows {form.pieces} pieces")
@pytest.mark.parametrize(
    ("tokens", "outputs", "width"),
    [(1, 128, 64), (3, 200, 136), (16, 65, 320), (40, 1, 8)],  # 40: three tiles of tokens
)
def test_products_of_any_form_equal_the_definition(form, tokens, outputs, width):
    x = normal(tokens, width, seed=1)
    weight = normal(outputs, width, seed=2, scale=width**-0.5)
    bias = normal(outputs, seed=3)
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    core.stream(x, weight, bias, out, form=form, mode=core.PLAIN)
    assert_close("linear", out, x.double() @ weight.double().T + bias.double())
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    weight = normal(2 * outputs, width, seed=4, scale=width**-0.5)
    core.stream(x, weight, None, out, form=form, mode=core.GATED)
    gate, up = (x.double() @ weight.double().T).chunk(2, -1)
    assert_close("gate_up_silu", out, torch.nn.functional.silu(gate) * up)


@pytest.mark.usefixtures("poison")
def test_pieces_are_added_in_order_and_their_counters_are_left_at_zero():
    """The same bits whoever is last, and a second launch finds what the first one found."""
    x, weight = normal(5, 640, seed=1), normal(192, 640, seed=2)
    out = [torch.empty((5, 192), dtype=x.dtype, device=x.device) for _ in range(2)]
    form = core.Form(rows=32, block_t=16, block_k=64, pieces=4)
    for each in out:
        core.stream(x, weight, None, each, form=form, mode=core.PLAIN)
    assert torch.equal(*out)
    _, arrived = core._scratch(x.device)  # noqa: SLF001 - what they share
    assert not arrived.any()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("tokens", [0, 1, 64, 65])
def test_an_op_multiplies_few_tokens_itself_and_leaves_many_to_the_library(tokens, monkeypatch):
    calls = []
    stream = core.stream

    def watched(*args, **options):
        calls.append(args[0].shape[0])
        stream(*args, **options)

    monkeypatch.setattr(multiplying, "stream", watched)
    monkeypatch.setattr(gating, "stream", watched)
    x, weight = normal(tokens, 64, seed=1), normal(128, 64, seed=2, scale=0.125)
    found = multiplying.linear(x, weight, None)
    gated = gating.gate_up_silu(x, weight)
    assert calls == ([tokens, tokens] if 0 < tokens <= 64 else [])
    for op, result, args in (("linear", found, (None,)), ("gate_up_silu", gated, ())):
        expected = load_reference(op)(x, weight, *args)
        assert result.shape == expected.shape
        if tokens:
            assert_close(op, result, expected.double())


def test_fp32_and_rows_that_tma_cannot_address_take_the_library():
    x, weight = normal(2, 64, seed=1, dtype="fp32"), normal(64, 64, seed=2, dtype="fp32")
    assert not core.takes(x, weight)
    assert torch.equal(multiplying.linear(x, weight, None), torch.nn.functional.linear(x, weight))
    x, weight = normal(2, 68, seed=1), normal(64, 68, seed=2)
    assert not core.takes(x, weight)
    wide = normal(2, 128, seed=1)[:, :64]
    assert not core.takes(wide, weight[:, :64].contiguous())


def test_a_kernel_that_is_wrong_here_is_not_used():
    """Its trial is a small product, whole and in pieces, which the Triton kernel passes."""
    core._try_out(torch.device(DEVICE), None)  # noqa: SLF001 - only Hopper comes to it by itself

    def wrong(grid, arguments, x, weight, *, overlap):
        arguments["out_ptr"][:, :-1] = 128

    with pytest.raises(RuntimeError, match="add up to"):
        core._try_out(torch.device(DEVICE), wrong)  # noqa: SLF001


@given(
    rows=st.integers(1, 2000).map(lambda tiles: 64 * tiles),
    tokens=st.integers(1, 64),
    head_dim=st.sampled_from([0, 64, 128]),
)
def test_forms_fit_the_multiprocessor_and_hold_normed_heads(rows, tokens, head_dim):
    form = multiplying.choice().form(rows, tokens, head_dim=head_dim)
    assert form.stages >= 3
    held = form.stages * 2 * form.block_k * (2 * form.rows + form.block_t)
    assert held + 4 * form.rows * form.block_t < core.SHARED_BYTES
    assert form.block_t >= tokens
    assert 2 * form.rows >= head_dim
    tiles = -(-rows // (2 * form.rows))
    assert tiles * form.pieces >= multiplying.LEAST_BLOCKS
    assert form.pieces == 1 or tiles < multiplying.LEAST_BLOCKS


@pytest.mark.parametrize("tokens", [1, 32, 33, 64])
@pytest.mark.parametrize("rows", [1280, 4096, 6144, 28672])
def test_the_gate_compiles_the_forms_that_run(rows, tokens):
    params = load_spec("linear").params
    (each,) = linear_spec.products(0, params, {"tokens": tokens, "n": rows, "k": 4096})
    form = multiplying.choice().form(rows, tokens)
    held = {"ROWS": form.rows, "BLOCK_T": form.block_t, "BLOCK_K": form.block_k,
            "STAGES": form.stages, "SPLIT": form.pieces > 1}  # fmt: skip
    assert held.items() <= each.constants.items()


# --- heads ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A projection to heads."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int = 72
    bias: bool = False
    norm: bool = False


SHAPES = [
    Shape(tokens=1, heads=4, kv_heads=1, head_dim=128, width=320),
    Shape(tokens=5, heads=8, kv_heads=1, head_dim=64, bias=True),
    Shape(tokens=19, heads=3, kv_heads=3, head_dim=64, norm=True),  # an odd number of heads
    Shape(tokens=3, heads=16, kv_heads=1, head_dim=128, bias=True, norm=True),
]


def problem(shape: Shape, dtype: str = DTYPE) -> SimpleNamespace:
    """Arguments of the op, and what it has to give, in double precision."""
    every = shape.heads + 2 * shape.kv_heads
    rows = every * shape.head_dim
    x = normal(shape.tokens, shape.width, seed=1, dtype=dtype)
    weight = normal(rows, shape.width, seed=2, scale=shape.width**-0.5, dtype=dtype)
    bias = normal(rows, seed=3, dtype=dtype) if shape.bias else None
    norms = [
        normal(shape.head_dim, seed=4 + at, dtype=dtype) if shape.norm else None for at in (0, 1)
    ]
    positions = torch.randint(
        0, 1 << 20, (shape.tokens,), generator=torch.Generator().manual_seed(6)
    )
    frequencies = torch.logspace(0, -5, shape.head_dim // 2)
    turns = rotary(positions, frequencies, 1.1).to(DEVICE)
    pages = [torch.full((4, 16, shape.kv_heads, shape.head_dim), EMPTY).to(x) for _ in "kv"]
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(7))[: shape.tokens].to(
        DEVICE
    )
    if shape.tokens > 1:
        slots[shape.tokens // 2] = -1
    y = x.double() @ weight.double().T + (bias.double() if bias is not None else 0.0)
    q, k, v = y.view(shape.tokens, every, shape.head_dim).split(
        (shape.heads, shape.kv_heads, shape.kv_heads), 1
    )
    if shape.norm:
        q, k = (
            each / (each.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight_H.double()
            for each, weight_H in zip((q, k), norms, strict=True)
        )
    cos, sin = (turns[:, at : at + 1].double() for at in (0, 1))

    def turned(each: torch.Tensor) -> torch.Tensor:
        a, b = each.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    q, k = turned(q), turned(k)
    wanted = [torch.full(each.shape, EMPTY, dtype=torch.float64) for each in pages]
    for into, rows_TKH in zip(wanted, (k, v), strict=True):
        for slot, row in zip(slots.tolist(), rows_TKH.cpu(), strict=True):
            if slot >= 0:
                into.view(64, *row.shape)[slot] = row
    args = (x, weight, bias, *norms, 1e-5, turns, *pages, slots)
    return SimpleNamespace(
        args=args, pages=pages, q=q.cpu(), wanted=wanted, keys=(k.cpu(), v.cpu())
    )


def check(found: torch.Tensor, given_: SimpleNamespace, dtype: str = DTYPE) -> None:
    assert_close("qkv_rope_write", found.cpu(), given_.q, dtype)
    for each, wanted in zip(given_.pages, given_.wanted, strict=True):
        assert_close("qkv_rope_write", each.cpu(), wanted, dtype)
        kept = wanted != EMPTY
        assert torch.equal(each.cpu() == EMPTY, ~kept)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize(
    ("shape", "rows"),
    [  # a norm reads a head, which has to lie in one tile
        (shape, rows)
        for shape in SHAPES
        for rows in (32, 64)
        if not shape.norm or 2 * rows >= shape.head_dim
    ],
    ids=str,
)
def test_heads_of_any_form_equal_the_definition(shape, rows, pieces):
    given_ = problem(shape)
    x, weight, bias, q_norm, k_norm, eps, turns, k_pages, v_pages, slots = given_.args
    heads = core.Heads(
        heads=shape.heads, kv_heads=shape.kv_heads, q_norm_H=q_norm, k_norm_H=k_norm, eps=eps,
        cos_sin_T2H2=turns, k_pages=k_pages, v_pages=v_pages, slots_T=slots,
    )  # fmt: skip
    q = torch.empty((shape.tokens, shape.heads * shape.head_dim), dtype=x.dtype, device=x.device)
    form = core.Form(rows=rows, block_t=16, block_k=64, pieces=pieces)
    core.stream(
        x, weight, bias, q, form=form, mode=core.HEADS, head_dim=shape.head_dim, heads=heads
    )
    check(q.view(given_.q.shape), given_)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_pass_behind_the_library_equals_the_definition(shape):
    given_ = problem(shape)
    x, weight, bias, q_norm, k_norm, eps, turns, k_pages, v_pages, slots = given_.args
    heads = core.Heads(
        heads=shape.heads, kv_heads=shape.kv_heads, q_norm_H=q_norm, k_norm_H=k_norm, eps=eps,
        cos_sin_T2H2=turns, k_pages=k_pages, v_pages=v_pages, slots_T=slots,
    )  # fmt: skip
    q = torch.empty((shape.tokens, shape.heads * shape.head_dim), dtype=x.dtype, device=x.device)
    y = torch.nn.functional.linear(x, weight, bias)
    finish_heads(y, q, heads, heads_a_block=4)
    check(q.view(given_.q.shape), given_)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("most", [0, 64])
def test_the_op_and_its_reference_equal_the_definition(shape, most, monkeypatch):
    """By the stream and, with no tokens left to it, by the library."""
    monkeypatch.setattr(projecting, "TOKENS_MAX", most)
    monkeypatch.setattr(projecting, "NORM_TOKENS_MAX", most)
    for op in (projecting.qkv_rope_write, load_reference("qkv_rope_write")):
        given_ = problem(shape)
        q, written = op(*given_.args)
        assert written is given_.pages[0]
        check(q, given_)


@pytest.mark.usefixtures("poison")
def test_heads_of_fp32_and_of_odd_sizes_take_the_library():
    shape = Shape(tokens=3, heads=2, kv_heads=1, head_dim=24, bias=True, norm=True)
    given_ = problem(shape, dtype="fp32")
    q, _ = projecting.qkv_rope_write(*given_.args)
    check(q, given_, dtype="fp32")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    "op",
    [projecting.qkv_rope_write, load_reference("qkv_rope_write")],
    ids=["triton", "reference"],
)
@settings(
    max_examples=4,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    shape=st.sampled_from(SHAPES),
    random=st.randoms(use_true_random=False),
    most=st.sampled_from([0, 64]),
)
def test_pages_in_fp8_hold_the_definition_in_steps_of_any_cut(op, cuts, shape, random, most):
    """Of the definition, rounded to e4m3 by the scale of its page's first token."""
    given_ = problem(replace(shape, tokens=sum(cuts)))
    x, weight, *norms, turns, _, _, _ = given_.args
    order = random.sample(range(4), 4)
    slots = torch.tensor([order[at // 8] * 8 + at % 8 for at in range(sum(cuts))])
    exact = given_.keys
    cache = [torch.full((4, 8, *exact[0].shape[1:]), torch.nan).to(DTYPES["fp8"]) for _ in "kv"]
    cache = [each.to(DEVICE) for each in cache]
    scales = [torch.full((4, shape.kv_heads), torch.nan, device=DEVICE) for _ in "kv"]
    at = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projecting, "TOKENS_MAX", most)
        for cut in cuts:
            rows = slice(at, at + cut)
            into = (*cache, slots[rows].to(DEVICE), *scales)
            q, _ = op(x[rows].contiguous(), weight, *norms, turns[rows].contiguous(), *into)
            assert_close("qkv_rope_write", q.cpu(), given_.q[rows])
            at += cut
    rounding = load_spec("qkv_rope_write").tolerance[DTYPE]
    for pages, scales_PK, wanted_TKH in zip(cache, scales, exact, strict=True):
        scale_TK1 = scales_PK.cpu().double()[slots // 8][..., None]
        first_TKH = wanted_TKH[torch.arange(sum(cuts)) // 8 * 8].abs().amax(-1, keepdim=True)
        off = rounding * first_TKH.clamp_min(1)
        assert (scale_TK1 <= first_TKH + off).all()
        assert (scale_TK1.clamp_min(2**-6) * 2 >= first_TKH - off).all()
        found_TKH = pages.cpu().double().flatten(0, 1)[slots] * scale_TK1
        most_TK1 = 448 * scale_TK1
        error = (found_TKH - wanted_TKH.clamp(-most_TK1, most_TK1)).abs()
        # half a step of e4m3: 2^-4 of a value, at least half of its least step, 2^-9
        e4m3 = (2**-4 * wanted_TKH.abs()).maximum(2**-10 * scale_TK1)
        assert (error <= e4m3 + rounding * wanted_TKH.abs().clamp_min(1) * (1 + 2**-4)).all()


# --- in a program ---------------------------------------------------------------------------------


@pytest.mark.skipif(GPU, reason="the machine's ranks hold CPU tensors, for the interpreter")
def test_an_emitted_step_of_few_tokens_equals_the_reference_program(tmp_path):
    """Chunks and decodes through all three ops' kernels, beside the program of references."""
    model = tiny_model(layers=2, heads=4, kv_heads=2, head_dim=64, hidden=64, weight_dtype="fp16",
                       qk_norm=True)  # fmt: skip
    plan = make_plan(model=model)
    logits = {}
    for target in ("torch", "triton"):
        program = emit_program(plan, target=target)
        with loaded(program, tmp_path / target) as load:
            machine = Machine(plan, load)
            sequence = Sequence(tokens=list(range(1, 14)))
            for count in (9, 3, 1):
                machine.step([(sequence, count)])
        logits[target] = torch.cat(sequence.logits)
    assert logits["torch"].isfinite().all()
    # fp16 keeps 11 bits; two layers round some twenty values in a row, by 2^-11 each
    bound = 20 * 2**-11 * logits["torch"].abs().max()
    torch.testing.assert_close(logits["triton"], logits["torch"], rtol=0, atol=float(bound))


@pytest.mark.usefixtures("poison")
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 33, 64, 300])
def test_native_kernels_equal_the_definition_at_model_sizes(tokens, fresh_seed):
    """An 8B layer's shapes, in the forms that its steps take."""
    x = normal(tokens, 4096, seed=fresh_seed)
    weight = normal(6144, 4096, seed=fresh_seed + 1, scale=2**-6)
    exact = x.double() @ weight.double().T
    assert_close("linear", multiplying.linear(x, weight, None), exact)
    gate, up = exact.chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up
    assert_close("gate_up_silu", gating.gate_up_silu(x, weight), exact)


@pytest.mark.usefixtures("poison")
@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 8, 128), (8, 1, 128), (14, 2, 64)]
)
@pytest.mark.parametrize("tokens", [1, 32, 64])
def test_native_heads_equal_the_definition_at_model_sizes(
    *, tokens, heads, kv_heads, head_dim, norm
):
    shape = Shape(tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim, width=2048,
                  bias=True, norm=norm)  # fmt: skip
    given_ = problem(shape)
    q, _ = projecting.qkv_rope_write(*given_.args)
    check(q, given_)

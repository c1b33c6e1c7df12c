"""Every kernel of ours once, on the smallest shapes that still have tails, against its reference.

For `sanitize.py`, whose tools slow a kernel down a hundred times: a case launches few blocks, its
data is made on the host, and what it computed is compared there. Each case names the kernels that
it launches; a test holds these names against those in the tree.
"""

import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from bench.kernels import sanitize_attention
from bench.kernels.sanitize_data import GOOD, Case, normal, on_host, share, typed, worst
from codegen.kernels import load_reference
from codegen.kernels.add_rms_norm.triton import add_rms_norm
from codegen.kernels.all_reduce_add_rms_norm.triton import one_shot
from codegen.kernels.gate_up_silu.triton import gate_up_silu
from codegen.kernels.kv_write.triton import kv_write
from codegen.kernels.kvp_merge.triton import kvp_merge
from codegen.kernels.kvp_pack.triton import kvp_pack
from codegen.kernels.linear import core
from codegen.kernels.linear.triton import linear
from codegen.kernels.qkv_rope_write.triton import qkv_rope_write
from codegen.kernels.rms_norm.triton import rms_norm
from codegen.kernels.rope.triton import rope
from codegen.kernels.rotary.triton import rotary
from codegen.kernels.sample.triton import sample
from codegen.kernels.silu_mul.triton import silu_mul
from codegen.rowwise import Builder
from codegen.rowwise_op import load_source
from codegen.rowwise_source import reference_source, triton_source
from runtime.parallel.kvp import ABSENT, OWN, merge_shards

EPS = 1e-5


# --- row-wise -------------------------------------------------------------------------------------


def norms(device: torch.device) -> float:
    """Widths that are no power of two, one that takes several blocks, heads of a wider row."""
    shares = []
    for tokens, width in ((3, 200), (2, 20_488)):
        arguments = (*typed(device, normal(tokens, width, seed=1), normal(tokens, width, seed=2),
                            normal(width, seed=3)), EPS)  # fmt: skip
        found = add_rms_norm(*arguments)
        expected = load_reference("add_rms_norm")(*on_host(arguments))
        shares += [share("add_rms_norm", *each) for each in zip(found, expected, strict=True)]
        alone = arguments[1:]
        exact = load_reference("rms_norm")(*on_host(alone))
        shares.append(share("rms_norm", rms_norm(*alone), exact))
    wide, weight = typed(device, normal(3, 7 * 64, seed=4), normal(64, seed=5))
    heads = wide[:, : 5 * 64].view(3, 5, 64)
    shares.append(share("rms_norm", rms_norm(heads, weight, EPS),
                        load_reference("rms_norm")(heads.cpu(), weight.cpu(), EPS)))  # fmt: skip
    return worst(*shares)


def gated(device: torch.device) -> float:
    """SwiGLU, and a region that the generator makes of one and a residual."""
    shares = []
    for width in (200, 2500):
        (x,) = typed(device, normal(3, 2 * width, seed=1))
        shares.append(share("silu_mul", silu_mul(x), load_reference("silu_mul")(x.cpu())))
    rows = Builder()
    gate_up, residual = rows.row(400), rows.row(200)
    product = rows.step("silu_mul", gate_up)
    region = rows.region(product, rows.step("add", product, residual))
    kernel, reference = (
        load_source("silu_mul_add", make("silu_mul_add", region)).silu_mul_add
        for make in (triton_source, reference_source)
    )
    arguments = typed(device, normal(3, 400, seed=2), normal(3, 200, seed=3))
    both = zip(kernel(*arguments), reference(*on_host(arguments)), strict=True)
    return worst(*shares, *(share("silu_mul", *each) for each in both))


def turned(device: torch.device) -> float:
    """Rotation of five heads, and its table alone."""
    frequencies = torch.logspace(0, -5.7, 24)
    positions = torch.tensor([0, 7, 1_000_003])
    x = normal(3, 7 * 48, seed=1)[:, : 5 * 48].view(3, 5, 48)
    exact = load_reference("rope")(x, positions, frequencies, 1.0)
    found = rope(x.to(device), positions.to(device), frequencies.to(device), 1.0)
    table = rotary(positions.to(device), frequencies.to(device), 1.0)
    known = load_reference("rotary")(positions, frequencies, 1.0)
    return worst(share("rope", found, exact), share("rotary", table, known))


# --- pages ----------------------------------------------------------------------------------------


def written(device: torch.device) -> float:
    """Rows of a wider projection into pages of bf16 and of fp8; one row is stored nowhere."""
    rows = normal(5, 4 * 3 * 64, seed=1)
    k, v = (rows[:, at * 192 : at * 192 + 192].view(5, 3, 64) for at in (1, 2))
    slots = torch.tensor([18, 19, -1, 32, 33])
    off = 0
    for narrow in (False, True):
        dtype = torch.float8_e4m3fn if narrow else torch.bfloat16
        pages = [torch.zeros(3, 16, 3, 64, dtype=dtype) for _ in "kv"]
        pages += [torch.ones(3, 3) for _ in "kv"] if narrow else []
        found = [each.to(device) for each in pages]
        kv_write(k.to(device), v.to(device), *found[:2], slots.to(device), *found[2:])
        load_reference("kv_write")(k, v, *pages[:2], slots, *pages[2:])
        for each, own in zip(found, pages, strict=True):
            off += int((each.cpu().float() != own.float()).sum())
    return 2.0 * off


# --- products -------------------------------------------------------------------------------------


def products(device: torch.device, *, hopper: bool) -> float:
    """Plain with bias, and gated: whole tiles and shared ones, ragged in tokens, rows, inputs."""
    launch = core._hopper(device) if hopper else None  # noqa: SLF001 - either kernel
    assert not hopper or launch is not None, "no Gluon kernel here"
    shares = []
    forms = [core.Form(rows=rows, block_t=16, block_k=64, pieces=pieces, overlap=hopper)
             for rows, pieces in ((32, 1), (32, 3), (64, 3))]  # fmt: skip
    for form, (tokens, outputs, width) in zip(
        forms, ((3, 200, 136), (17, 65, 320), (40, 200, 648)), strict=True
    ):
        x, weight, bias, wide = typed(
            device,
            normal(tokens, width, seed=1),
            normal(outputs, width, seed=2, scale=width**-0.5),
            normal(outputs, seed=3),
            normal(2 * outputs, width, seed=4, scale=width**-0.5),
        )
        options: dict[str, Any] = {"form": form, "head_dim": 128, "heads": None}
        out, gate = x.new_empty(tokens, outputs), x.new_empty(tokens, outputs)
        core._run(x, weight, bias, out, launch, mode=core.PLAIN, **options)  # noqa: SLF001
        core._run(x, wide, None, gate, launch, mode=core.GATED, **options)  # noqa: SLF001
        x, weight, bias, wide = (each.cpu().double() for each in (x, weight, bias, wide))
        shares.append(share("linear", out, x @ weight.T + bias))
        first, second = (x @ wide.T).chunk(2, -1)
        shares.append(share("gate_up_silu", gate, torch.nn.functional.silu(first) * second))
    return worst(*shares)


def ops_of_products(device: torch.device) -> float:
    """As a program calls them: the forms that the ops choose, launches that may overlap."""
    x, weight, bias = typed(device, normal(5, 640, seed=1), normal(192, 640, seed=2, scale=0.04),
                            normal(192, seed=3))  # fmt: skip
    pairs = [
        ("linear", linear(x, weight, bias), x.double() @ weight.double().T + bias.double()),
        ("gate_up_silu", gate_up_silu(x, weight),
         load_reference("gate_up_silu")(*(each.cpu().double() for each in (x, weight)))),
    ]  # fmt: skip
    return worst(*(share(*each) for each in pairs))


def projected(device: torch.device, *, tokens: int, normed: bool) -> float:
    """Three query heads and one KV head, from the residual stream into pages."""
    width, heads = 136, 3
    x, weight, bias, *norm = typed(
        device, normal(tokens, width, seed=1),
        normal((heads + 2) * 128, width, seed=2, scale=width**-0.5),
        normal((heads + 2) * 128, seed=3), normal(128, seed=4), normal(128, seed=5),
    )  # fmt: skip
    slots = torch.arange(tokens) * 2
    slots[tokens // 2] = -1
    pages = [x.new_zeros(tokens // 8 + 1, 16, 1, 128) for _ in "kv"]
    turns = load_reference("rotary")(torch.arange(tokens) + 9, torch.logspace(0, -4, 64), 1.0)
    scales = tuple(norm) if normed else (None, None)
    q, _ = qkv_rope_write(x, weight, bias, *scales, EPS, turns.to(device), *pages, slots.to(device))
    exact = [torch.zeros_like(each, device="cpu") for each in pages]
    reference = load_reference("qkv_rope_write")
    known, _ = reference(*on_host((x, weight, bias, *scales)), EPS, turns, *exact, slots)
    shares = (share("qkv_rope_write", *each) for each in zip((q, *pages), (known, *exact),
                                                            strict=True))  # fmt: skip
    return worst(*shares)


def into_nan(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The library's product with bias, over NaN written by a kernel that initcheck sees."""
    out = torch.full((len(x), len(weight)), torch.nan, dtype=x.dtype, device=x.device)
    return torch.addmm(bias, x, weight.T, out=out)


def projected_by_the_library(device: torch.device) -> float:
    """More tokens than the streaming kernel takes; initcheck does not see the library write."""
    with mock.patch.object(torch.nn.functional, "linear", into_nan):
        return worst(*(projected(device, tokens=67, normed=normed) for normed in (True, False)))


# --- exchange -------------------------------------------------------------------------------------


def exchanged(device: torch.device) -> float:
    """Shares of three groups, one of them absent for a token, packed and merged."""
    tokens, heads, head = 3, 5, 32
    outs = typed(device, *(normal(tokens, heads, head, seed=seed) for seed in range(3)))
    lses = [normal(tokens, heads, seed=seed + 9).float() for seed in range(3)]
    rows = torch.arange(tokens)
    sent = []
    for out, lse in zip(outs[1:], lses[1:], strict=True):
        places = torch.stack((rows * 0, rows * 0 + tokens, rows)).int()
        arguments = (each.to(device) for each in (out, lse, rows, places))
        sent.append(kvp_pack(*arguments))
    shares = torch.stack((rows * 0 + OWN, rows, rows + tokens)).int()
    shares[2, 1] = ABSENT
    lses[2][1] = -torch.inf
    before = torch.tensor([0] * tokens + [tokens] * tokens)
    places = torch.stack((before, before * 0 + tokens, torch.cat((rows, rows)))).int()
    merged = outs[0].clone()
    tables = (each.to(device) for each in (rows, shares, places))
    kvp_merge(merged, lses[0].to(device), *tables, torch.cat(sent))
    exact = merge_shards(torch.stack(outs).cpu().float(), torch.stack(lses))
    off = (merged.cpu().float() - exact).norm() / exact.norm()
    return float(off) / GOOD


def reduced(device: torch.device) -> float:
    """Rank 0 of two, alone: what rank 1 would have sent, and its flags, are there before.

    So nothing waits, and one GPU is enough; the handshake itself needs two of them.
    """
    slots, width = 4, 200
    x, other, residual, weight = typed(device, *(normal(3, width, seed=seed) for seed in (1, 2, 3)),
                                       normal(width, seed=4))  # fmt: skip
    shares = [x.new_zeros(2, slots, width) for _ in "01"]
    shares[1][1, :3] = other  # the first launch uses half 1
    flags = [torch.zeros(slots, 2, dtype=torch.int32) for _ in "01"]
    flags[0][:, 1] = 1
    flags = [each.to(device) for each in flags]
    peers = SimpleNamespace(
        rank=0, ranks=2, slots=slots, slot_bytes=width * 2,
        epochs=torch.zeros(slots, dtype=torch.int32).to(device),
        **{name: torch.tensor([each.data_ptr() for each in tensors]).to(device)
           for name, tensors in (("buffers", shares), ("flags", flags))},
    )  # fmt: skip
    found = one_shot(x, residual, weight, EPS, peers)
    total = (x.cpu().float() + other.cpu().float()).to(x.dtype)
    exact = load_reference("add_rms_norm")(total, residual.cpu(), weight.cpu(), EPS)
    told = 0.0 if int(flags[1][:3, 0].sum()) == 3 else math.inf
    pairs = zip(found, exact, strict=True)
    return worst(told, *(share("add_rms_norm", *each) for each in pairs))


# --- sampling ------------------------------------------------------------------------------------


def sampled(device: torch.device) -> float:
    """Greedy, plain, top-k, top-p and min-p rows of a vocabulary with a ragged end."""
    logits = normal(5, 1003, seed=1, scale=3.0)
    controls = torch.tensor(
        [
            [0.0, 0, 1.0, 0.0, 0.3],
            [0.7, 0, 1.0, 0.0, 0.41],
            [1.0, 20, 1.0, 0.0, 0.6],
            [1.0, 0, 0.9, 0.0, 0.77],
            [1.3, 50, 0.95, 0.02, 0.11],
        ],
        dtype=torch.float64,
    )
    found = sample(logits.to(device), controls.to(device)).cpu()
    return 2.0 * int((found != load_reference("sample")(logits, controls)).sum())


STREAM = "linear/core:stream_kernel"
GLUON_STREAM = "linear/gluon:stream_kernel"
CASES: dict[str, Case] = {
    **sanitize_attention.CASES,
    "products Gluon": Case(
        kernels=(GLUON_STREAM,), hopper=True,
        run=lambda device: products(device, hopper=True),
    ),
    "products portable": Case(
        kernels=(STREAM,), run=lambda device: products(device, hopper=False),
    ),
    "linear, gate_up_silu as called": Case(
        kernels=(GLUON_STREAM,), hopper=True, run=ops_of_products,
    ),
    "qkv_rope_write Gluon": Case(
        kernels=(GLUON_STREAM,), hopper=True,
        run=lambda device: worst(projected(device, tokens=5, normed=True),
                                 projected(device, tokens=17, normed=False)),
    ),
    "qkv_rope_write behind the library": Case(
        kernels=("qkv_rope_write/pointwise:finish_heads_kernel",), run=projected_by_the_library,
    ),
    "kv_write, bf16 and fp8": Case(
        kernels=("kv_write/triton:kv_write_kernel", sanitize_attention.FP8_WRITE), run=written,
    ),
    "norms": Case(
        kernels=("add_rms_norm/triton:add_rms_norm_kernel", "rms_norm/triton:rms_norm_kernel"),
        run=norms,
    ),
    "silu_mul, generated region": Case(
        kernels=("silu_mul/triton:silu_mul_kernel",), run=gated,
    ),
    "rope, rotary": Case(
        kernels=("rope/triton:rope_kernel", "rotary/triton:rotary_kernel"), run=turned,
    ),
    "exchange between groups": Case(
        kernels=("kvp_pack/triton:kvp_pack_kernel", "kvp_merge/triton:kvp_merge_kernel"),
        run=exchanged,
    ),
    "all_reduce_add_rms_norm, one rank": Case(
        kernels=("all_reduce_add_rms_norm/triton:all_reduce_add_rms_norm_kernel",), run=reduced,
    ),
    "sample": Case(
        kernels=("sample/tiles:group_best_kernel", "sample/tiles:pick_kernel"), run=sampled,
    ),
}  # fmt: skip

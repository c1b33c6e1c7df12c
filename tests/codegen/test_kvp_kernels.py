"""What kvp groups exchange: kernels equal their references, and each reads and writes its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_codegen import DTYPES, rounding_interpreter

from codegen.kernels import load_spec
from codegen.kernels.base import Value
from codegen.kernels.kvp_merge import reference
from codegen.kernels.kvp_merge import triton as merging
from codegen.kernels.kvp_pack import reference as packing_reference
from codegen.kernels.kvp_pack import triton as packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poison")
ABSENT = -1
EMPTY = torch.empty


def poisoned(*shape, **options) -> torch.Tensor:
    """Bytes 0xFF: NaN in every dtype, so that what a kernel forgets to write is seen."""
    return EMPTY(*shape, **options).fill_(255)


@pytest.fixture(autouse=True)
def poison(monkeypatch) -> None:
    rounding_interpreter(monkeypatch)
    monkeypatch.setattr(torch, "empty", poisoned)


def heads(tokens: int, count: int, size: int, dtype: str, seed: int):
    """Random attention of a shard, and its log sums; some heads saw no key."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(tokens, count, size, generator=generator).clamp(-4, 4)
    lse = torch.randn(tokens, count, generator=generator) * 9
    empty = torch.rand(tokens, count, generator=generator) < 0.15
    out[empty], lse[empty] = 0, -torch.inf
    return out.to(DTYPES[dtype]).to(DEVICE), lse.to(DEVICE)


def places(counts: list[int]) -> torch.Tensor:
    """places_3E of peers that get so many entries."""
    columns, before = [], 0
    for count in counts:
        columns += [(before, count, inside) for inside in range(count)]
        before += count
    return torch.tensor(columns, dtype=torch.int32).T.contiguous().to(DEVICE)


def value(tensor: torch.Tensor) -> Value:
    names = {torch.uint8: "uint8", torch.int32: "int32", torch.int64: "int64"}
    names |= {dtype: name for name, dtype in DTYPES.items()}
    return Value(shape=tuple(tensor.shape), dtype=names[tensor.dtype])


def framed(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy inside a larger, poisoned tensor, and that: a store beyond either end shows there."""
    frame = EMPTY(tensor.numel() + 128, dtype=tensor.dtype, device=tensor.device)
    frame.view(torch.uint8).fill_(255)
    inner = frame[64:-64].view(tensor.shape)
    inner.copy_(tensor)
    return inner, frame


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


CASES = {
    "counts": st.lists(st.integers(1, 3), min_size=1, max_size=3),
    "count": st.sampled_from([1, 3, 8, 12]),
    "size": st.sampled_from([4, 16, 32]),
    "dtype": st.sampled_from(["fp32", "bf16", "fp16"]),
    "seed": st.integers(0, 99),
}


@settings(max_examples=10)
@given(**CASES)
def test_packed_bytes_are_those_of_the_reference(counts, count, size, dtype, seed):
    """Of heads that fill no whole tile, for peers whose outputs begin at no multiple of 16."""
    tokens = max(counts) + 2
    out, lse = heads(tokens, count, size, dtype, seed)
    rows = torch.randint(tokens, (sum(counts),), generator=torch.Generator().manual_seed(seed))
    args = (out, lse, rows.to(DEVICE), places(counts))
    expected = packing_reference.kvp_pack(*args)
    assert torch.equal(packing.kvp_pack(*args), expected)
    assert value(expected) == load_spec("kvp_pack").infer(*map(value, args))


@settings(max_examples=15)
@given(**CASES)
def test_merged_rows_are_those_of_the_reference_and_no_other_byte_changes(
    counts, count, size, dtype, seed
):
    """Peers hold shares of some tokens; what they sent of no token is poison, as are the ends."""
    generator = torch.Generator().manual_seed(seed)
    shared, own = max(counts), seed % (len(counts) + 1)
    out, lse = heads(shared + 3, count, size, dtype, seed)
    rows = torch.randperm(shared + 3, generator=generator)[:shared].to(DEVICE)
    shares = torch.full((len(counts) + 1, shared), ABSENT, dtype=torch.int32)
    shares[own] = reference.OWN
    others = [group for group in range(len(counts) + 1) if group != own]
    sent, before = [], 0
    for group, entries in zip(others, counts, strict=True):
        shares[group, torch.randperm(shared, generator=generator)[:entries]] = torch.arange(
            before, before + entries, dtype=torch.int32
        )
        theirs = heads(entries, count, size, dtype, seed + 100 + group)
        sent += [raw(each.flatten()) for each in theirs]
        before += entries
    shares[own, 0] = ABSENT  # of a token that this group holds no key of
    lse[rows[0]] = torch.nan
    out[rows[0]] = torch.nan
    args = (lse, rows, shares.to(DEVICE), places(counts), torch.cat(sent))
    expected = reference.kvp_merge(out.clone(), *args)
    found, frame = framed(out)
    assert merging.kvp_merge(found, *args) is found
    others_T = torch.ones(shared + 3, dtype=torch.bool)
    others_T[rows.cpu()] = False
    assert torch.equal(raw(found[others_T]), raw(out[others_T]))
    assert bool((raw(frame)[: 64 * out.element_size()] == 255).all())
    assert bool((raw(frame)[-64 * out.element_size() :] == 255).all())
    bound = load_spec("kvp_merge").tolerance[dtype]
    off = (found[rows].float() - expected[rows].float()).abs()
    assert bool((off <= bound * expected[rows].float().abs().clamp_min(1)).all())
    assert value(expected) == load_spec("kvp_merge").infer(value(out), *map(value, args))


@pytest.mark.parametrize("tokens", [1, 2])
def test_shares_of_no_token_are_not_read(tokens):
    out, lse = heads(tokens, 2, 16, "bf16", 1)
    shares = torch.tensor([[reference.OWN] * tokens, [ABSENT] * tokens], dtype=torch.int32)
    rows = torch.arange(tokens).to(DEVICE)
    received = poisoned(2 * 2 * (16 * 2 + 4), dtype=torch.uint8, device=DEVICE)
    args = (lse, rows, shares.to(DEVICE), places([2]), received)
    assert torch.equal(merging.kvp_merge(out.clone(), *args), out)
    assert torch.equal(reference.kvp_merge(out.clone(), *args), out)


@pytest.mark.parametrize(("size", "taken"), [(64, True), (80, False), (128, True)])
def test_heads_that_are_no_power_of_two_are_not_taken(size, taken):
    out = Value(shape=("T", 8, size), dtype="bf16")
    for op in ("kvp_pack", "kvp_merge"):
        takes = load_spec(op).takes
        assert takes is not None
        assert takes(out, Value(shape=("T", 8), dtype="fp32")) == taken

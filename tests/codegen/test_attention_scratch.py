"""What attention is said to hold: by the kernels' own tiles, for chunks, decodes and both."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels.base import Largest, Value
from codegen.kernels.paged_attention import gluon, reference, scratch
from codegen.kernels.paged_attention import triton as kernel
from codegen.kernels.paged_attention.scratch import Tile, chunk_tile, decode_tile, triton_kept
from codegen.kernels.paged_attention.work import ITEM_FIELDS
from plans.ops import HostInputs

TYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
CPU = torch.device("cpu")
HEADS = [(group, head, page, dtype) for group in (1, 2, 3, 4, 5, 7, 8, 16, 20, 40, 64)
         for head in (64, 128) for page in (16, 64, 128, 256) for dtype in TYPES]  # fmt: skip


def heads_of(group: int, head: int, page: int, dtype: str, kv_heads: int = 2) -> kernel.Heads:
    return kernel.Heads(
        kv_heads=kv_heads,
        group=group,
        head_dim=head,
        page_tokens=page,
        dtype=torch.bfloat16,
        page_dtype=TYPES[dtype],
    )


def tile_of(form: kernel.Form) -> Tile:
    return Tile(
        rows=form.rows, keys=form.keys, tokens=form.tile_tokens, resident=form.resident
    )  # fmt: skip


@pytest.mark.parametrize("hopper", [False, True])
def test_tiles_are_those_of_the_kernels(hopper, monkeypatch):
    """For every group, head, page and type; the Gluon kernel where it takes them."""

    def found(device, heads):
        return "kernel" if hopper and gluon.takes(heads) else None

    monkeypatch.setattr(kernel, "_hopper", found)
    for group, head, page, dtype in HEADS:
        heads = heads_of(group, head, page, dtype)
        few = decode_tile(group, head, page, heads.page_dtype.itemsize)
        assert few == tile_of(kernel.decode_form(heads, CPU))
        form = kernel.chunk_form(heads, CPU, 1 << 20)
        assert chunk_tile(group, page, hopper=bool(form.hopper), fp8=dtype == "fp8") == tile_of(
            form
        )


def test_what_has_no_tile_is_the_kernels_own_constant():
    assert kernel.DECODE_COST == 100 * scratch.DECODE_COST
    assert kernel.DECODE_COST_HOPPER == 100 * scratch.DECODE_COST_HOPPER
    assert kernel.CHUNK_ROWS == scratch.CHUNK_ROWS
    assert kernel.DECODE_WAVES == kernel.DECODE_LEAST == kernel.MIXED == 1
    assert reference.LOGITS == scratch.LOGITS


def steps_of(tokens: int, sequences: int, keys: int, chunk: int) -> Largest:
    return Largest(
        sizes={"T": tokens, "R": sequences, "pages": 0},
        keys=keys,
        pool=keys * sequences,
        chunks=((chunk, keys),),
    )


def held(
    heads: kernel.Heads, lengths: list[tuple[int, int]], monkeypatch, *, hopper: bool
) -> list[tuple[kernel.Form, int]]:
    """Form and partial results' bytes, with those of the list, of each launch of a step."""
    starts = [0]
    for tokens, _ in lengths:
        starts.append(starts[-1] + tokens)
    host = HostInputs(
        query_starts=tuple(starts),
        kv_lens=tuple(keys for _, keys in lengths),
        causal=(True,) * len(lengths),
    )
    longest = max(keys for _, keys in lengths)
    inputs = SimpleNamespace(
        host=host,
        page_table_BP=torch.empty((len(lengths), -(-longest // heads.page_tokens)), device="meta"),
    )
    monkeypatch.setattr(kernel, "processors", lambda device: scratch.PROCESSORS)
    monkeypatch.setattr(
        kernel, "_hopper", lambda device, each: "kernel" if hopper and gluon.takes(each) else None
    )
    q_TNH = torch.empty((starts[-1], heads.kv_heads * heads.group, heads.head_dim))
    return [
        (form, 4 * work.slots * heads.kv_heads * form.rows * (heads.head_dim + 1)
            + 4 * ITEM_FIELDS * len(work.items_IF))
        for form, work in kernel._launches(heads, q_TNH, inputs)  # noqa: SLF001 - its lists
    ]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    group=st.sampled_from([1, 3, 4, 7, 8]),
    chunk=st.sampled_from([2, 4, 5, 6, 17, 64, 600, 2048]),
    keys=st.sampled_from([3000, 40_000, 1 << 18]),
    sequences=st.sampled_from([1, 8, 64]),
    dtype=st.sampled_from(sorted(TYPES)),
    hopper=st.booleans(),
)
def test_no_launch_of_the_largest_steps_holds_more(*, group, chunk, keys, sequences, dtype, hopper):
    """A chunk alone, decodes alone, and a chunk with decodes, as the kernel lists them itself."""
    heads = heads_of(group, 128, 128, dtype)
    steps = steps_of(chunk + sequences - 1, sequences, keys, chunk)
    q = Value(shape=("T", 2 * group, 128), dtype="bf16")
    pages = Value(shape=("pages", 128, 2, 128), dtype=dtype)
    reported = triton_kept(steps, q, pages)
    lists = [[(chunk, keys)], [(1, keys)] * sequences]
    if sequences > 1:
        lists.append([(chunk, keys), *[(1, keys)] * (sequences - 1)])
    with pytest.MonkeyPatch.context() as patch:
        for lengths in lists:
            for _, size in held(heads, lengths, patch, hopper=hopper):
                assert size <= reported


def test_a_chunk_that_fills_no_tile_of_decodes_is_one():
    """Three query heads a KV head: a tile of 16 rows takes 4 tokens, though 5 x 3 would fit."""
    q = Value(shape=("T", 6, 128), dtype="bf16")
    pages = Value(shape=("pages", 128, 2, 128), dtype="bf16")
    four, five = (triton_kept(steps_of(each, 1, 1 << 18, each), q, pages) for each in (4, 5))
    alone = triton_kept(steps_of(1, 1, 1 << 18, 1), q, pages)
    assert four == alone < five


def test_a_mixed_step_can_hold_more_than_its_parts():
    """Pieces of decodes in one list with a chunk have the chunk's rows: 128 instead of 16."""
    q = Value(shape=("T", 32, 128), dtype="bf16")
    pages = Value(shape=("pages", 128, 8, 128), dtype="bf16")
    mixed = triton_kept(steps_of(512 + 63, 64, 1 << 17, 512), q, pages)
    alone = triton_kept(steps_of(512, 1, 1 << 17, 512), q, pages)
    decodes = triton_kept(steps_of(64, 64, 1 << 17, 1), q, pages)
    assert mixed > max(alone, decodes)

"""Counts of attention's work: those of the kernel's own lists, whatever is asked."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from codegen.kernels.paged_attention.recorded import decode_list
from codegen.kernels.paged_attention.work import Queries, WorkList, chunk_list, mixed_list
from planner.attention_work import (
    PROCESSORS,
    TILE_KEYS,
    TILE_ROWS,
    WAVE_COST,
    LargestStep,
    chunk_work,
    decode_work,
    most_pieces,
    partials_bytes,
    power_of_two,
)

torch = pytest.importorskip("torch")

HEADS = st.sampled_from(
    [(4, 1, 128), (8, 1, 128), (8, 2, 128), (28, 4, 128), (32, 8, 64), (64, 8, 128), (7, 1, 128)]
)
TOKENS = st.integers(17, 8192) | st.sampled_from([32, 128, 2048])
PREFIXES = st.integers(0, 1 << 20) | st.integers(0, 4096)


def queries(sequence, begin, tokens, prefix):
    return Queries(
        sequence=sequence, begin=begin, end=begin + tokens, keys=prefix + tokens, causal=True
    )


def listed(heads, tokens, prefix) -> WorkList:
    return chunk_list(
        [queries(0, 0, tokens, prefix)],
        tile_tokens=power_of_two(TILE_ROWS // (heads[0] // heads[1])),
        tile_keys=TILE_KEYS,
        kv_heads=heads[1],
        blocks=PROCESSORS,
    )


@given(heads=HEADS, tokens=TOKENS, prefix=PREFIXES)
def test_a_chunk_is_cut_as_the_kernel_cuts_it(heads, tokens, prefix):
    found, real = chunk_work(heads, tokens, prefix), listed(heads, tokens, prefix)
    items = real.items_IF
    kv_heads = heads[1]
    assert found.slots == real.slots * kv_heads
    assert found.pieces == (0 if real.merges_MF is None else int(real.merges_MF[:, 1].max()))
    assert found.waves == -(-len(items) * kv_heads // PROCESSORS)
    # the busiest processor: no less than the longest item and the mean, no more than both in sum
    lengths = (items[:, 7] - items[:, 6]).double() + WAVE_COST
    mean = float(lengths.sum()) * kv_heads / PROCESSORS
    busiest = found.tiles + WAVE_COST * found.waves
    longest = float(lengths.max())
    assert max(mean, longest) - 1e-6 <= busiest <= mean + longest + WAVE_COST


@given(heads=HEADS, batch=st.integers(1, 256), keys=st.integers(1, 1 << 20))
def test_decodes_are_cut_as_the_kernel_cuts_them(heads, batch, keys):
    found = decode_work(heads, batch, keys)
    ends = torch.arange(1, batch + 1)
    lengths = torch.full((batch,), keys)
    real = decode_list(
        sequence_B=ends - 1,
        begin_B=ends - 1,
        end_B=ends,
        shift_B=lengths - ends,
        keys_B=lengths,
        tile_keys=TILE_KEYS,
        blocks_a_head=max(1, found.at_once // heads[1]),
    )
    items, merges = real.items_IF, real.merges_MF
    assert merges is not None
    assert set(merges[:, 1].tolist()) == {found.pieces}
    assert int((items[:, 7] - items[:, 6]).max()) == found.size
    assert int((items[:, 7] > items[:, 6]).sum()) * heads[1] <= found.items


@st.composite
def steps(draw):
    """Chunks and decodes of a step, of many lengths or all alike."""
    kv_heads = draw(st.sampled_from([1, 2, 8]))
    most = draw(st.sampled_from([1024, 32768, 1 << 20]))
    prefix = st.integers(0, most) | st.just(most)
    tokens = st.sampled_from([32, 100, 512, 2048])
    chunks = draw(st.lists(st.tuples(tokens, prefix), min_size=1, max_size=6))
    decodes = draw(st.lists(prefix, max_size=40))
    return kv_heads, chunks, decodes


def _padded(each, tile_tokens, rows, tile_keys):
    """Pairs of rows and keys in the tiles of one sequence."""
    tiles = -(-(each.end - each.begin) // tile_tokens) + 1
    return tiles * rows * -(-each.keys // tile_keys) * tile_keys


@example(step=(8, [(512, 1 << 20)] * 3, []), group=4, small=False)  # 384 tiles on 132 processors
@given(step=steps(), group=st.sampled_from([1, 4, 8]), small=st.booleans())
def test_no_list_needs_more_partial_results_than_memory_counts(step, group, small):
    kv_heads, chunks, decodes = step
    rows, tile_keys, blocks = (64, 64, 2 * PROCESSORS) if small else (128, 128, PROCESSORS)
    wide, narrow, begin = [], [], 0
    for tokens, prefix in [*chunks, *((1, prefix) for prefix in decodes)]:
        each = queries(len(wide) + len(narrow), begin, tokens, prefix)
        (wide if tokens > 1 else narrow).append(each)
        begin = each.end
    sizes = {"tile_tokens": rows // group, "tile_keys": tile_keys, "kv_heads": kv_heads}
    lists = [chunk_list(wide, **sizes, blocks=blocks)]
    if narrow:
        for cost in (0.7, 1.0):
            mixed = mixed_list(
                wide, narrow, **sizes, heads_together=kv_heads, blocks=blocks, decode_cost=cost
            )
            lists.append(mixed)
    every = (*wide, *narrow)
    step = LargestStep(
        keys=max(each.keys for each in every),
        tokens=begin,
        sequences=len(every),
        least_tokens=32,
        # tiles are taken whole, and by all rows
        products=4.0
        * 128
        * sum(_padded(each, rows // group, rows, tile_keys) for each in wide)
        * kv_heads,
        read_bytes=float("inf"),
        hopper=not small,
    )
    bound = partials_bytes((group * kv_heads, kv_heads, 128), step)
    for real in lists:
        assert real.slots * kv_heads * rows * (128 + 1) * 4 <= bound


@given(tiles=st.integers(1, 528), most=st.integers(1, 8192), more=st.integers(0, 100))
def test_the_bound_rises_with_tiles_and_keys(tiles, most, more):
    least = most_pieces(tiles, most, PROCESSORS)
    assert least <= most_pieces(tiles + more, most, PROCESSORS)
    assert most_pieces(tiles, 1, PROCESSORS) == 0


def test_lists_are_cut_until_there_are_four_tiles_a_processor():
    """40 tokens are 320 tiles of 8 heads at most; the rule cuts up to 528, or 1056 small ones."""
    step = LargestStep(
        keys=1 << 20, tokens=40, sequences=1, least_tokens=1, products=1e18, read_bytes=1e18,
        hopper=True,
    )  # fmt: skip
    few, many, more = (
        partials_bytes((8, 8, 128), step._replace(tokens=each)) for each in (40, 132, 1000)
    )
    assert few < many == more


def test_partial_results_of_a_long_prompt_take_hundreds_of_megabytes():
    # 0.1 s of 32 layers at 989 TFLOP/s and 3.35 TB/s
    rest = LargestStep(
        keys=8192,
        tokens=8192,
        sequences=256,
        least_tokens=64,
        products=0.1 / 32 * 989e12,
        read_bytes=0.1 / 32 * 3.35e12,
        hopper=True,
    )
    short = partials_bytes((32, 8, 128), rest)
    long = partials_bytes((32, 8, 128), rest._replace(keys=1 << 20))
    assert 1e8 < short < long < 1.5e9
    # a chunk that takes about that long, 17 M pairs of 16 heads, at tp 2
    real = chunk_work((16, 4, 128), 300, 1 << 20).slots * TILE_ROWS * (128 + 1) * 4
    assert 0 < real < long

"""Work lists of paged attention: each holds every visible pair of a query and a key once."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels.paged_attention.recorded import recorded_decodes
from codegen.kernels.paged_attention.work import (
    Queries,
    WorkList,
    chunk_list,
    mixed_list,
    packed_decodes,
    saves,
)


def pairs(work: WorkList, tile_tokens: int) -> list[tuple[int, int, int]]:
    """(sequence, token, tile of keys) of all items."""
    return [
        (b, token, tile)
        for b, first, begin, end, _, _, low, high, *_ in work.items_IF.tolist()
        for token in range(max(first, begin), min(first + tile_tokens, end))
        for tile in range(low, high)
    ]


@st.composite
def chunks(draw: st.DrawFn) -> list[Queries]:
    found, begin = [], 0
    for b in range(draw(st.integers(1, 3))):
        queries = draw(st.integers(1, 90))
        causal = draw(st.booleans())
        prefix = draw(st.sampled_from([0, 1, 31, 32, 500, 2000]))
        keys = prefix + queries if causal else prefix
        found.append(
            Queries(sequence=b, begin=begin, end=begin + queries, keys=keys, causal=causal)
        )
        begin += queries
    return found


@settings(max_examples=60)
@given(
    found=chunks(),
    tile_tokens=st.sampled_from([1, 16, 32]),
    tile_keys=st.sampled_from([64, 128]),
    kv_heads=st.sampled_from([1, 8]),
    blocks=st.sampled_from([1, 16, 132]),
)
def test_chunk_lists_hold_every_visible_pair_once(found, tile_tokens, tile_keys, kv_heads, blocks):
    work = chunk_list(
        found, tile_tokens=tile_tokens, tile_keys=tile_keys, kv_heads=kv_heads, blocks=blocks
    )
    held = pairs(work, tile_tokens)
    assert len(held) == len(set(held))
    for each in found:
        for token in range(each.begin, each.end):
            seen = each.keys - (each.end - 1 - token) if each.causal else each.keys
            tiles = {tile for b, t, tile in held if (b, t) == (each.sequence, token)}
            assert set(range(-(-seen // tile_keys))) <= tiles
    check_slots(work)
    sizes = [row[7] - row[6] for row in work.items_IF.tolist()]
    alike = max(sizes) / 4  # twice the quantum of _order: the longest first, but for that
    assert all(size >= max(sizes[at:]) - alike - 1 for at, size in enumerate(sizes))
    check_masks(work, tile_tokens, tile_keys)


def check_masks(work: WorkList, tile_tokens: int, tile_keys: int) -> None:
    """Where a list says that one tile of keys is masked, no tile of queries ends in two."""
    for _, first, begin, end, shift, keys, *_ in (
        work.items_IF.tolist() if work.one_masked_tile else ()
    ):
        tokens = range(max(first, begin), min(first + tile_tokens, end))
        borders = {min(token + shift, keys - 1) // tile_keys for token in tokens}
        assert len(borders) == 1


def test_pieces_of_the_same_keys_run_side_by_side():
    """512 queries on a million keys in 256 tiles: L2 holds what few pieces at a time read."""
    found = [Queries(sequence=0, begin=0, end=512, keys=1 << 20, causal=True)]
    work = chunk_list(found, tile_tokens=16, tile_keys=128, kv_heads=8, blocks=132)
    lows = [row[6] for row in work.items_IF.tolist()]
    assert work.slots == len(lows)
    assert lows == sorted(lows)
    assert lows.count(0) == 32


@settings(max_examples=60)
@given(
    found=chunks(),
    lens=st.lists(st.sampled_from([0, 1, 127, 4096, 9000]), min_size=1, max_size=5),
    kv_heads=st.sampled_from([1, 2, 8]),
    blocks=st.sampled_from([1, 16, 132]),
    data=st.data(),
)
def test_mixed_lists_hold_every_visible_pair_once_for_every_head(
    found, lens, kv_heads, blocks, data
):
    together = data.draw(st.sampled_from([each for each in (1, 2, 8) if kv_heads % each == 0]))
    begin, batch = found[-1].end, len(found)
    decodes = [
        Queries(sequence=batch + b, begin=begin + b, end=begin + b + 1, keys=keys, causal=keys > 0)
        for b, keys in enumerate(lens)
    ]
    sizes = {"tile_tokens": 16, "tile_keys": 128, "heads_together": together, "blocks": blocks}
    sizes["decode_cost"] = data.draw(st.sampled_from([0.7, 1.0]))
    work = mixed_list(found, decodes, kv_heads=kv_heads, **sizes)
    assert work.heads_named
    check_masks(work, 16, 128)
    rows = work.items_IF.tolist()
    assert {row[9] for row in rows} == set(range(kv_heads))
    alone = [
        replace(work, items_IF=work.items_IF[work.items_IF[:, 9] == head])
        for head in range(kv_heads)
    ]
    held = [sorted(pairs(each, 16)) for each in alone]
    assert all(each == held[0] for each in held)
    assert len(set(held[0])) == len(held[0])
    for each in (*found, *decodes):
        for token in range(each.begin, each.end):
            seen = each.keys - (each.end - 1 - token) if each.causal else each.keys
            tiles = {tile for b, t, tile in held[0] if (b, t) == (each.sequence, token)}
            assert set(range(-(-seen // 128))) <= tiles
    check_slots(alone[0])


def check_slots(work: WorkList) -> None:
    """Pieces of a tile have slots in a row, named by one merge; whole tiles have none."""
    rows = [row for row in work.items_IF.tolist() if row[3] > row[2]]
    slots = sorted(row[8] for row in rows if row[8] >= 0)
    assert all((row[11] > 1) == (row[8] >= 0) for row in rows)
    assert all(row[10] <= row[8] < row[10] + row[11] for row in rows if row[8] >= 0)
    merges = [] if work.merges_MF is None else work.merges_MF.tolist()
    named = [first + at for first, count, *_ in merges if count > 1 for at in range(count)]
    assert slots == sorted(named)
    assert all(slot < work.slots for slot in slots)


@settings(max_examples=60)
@given(
    lens=st.lists(st.sampled_from([0, 1, 63, 64, 1000, 1_048_576]), min_size=1, max_size=6),
    counts=st.data(),
    blocks=st.sampled_from([1, 4, 16]),
)
def test_decode_lists_of_host_and_device_hold_the_same_work(lens, counts, blocks):
    tokens = [counts.draw(st.integers(0, 1)) for _ in lens]
    starts = [sum(tokens[:at]) for at in range(len(tokens) + 1)]
    known = [
        Queries(sequence=b, begin=starts[b], end=starts[b + 1], keys=keys, causal=True)
        for b, keys in enumerate(lens)
        if tokens[b]
    ]
    recorded = recorded_decodes(
        torch.tensor(starts), torch.tensor(lens), tile_keys=64, blocks_a_head=blocks
    )
    check_slots(recorded)
    items = [row for row in recorded.items_IF.tolist() if row[3] > row[2]]
    # rows of no sequence are written too: with the result of no keys
    assert {row[2] for row in items} == set(range(len(lens)))
    assert all(row[5] == 0 for row in items if row[2] >= starts[-1])
    ranges = sorted((row[0], row[6], row[7]) for row in items if row[7] > row[6])
    for b, keys in enumerate(lens):
        covered = [tile for at, low, high in ranges if at == b for tile in (low, high)]
        if tokens[b] and keys:
            assert covered[0] == 0
            assert covered[-1] == -(-keys // 64)
            assert covered[1:-1:2] == covered[2:-1:2]  # one begins where another ends
        else:
            assert covered == []
    if known:
        packed = packed_decodes(known, tile_keys=64, blocks_a_head=blocks)
        check_slots(packed)
        assert all(len(pair) == 2 for pair in packed.items_IF[:, 6:8].tolist())
        whole = {(row[0], row[5]) for row in packed.items_IF.tolist()}
        assert whole == {(each.sequence, each.keys) for each in known}


def test_a_mixed_step_is_one_list_only_where_chunks_compute_while_decodes_read():
    """A chunk of 32 tokens waits for memory as decodes do; few decodes beside much are no gain."""

    def step(queries: int, keys: int, batch: int, length: int) -> tuple[list[Queries], ...]:
        chunk = Queries(sequence=batch, begin=batch, end=batch + queries, keys=keys, causal=True)
        decodes = [
            Queries(sequence=b, begin=b, end=b + 1, keys=length, causal=True) for b in range(batch)
        ]
        return [chunk], decodes

    sizes = {"tile_tokens": 32, "tile_keys": 128, "kv_heads": 8, "blocks": 132, "decode_cost": 0.7}
    assert saves(*step(512, 131_072, 31, 4096), **sizes)
    assert saves(*step(128, 131_072, 64, 8192), **sizes)
    assert not saves(*step(32, 131_072, 31, 4096), **sizes)
    assert not saves(*step(2048, 1_048_576, 1, 4096), **sizes)

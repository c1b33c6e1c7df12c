"""The chunk schedule covers every prompt, and W(n) is the stage recursion over it."""

import msgspec
import pytest
from builders import chunk_rows
from hypothesis import given
from hypothesis import strategies as st
from strategies import schedules, step_times, tiny_step_time

from plans.chunks import (
    QUERY_ROWS,
    WorkTable,
    add_sharded_chunk,
    chunk_at,
    idle_queries,
    least_solo_s,
    query_tile,
    split_prompt,
)
from plans.steptime import StepLoad, StepTime

SHARDS = st.integers(16, 1500)
LENGTHS = st.integers(1, 4000)


@st.composite
def work(draw: st.DrawFn) -> tuple[tuple, StepTime, int]:
    """Rows, step times and a shard size."""
    time, shard = draw(step_times()), draw(SHARDS)
    return chunk_rows(draw(schedules()), time, shard), time, shard


def simulated_s(rows, time: StepTime, shard: int, tokens: int) -> float:
    """First token of a lone prompt, chunk by chunk: at most as many in flight as stages."""
    free, done = [0.0] * time.stages, []
    for index, (chunk, prefix) in enumerate(split_prompt(rows, tokens, shard)):
        clock = done[index - time.stages] if index >= time.stages else 0.0
        for stage in range(time.stages):
            groups = prefix // shard + 1
            pace = time.stage_s(stage, [(chunk, prefix % shard)], kvp_groups=groups)
            if (
                groups > 1
            ):  # an older group reads a whole shard instead, and sets the pace if slower
                longer = older(time, chunk, shard) - causal(time, chunk, prefix % shard)
                pace += time.stage_layers[stage] * max(longer, 0.0)
            clock = max(clock, free[stage]) + pace
            free[stage] = clock
        done.append(clock)
    return done[-1]


def causal(time: StepTime, chunk: int, prefix: int) -> float:
    """Attention of one layer of a chunk behind a prefix."""
    pairs = sum(prefix + each for each in range(1, chunk + 1))
    return max(pairs * time.pair_s, (prefix + chunk) * time.key_s)


def older(time: StepTime, chunk: int, shard: int) -> float:
    """Attention of one layer of a chunk over a whole shard."""
    return max(chunk * shard * time.pair_s, shard * time.key_s)


@given(rows=schedules(), tokens=LENGTHS, shard=SHARDS)
def test_split_covers_the_prompt_and_crosses_no_edge(rows, tokens, shard):
    table = chunk_rows(rows, tiny_step_time(), shard)
    at = 0
    for chunk, prefix in split_prompt(table, tokens, shard):
        assert prefix == at
        assert 1 <= chunk <= chunk_at(table, prefix)
        at += chunk
        assert prefix // shard == (at - 1) // shard
        for row in table:
            assert not prefix < row.until_tokens < at
    assert at == tokens


@given(rows=schedules(), prefix=st.integers(0, 5000))
def test_chunk_is_that_of_the_first_row_beyond_the_prefix_cut_at_its_end(rows, prefix):
    table = chunk_rows(rows, tiny_step_time(), 64)
    expected = next(
        (min(chunk, until - prefix) for until, chunk in rows if prefix < until), rows[-1][1]
    )
    assert chunk_at(table, prefix) == expected


@given(work=work(), tokens=LENGTHS)
def test_work_equals_a_simulation_of_the_stages(work, tokens):
    rows, time, shard = work
    # the two sum the same terms in another order: at most some 1e4 roundings of 2**-53
    expected = simulated_s(rows, time, shard, tokens)
    assert WorkTable(*work).solo_s(tokens) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@given(work=work(), lengths=st.lists(LENGTHS, min_size=2, max_size=8))
def test_work_rises_with_the_prompt_and_does_not_depend_on_what_was_asked_before(work, lengths):
    table = WorkTable(*work)
    asked = {tokens: table.solo_s(tokens) for tokens in lengths}
    ordered = [asked[tokens] for tokens in sorted(asked)]
    assert ordered == sorted(ordered)
    assert [WorkTable(*work).solo_s(tokens) for tokens in sorted(asked)] == ordered
    assert table.solo_s(0) == 0.0


@given(work=work(), tokens=LENGTHS, data=st.data())
def test_remaining_work_falls_from_all_to_nothing(work, tokens, data):
    table = WorkTable(*work)
    done = data.draw(st.integers(0, tokens))
    assert table.remaining_s(tokens, 0) == table.solo_s(tokens)
    assert 0.0 <= table.remaining_s(tokens, done) <= table.solo_s(tokens)
    assert table.remaining_s(tokens, tokens) == 0.0


@given(time=step_times(), shard=SHARDS, data=st.data())
def test_newest_group_is_causal_behind_its_own_part_and_no_slower_than_older_ones(
    time, shard, data
):
    prefix = data.draw(st.integers(0, 4 * shard))
    chunk = data.draw(st.integers(1, shard - prefix % shard))
    newest, older_one = StepLoad(time), StepLoad(time)
    add_sharded_chunk(newest, chunk, prefix, shard)
    add_sharded_chunk(older_one, chunk, prefix, shard, behind=1)
    groups = prefix // shard + 1
    alone = time.step_s([(chunk, prefix % shard)], kvp_groups=groups)
    assert newest.seconds() == pytest.approx(alone, rel=1e-12)
    assert newest.seconds() <= older_one.seconds()


def test_two_equal_stages_overlap_the_chunks_of_one_prompt():
    # no attention and a flat table: each of m chunks takes 1 s on each of 2 stages, m + 1 s in all
    time = msgspec.structs.replace(
        tiny_step_time(), stage_layers=(1, 1), overhead_s=1.0, matmul=(), head=()
    )
    time = msgspec.structs.replace(time, pair_s=0.0, key_s=0.0)
    rows = chunk_rows(((1000, 10),), time, 1000)
    assert WorkTable(rows, time, 1000).solo_s(50) == 6.0


@given(
    time=step_times(),
    cuts=st.lists(st.integers(1, 700), min_size=1, max_size=8),
    company=st.lists(st.integers(0, 900), min_size=8, max_size=8),
    shard=SHARDS,
)
def test_no_cut_of_a_prompt_and_no_company_beats_its_least_time(time, cuts, company, shard):
    """Chunks of any sizes, each in a step with so many tokens of others, through the stages."""
    free, prefix = [0.0] * time.stages, 0
    for chunk, others in zip(cuts, company, strict=False):
        rest = chunk
        while rest:  # a chunk ends where a shard does
            tokens = min(rest, shard - prefix % shard)
            load = StepLoad(time)
            add_sharded_chunk(load, tokens, prefix, shard, behind=int(prefix >= shard))
            if others:
                load.add_chunk(others, 0)
            clock = 0.0
            for stage, seconds in enumerate(load.stages_s()):
                clock = max(clock, free[stage]) + seconds
                free[stage] = clock
            prefix += tokens
            rest -= tokens
    assert free[-1] >= least_solo_s(time, prefix, shard) * (1 - 1e-9)


@given(st.integers(1, 200))
def test_a_tile_of_queries_is_the_largest_power_of_two_that_fits(group):
    tile = query_tile(group)
    fitting = [1 << bits for bits in range(8) if group << bits <= QUERY_ROWS]
    assert tile == max(fitting, default=1)


@given(st.sampled_from([1, 8, 32, 128]), st.integers(0, 5000), st.integers(1, 600))
def test_idle_queries_are_those_of_the_tiles_that_a_chunk_touches(tile, prefix, tokens):
    touched = {at // tile for at in range(prefix, prefix + tokens)} if tokens > tile else {0}
    assert idle_queries(tile, prefix, tokens) == len(touched) * tile - tokens

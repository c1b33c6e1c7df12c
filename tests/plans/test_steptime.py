"""The step-time formula: additive over stages, monotone, and inverted exactly by largest_chunk."""

import dataclasses
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import step_times, tables, tiny_step_time

from plans.steptime import Knot, StepLoad, StepTime, Table, table_s

TOKENS = st.integers(1, 3000)
PREFIXES = st.integers(0, 100_000)
GROUPS = st.integers(1, 4)
DECODES = st.lists(st.integers(1, 100_000), max_size=5)
CHUNKS = st.lists(st.tuples(TOKENS, PREFIXES), max_size=3)


@dataclasses.dataclass(frozen=True)
class Held:
    """Work that a step holds already: what to call on a StepLoad."""

    chunks: list[tuple[int, int]]
    decodes: list[int]
    groups: int

    def load(self, time: StepTime, stage: int | None = None) -> StepLoad:
        load = StepLoad(time, stage=stage)
        for tokens, prefix in self.chunks:
            load.add_chunk(tokens, prefix, kvp_groups=self.groups)
        for kv_tokens in self.decodes:
            load.add_decode(kv_tokens, kvp_groups=self.groups)
        return load


HELD = st.builds(Held, CHUNKS, DECODES, GROUPS)


def formula_s(time: StepTime, stage: int, held: Held) -> float:
    """The formula of the module docstring, term by term, independent of StepLoad."""
    tokens = sum(each for each, _ in held.chunks) + len(held.decodes)
    samples = len(held.chunks) + len(held.decodes)
    attention = [
        max((t * p + t * (t + 1) / 2) * time.pair_s, (p + t) * time.key_s) for t, p in held.chunks
    ]
    attention += [kv * time.decode_key_s + time.decode_sequence_s for kv in held.decodes]
    terms = [interpolated(time.matmul, tokens), *attention]
    if tokens:
        terms += [time.comm_latency_s, tokens * time.comm_token_s]
    if tokens and held.groups > 1:
        terms += [time.merge_latency_s, tokens * (held.groups - 1) * time.merge_token_s]
    seconds = time.overhead_s + time.stage_layers[stage] * math.fsum(terms)
    if stage < time.stages - 1:
        return seconds + time.hop_latency_s + tokens * time.hop_token_s
    return seconds + interpolated(time.head, samples)


def interpolated(table: tuple[Knot, ...], at: int) -> float:
    """Table by a linear scan over its pieces."""
    if not table or at == 0:
        return 0.0
    if at <= table[0].at or len(table) == 1:
        return table[0].seconds
    pieces = list(pairwise(table))
    left, right = next((each for each in pieces if at <= each[1].at), pieces[-1])
    return left.seconds + (at - left.at) * (right.seconds - left.seconds) / (right.at - left.at)


@given(time=step_times(), held=HELD, data=st.data())
def test_stage_time_is_the_documented_formula(time, held, data):
    stage = data.draw(st.integers(0, time.stages - 1))
    expected = pytest.approx(formula_s(time, stage, held), rel=1e-9, abs=1e-18)
    assert held.load(time, stage).seconds() == expected
    assert time.stage_s(stage, held.chunks, held.decodes, held.groups) == expected


@given(time=step_times(), held=HELD)
def test_step_is_the_sum_of_its_stages(time, held):
    stages = [held.load(time, stage).seconds() for stage in range(time.stages)]
    whole = held.load(time)
    # sums of up to 4 stages in another order: a few roundings of 2**-53 each
    assert whole.stages_s() == pytest.approx(tuple(stages), rel=1e-12)
    assert whole.seconds() == pytest.approx(math.fsum(stages), rel=1e-12)
    step_s = time.step_s(held.chunks, held.decodes, held.groups)
    assert step_s == pytest.approx(math.fsum(stages), rel=1e-12)


@given(time=step_times(), held=HELD, more=st.integers(0, 500), data=st.data())
def test_time_rises_with_every_argument(time, held, more, data):
    now = held.load(time).seconds()
    grown = [
        dataclasses.replace(held, chunks=[*held.chunks, (data.draw(TOKENS), 0)]),
        dataclasses.replace(held, decodes=[*held.decodes, 1]),
        dataclasses.replace(held, groups=held.groups + 1),
        dataclasses.replace(held, decodes=[each + more for each in held.decodes]),
        dataclasses.replace(held, chunks=[(t, p + more) for t, p in held.chunks]),
        dataclasses.replace(held, chunks=[(t + more, p) for t, p in held.chunks]),
    ]
    for each in grown:
        assert each.load(time).seconds() >= now


@given(table=tables(min_size=1), ats=st.lists(st.integers(0, 10_000), min_size=2, max_size=6))
def test_table_rises_goes_through_its_rows_and_is_0_at_0(table, ats):
    seconds = [table_s(table, at) for at in sorted(ats)]
    assert seconds == sorted(seconds)
    assert [table_s(table, knot.at) for knot in table] == [knot.seconds for knot in table]
    assert table_s(table, 0) == table_s((), 5) == 0.0
    ready = Table(table)
    for at in (*ats, *(at + 0.5 for at in ats)):
        assert ready[at] == ready.read(at) == table_s(table, at)  # to the last bit


def test_table_keeps_its_last_slope_beyond_its_end_and_is_flat_before_its_start():
    table = (Knot(at=10, seconds=1.0), Knot(at=20, seconds=2.0), Knot(at=30, seconds=4.0))
    assert table_s(table, 40) == 6.0
    assert table_s(table, 3) == 1.0
    assert table_s(table[:1], 1000) == 1.0


@given(
    time=step_times(),
    held=HELD,
    prefix=PREFIXES,
    most=st.integers(-1, 400),
    groups=GROUPS,
    keys_only=st.booleans(),
    stage=st.sampled_from([None, 0]),
    data=st.data(),
)
def test_largest_chunk_equals_a_scan(*, time, held, prefix, most, groups, keys_only, stage, data):
    def with_chunk(tokens: int) -> float:
        load = held.load(time, stage)
        load.add_chunk(tokens, prefix, kvp_groups=groups, keys_only=keys_only)
        return load.seconds()

    # budgets around the times that matter, met exactly and missed by little
    chosen = with_chunk(data.draw(st.integers(1, 400)))
    budget_s = chosen * data.draw(st.sampled_from([1.0, 0.999, 1.001, 0.0, 0.5, 2.0]))
    by_scan = max(
        (tokens for tokens in range(1, most + 1) if with_chunk(tokens) <= budget_s), default=0
    )
    load = held.load(time, stage)
    before = load.seconds()
    got = load.largest_chunk(prefix, budget_s, most, kvp_groups=groups, keys_only=keys_only)
    assert got == by_scan
    assert load.seconds() == before  # asking adds nothing


def test_older_shard_has_no_causal_half():
    time = tiny_step_time(key_s=0.0)
    own, older = StepLoad(time), StepLoad(time)
    own.add_chunk(10, 100)
    older.add_chunk(10, 100, keys_only=True)
    # 10 x 100 pairs in both, 10 x 11 / 2 = 55 more among the chunk's own; 4 layers of 1 ns a pair
    assert own.seconds() - older.seconds() == pytest.approx(4 * 55e-9)


def test_stage_none_is_not_stage_0():
    time = tiny_step_time(stage_layers=(1, 3))
    assert StepLoad(time, stage=0).seconds() == 0.001
    assert StepLoad(time).seconds() == 0.002

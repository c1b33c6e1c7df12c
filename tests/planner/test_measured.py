"""Step times from a profile: right on a device of known laws, rising, marked, never beyond it."""

import dataclasses
import functools
import statistics
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import tiny_model
from strategies_planner import tiny_device, tiny_topology, tiny_workload

from planner import cost, measured, profiles
from planner.assemble import to_plan
from planner.error_band import weighted
from planner.estimates import MEASURED
from planner.fits import ring_share
from planner.placement import place, slowest_link
from planner.price import price
from planner.profile import HOST, Point, link_points, points
from planner.profiles import About, Profile, Row
from planner.residuals import LEAST_ERROR, LONGEST, SHORT_US, Residual, table_residuals
from planner.space import Candidate, cut_layers
from planner.world import make_world
from plans.check import check_plan
from plans.mesh import Parallelism
from plans.plan import MadeBy
from plans.steptime import table_s

MODEL = tiny_model(
    layers=4,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    ffn=14336,
    vocab=128256,
    weight_dtype="bf16",
    context_limit=131072,
)
ABOUT = About(device="x", driver="x", torch="x", triton="x", made="x", command="x")
LAUNCH_US = 2.0


@dataclasses.dataclass(frozen=True)
class Law:
    """A device whose ops take what a simple law says, in microseconds."""

    flops_us: float = 7e8
    bytes_us: float = 4e6
    link_us: float = 3e5

    def us(self, point: Point) -> float:
        if point.table == "step":
            return {"decode_list": 20.0}.get(str(point.key[0]), 2.0)
        if point.table == "links":
            op, devices, size = point.key
            return 10 * LAUNCH_US + ring_share(op, devices) * size / self.link_us
        return LAUNCH_US + self.work_us(point)

    def work_us(self, point: Point) -> float:
        part = {name: each for name, each in point.named().items() if name != "op"}
        numbers = [int(each) for each in part.values()]
        flops, moved = 0.0, 0.0
        match point.table:
            case "gemm":
                n, k, tokens = numbers
                flops, moved = 2 * n * k * tokens, 2 * n * k
            case "rows":
                moved = 8 * numbers[0] * numbers[1]
            case "sampling":
                moved = 4 * numbers[0] * numbers[1]
            case "copy":
                moved = 2 * numbers[0]
            case "attention_chunk":
                heads, kv_heads, head_dim, tokens, prefix = numbers
                flops = 4 * heads * head_dim * (tokens * prefix + tokens * (tokens + 1) / 2)
                moved = 4 * kv_heads * head_dim * (tokens + prefix)
            case "attention_decode":
                _, kv_heads, head_dim, batch, keys = numbers
                moved = 4 * kv_heads * head_dim * batch * keys
        return max(flops / self.flops_us, moved / self.bytes_us)


def profile_of(us, *, links=True, drop=()) -> Profile:
    tables: dict[str, list[Row]] = {}
    for point in [*points(), *(link_points(2) if links else [])]:
        row = Row(key=point.key, role=point.role, us=us(point), spread_us=1.0)
        tables.setdefault(point.table, []).append(row)
    kept = {name: tuple(rows) for name, rows in tables.items() if name not in drop}
    return Profile(folder=Path(), about=ABOUT, tables=kept)


LAW = Law()
PROFILE = profile_of(LAW.us)


def world_of(*, gpus=1, model=MODEL, **changes):
    device = tiny_device(
        memory_bytes=1 << 38,
        memory_bandwidth_bytes_per_s=5e12,
        peak_flops_per_s={"bf16": 1e15, "fp32": 1e14},
        **changes,
    )
    return make_world(
        model=model,
        device=device,
        topology=tiny_topology(device, per_node=gpus),
        workload=tiny_workload(),
        context_tokens=65536,
    )


def measure(profile, world, *, tp=1, spp=1, kvp=1):
    p = Parallelism(tp=tp, spp=spp, kvp=kvp)
    candidate = Candidate(parallelism=p, stages=cut_layers(world.model.layers, spp))
    where = place(world.topology, p)
    base = cost.roofline(world, candidate, where)
    links = measured.Links(
        **{axis: slowest_link(world.topology, p, where, axis) for axis in ("tp", "kvp", "spp")}
    )
    return measured.measured(measured.prepare(profile), world, p, base, links)


def expected_us(tokens, *, tp=1):
    """A layer by the law without attention, products and row-wise ops at the model's shapes."""
    heads, kv_heads, ffn = 32 // tp, 8 // tp, 14336 // tp
    shapes = [
        ((heads + 2 * kv_heads) * 128, 4096),
        (4096, heads * 128),
        (2 * ffn, 4096),
        (4096, ffn),
    ]
    total = sum(LAW.us(Point(table="gemm", key=("linear", *each, tokens))) for each in shapes)
    rows = [4096, 4096, heads * 128, kv_heads * 128, kv_heads * 128, ffn]
    return total + sum(LAW.us(Point(table="rows", key=("op", each, tokens))) for each in rows)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 64, 256, 2048, 8192])
def test_a_layer_is_the_sum_of_its_ops_at_this_ranks_shapes(tokens, tp):
    found = measure(PROFILE, world_of(gpus=tp), tp=tp).time
    table = {knot.at: knot.seconds * 1e6 for knot in found.matmul}
    expected, seen = expected_us(tokens, tp=tp) + LAUNCH_US, table[tokens]
    # the launch of attention is part of the table, and what its tiles take longer than its pairs;
    # of steps with chunks also the host's 4 us over the layers of the stage
    if tokens > measured.GRAPH_TOKENS:
        key = (32 // tp, 8 // tp, 128, tokens, 0)
        expected += LAW.work_us(Point(table="attention_chunk", key=key)) + 4.0 / MODEL.layers
        pairs = tokens * (tokens + 1) / 2
        seen += 1e6 * max(pairs * found.pair_s, tokens * found.key_s)
    assert seen == pytest.approx(expected, rel=0.02)


def test_attention_head_and_host_follow_the_laws_of_the_device():
    found = measure(PROFILE, world_of()).time
    assert found.source == "profile"
    # chunks of no particular size end in a tile of 32 tokens that is half empty: 3 % of the middle
    # one of 32 to 8192 tokens, half as much again where the law is fitted to filled tiles alone
    assert found.pair_s == pytest.approx(4 * 32 * 128 / LAW.flops_us * 1e-6, rel=0.05)
    assert found.key_s == pytest.approx(4 * 8 * 128 / LAW.bytes_us * 1e-6, rel=0.02)
    assert found.decode_key_s == pytest.approx(4 * 8 * 128 / LAW.bytes_us * 1e-6, rel=0.02)
    assert found.overhead_s == pytest.approx(20e-6)
    product = LAW.us(Point(table="gemm", key=("linear", 128256, 4096, 1)))
    assert found.head[0].seconds * 1e6 == pytest.approx(product + 2 * LAUNCH_US, rel=0.02)


def test_collectives_are_scaled_to_the_ranks_and_say_how_far():
    two, eight = (measure(PROFILE, world_of(gpus=tp), tp=tp) for tp in (2, 8))
    byte_s = 1e-6 / LAW.link_us
    assert two.time.comm_token_s == pytest.approx(2 * 4096 * 2 * byte_s, rel=1e-3)
    assert eight.time.comm_token_s == pytest.approx(2 * 4096 * 2 * byte_s * 7 / 4, rel=1e-3)
    assert two.time.comm_latency_s == pytest.approx(2 * 10 * LAUNCH_US * 1e-6, rel=1e-3)
    assert two.provenance["collectives"] == "interpolated"
    assert eight.provenance["collectives"] == "extrapolated by 4"


def test_hand_over_and_merge_follow_the_link():
    found = measure(PROFILE, world_of(gpus=4), spp=2, kvp=2).time
    byte_s = 1e-6 / LAW.link_us
    assert found.hop_token_s == pytest.approx(4096 * 2 * byte_s, rel=1e-3)
    assert found.merge_token_s == pytest.approx(32 * (128 * 2 + 4) * byte_s, rel=1e-3)


def test_what_was_not_measured_is_called_formula_and_noted():
    without = measure(profile_of(LAW.us, links=False), world_of(gpus=2), tp=2)
    assert without.provenance["collectives"] == "formula"
    assert any("collectives by formula: all_reduce" in note for note in without.notes)
    base = measure(PROFILE, world_of(gpus=2), tp=2)
    assert without.error_band > base.error_band
    alone = measure(profile_of(LAW.us, drop=("attention_decode",)), world_of())
    assert alone.provenance["attention"] == "formula"
    assert alone.provenance["matmul"] == "interpolated"


def test_held_out_rows_set_the_error_band():
    exact = measure(PROFILE, world_of())

    def off(point):
        return LAW.us(point) * (1.2 if point.role == "check" else 1.0)

    worse = measure(profile_of(off), world_of())
    # rows 20 % slower than the fit says are predicted 1 / 6 too short
    assert exact.error_band < 0.1 < worse.error_band < 0.2
    assert worse.time.margin == pytest.approx(worse.error_band, rel=0.1)  # all took longer

    def slow(point):
        return LAW.us(point) * (0.8 if point.role == "check" else 1.0)

    better = measure(profile_of(slow), world_of())
    assert better.time.margin == pytest.approx(LEAST_ERROR, rel=0.5)
    assert better.error_band > 0.1  # off as well, but no step takes longer than it says
    assert worse.time.matmul == exact.time.matmul  # they are never fitted


def test_a_step_is_never_shorter_than_the_host_needs():
    def slow_host(point):
        return 900.0 if point.table == "step" else LAW.us(point)

    found = measure(profile_of(slow_host), world_of()).time
    table = {knot.at: knot.seconds for knot in found.matmul}
    # a decode's successor is prepared while it runs
    assert table[1] * MODEL.layers == pytest.approx(900e-6)
    # a chunk's attention and the pieces beside it are launched in each layer, and its list is made
    # while the device waits
    first = table[measured.GRAPH_TOKENS + 1]
    assert first == pytest.approx(2 * 900e-6 + 2 * 900e-6 / MODEL.layers)
    assert set(HOST) >= {"chunk_list", "decode_list", "graph_launch", "host_step"}


@given(
    seed=st.integers(0, 3),
    chunk=st.tuples(st.integers(1, 8000), st.integers(0, 60000)),
    more=st.integers(0, 5000),
    batch=st.integers(1, 300),
    tp=st.sampled_from([1, 4]),
)
def test_time_never_falls_whatever_was_measured(seed, chunk, more, batch, tp):
    tokens, prefix = chunk
    time = noisy_time(seed, tp)
    assert time.step_s([(tokens, prefix)]) <= time.step_s([(tokens + more, prefix)])
    assert time.step_s([(tokens, prefix)]) <= time.step_s([(tokens, prefix + more)])
    assert time.step_s((), [prefix + 1] * batch) <= time.step_s((), [prefix + 1 + more] * batch)
    assert time.step_s((), [prefix + 1] * batch) <= time.step_s((), [prefix + 1] * (batch + 1))


@functools.cache
def noisy_time(seed, tp):
    """From rows that are up to three times too long, each for itself."""

    def noisy(point):
        chance = zlib.crc32(repr((seed, point.table, point.key)).encode()) / 2**32
        return LAW.us(point) * (1 + 2 * chance)

    return measure(profile_of(noisy), world_of(gpus=tp), tp=tp).time


@pytest.mark.parametrize("changes", [{"weight_dtype": "fp32"}, {"weight_dtype": "fp8"}], ids=str)
def test_other_dtypes_are_priced_by_the_data_sheet(changes):
    assert measured.usable(world_of())
    other = world_of(model=tiny_model(**changes))
    assert measured.usable(other) is False


def test_a_plan_carries_source_provenance_band_and_notes(monkeypatch):
    ready = measured.prepare(profile_of(LAW.us, links=False))
    monkeypatch.setattr(cost, "prepared", lambda device: ready)
    world = world_of(gpus=2)
    candidate = Candidate(parallelism=Parallelism(tp=2), stages=cut_layers(4, 1))
    made_by = MadeBy(medha="test", effort="quick", seed=0, command="test")
    plan = to_plan(world, price(world, candidate), name="test", made_by=made_by)
    check_plan(plan, where="test")
    assert plan.step_time.source == "profile"
    assert plan.predicted.provenance["matmul"] == "interpolated"
    assert plan.predicted.provenance["collectives"] == "formula"
    assert plan.step_time.margin < plan.predicted.error_band < 0.3
    assert any("by formula" in note for note in plan.predicted.notes)


def shipped():
    return sorted(path.name for path in profiles.PROFILES.glob("*")) or [None]


@pytest.mark.parametrize("device", shipped())
def test_shipped_profiles_predict_what_they_held_out(device):
    """The goals of the project: held-out points within 5 % at the median, 15 % at P90."""
    if device is None:
        pytest.skip("no profile is shipped")
    profile = profiles.load_profile(device)
    ready = measured.prepare(profile)
    found = {"all": [], "attention_chunk": [], "attention_decode": []}
    for each in table_residuals(profile, ready.fits):
        found["all"].append(abs(each.error))
        if each.table in found:
            found[each.table].append(abs(each.error))
    for off in filter(None, found.values()):
        assert sorted(off)[len(off) // 2] < 0.05
        assert sorted(off)[int(0.9 * len(off))] < 0.15


def test_the_formula_of_a_plan_is_off_by_more_than_the_law_of_a_call():
    """What a plan carries has no term for tiles; the band is that of the plan."""
    profile = profiles.load_profile("h100-sxm-80gb")
    ready = measured.prepare(profile)
    law, formula = (
        [each for each in table_residuals(profile, ready.fits, context=by) if "att" in each.table]
        for by in (None, LONGEST)
    )
    assert len(law) == len(formula) > 100
    off, more = (statistics.median(abs(each.error) for each in found) for found in (law, formula))
    assert off < more
    weighed = [abs(each.weighed) for each in formula]
    assert ready.errors["attention"] == pytest.approx(float(np.quantile(weighed, 0.9)))


def test_a_short_call_of_attention_counts_as_a_longer_one_in_the_band():
    """12 us predicted for 10 is 20 % of the call and 4 % of what a step has beside it at least."""
    short = Residual(table="attention_decode", key=(1,), measured_us=10.0, predicted_us=12.0)
    assert short.error == pytest.approx(0.2)
    assert short.weighed == pytest.approx(2.0 / SHORT_US)
    long = Residual(table="attention_decode", key=(1,), measured_us=100.0, predicted_us=120.0)
    other = Residual(table="gemm", key=(1,), measured_us=10.0, predicted_us=12.0)
    assert long.weighed == other.weighed == pytest.approx(0.2)


def test_attention_over_keys_in_fp8_is_that_in_bf16_at_the_measured_rates():
    plain, world = measure(PROFILE, world_of()), world_of()
    fp8 = measure(PROFILE, dataclasses.replace(world, kv_dtype="fp8"))
    assert measured.usable(dataclasses.replace(world, kv_dtype="fp8"))
    assert fp8.time.pair_s == pytest.approx(2.3 * plain.time.pair_s)  # 0.44 of the rate
    assert fp8.time.decode_key_s == pytest.approx(0.59 * plain.time.decode_key_s)
    assert fp8.time.matmul == plain.time.matmul
    assert fp8.provenance["attention"] == "extrapolated by 2.3"
    assert any("fp8" in note and "2.3" in note for note in fp8.notes)
    assert fp8.error_band > plain.error_band  # as of a formula: few of its points were measured


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"spp": 2}, {"kvp": 2}, {}])
def test_several_ranks_add_their_round_trip_and_merge_where_they_were_measured(degrees):
    extra = tuple(
        Row(key=(what, 2), role="fit", us=us, spread_us=100.0)
        for what, us in (("round_trip", 1000.0), ("merge", 30.0))
    )
    told = dataclasses.replace(PROFILE, tables=PROFILE.tables | {"ranks": extra})
    world = world_of(gpus=2)
    before, after = (measure(each, world, **degrees).time for each in (PROFILE, told))
    trip_s = 1e-3 / degrees.get("spp", 1) if degrees else 0.0
    assert after.overhead_s - before.overhead_s == pytest.approx(trip_s)
    around_s = 30e-6 if "kvp" in degrees else 0.0
    assert after.merge_latency_s - before.merge_latency_s == pytest.approx(around_s)
    assert (after.matmul, after.hop_latency_s) == (before.matmul, before.hop_latency_s)


def test_travel_between_ranks_is_no_doubt_of_a_lone_one():
    """A profile of several ranks says nothing about a plan with one, and half of theirs is doubt:
    the round trip's spread of 0.5 holds for the overhead alone, 0.02 for what a lone rank has."""
    trip = (Row(key=("round_trip", 2), role="fit", us=1000.0, spread_us=500.0),)
    told = dataclasses.replace(PROFILE, tables=PROFILE.tables | {"ranks": trip})
    world = world_of(gpus=2)
    assert measure(told, world) == measure(PROFILE, world)
    one, two = measure(PROFILE, world, tp=2), measure(told, world, tp=2)
    assert two.error_band > one.error_band
    assert two.time.margin > one.time.margin


def with_launches() -> Profile:
    """Sums over two ranks of up to 256 tokens in one launch of 5 us beyond the norm."""

    def launch_us(tokens):
        return LAUNCH_US + 8 * 4096 * tokens / LAW.bytes_us + 5.0

    extra = tuple(
        Row(key=("all_reduce_add_rms_norm", 2, 4096, n), role="fit", us=launch_us(n), spread_us=0.0)
        for n in (1, 64, 256)
    )
    return dataclasses.replace(PROFILE, tables=PROFILE.tables | {"fused": extra})


@pytest.mark.parametrize("tp", [2, 8])
def test_what_a_layer_holds_of_its_sums_is_doubted_as_collectives_are(tp, monkeypatch):
    """The band's share of collectives is all that two sums take, with what the table has of it."""
    told, world = with_launches(), world_of(gpus=tp)
    parts = []

    def noted(time, origins, errors, formula, **also):
        doubtful = dict.fromkeys((*errors, *origins), 0.0) | {"collectives": 1.0}
        # nothing but collectives is in doubt, whole, so the answer is their largest share
        near = dict.fromkeys(origins, MEASURED)
        parts.append(weighted(time, near, doubtful, 1.0, **also))
        return weighted(time, origins, errors, formula, **also)

    monkeypatch.setattr(measured, "weighted", noted)
    found = measure(told, world, tp=tp)
    byte_s = 1e-6 / LAW.link_us * ring_share("all_reduce", tp)
    sums_s = MODEL.layers * 2 * (10 * LAUNCH_US * 1e-6 + 2048 * 4096 * 2 * byte_s)
    step_s = found.time.step_s([(2048, 8192)])
    # 2,048 tokens take the link, whose line is fitted exactly; a decode of 16 takes less
    assert parts[0] == pytest.approx(sums_s / step_s, rel=1e-3)


def test_a_merge_between_groups_has_its_share_of_the_band(monkeypatch):
    assert measure(PROFILE, world_of(gpus=2), kvp=2).provenance["merge"] == "interpolated"
    sure = measured.prepare(PROFILE)
    bands = []
    for error in (0.0, 1.0):
        ready = dataclasses.replace(sure, errors=sure.errors | {"merge": error})
        monkeypatch.setattr(measured, "prepare", lambda _, ready=ready: ready)
        found = measure(PROFILE, world_of(gpus=2), kvp=2)
        bands.append(found.error_band)
    tokens, time = 2048, found.time
    merge_s = MODEL.layers * (time.merge_latency_s + tokens * time.merge_token_s)
    chunk = merge_s / time.step_s([(tokens, 8192)], (), 2)
    decode = MODEL.layers * (time.merge_latency_s + 16 * time.merge_token_s)
    decode /= time.step_s((), [8192] * 16, 2)
    # the band is the larger mean of two steps, so it grows by a share between theirs; rounded
    # to four places, as both are
    low, high = sorted((chunk, decode))
    assert low - 1e-4 <= bands[1] - bands[0] <= high + 1e-4
    assert low > 1e-3


def test_sums_of_few_tokens_are_one_launch_where_that_was_measured():
    told, world = with_launches(), world_of(gpus=2)
    before, after = (measure(each, world, tp=2) for each in (PROFILE, told))
    assert after.provenance["collectives"] == "interpolated"
    layer_s = {
        tokens: [
            table_s(each.time.matmul, tokens)
            + each.time.comm_latency_s
            + tokens * each.time.comm_token_s
            for each in (before, after)
        ]
        for tokens in (1, 64, 2048)
    }
    for tokens in (1, 64):
        nccl_us = 10 * LAUNCH_US + tokens * 4096 * 2 / LAW.link_us
        without, fused = layer_s[tokens]
        assert fused == pytest.approx(without - 2e-6 * (nccl_us - 5.0), rel=1e-3)
    assert layer_s[2048][1] == pytest.approx(layer_s[2048][0], rel=1e-3)

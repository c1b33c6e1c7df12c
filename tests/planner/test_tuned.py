"""Tuned records: the nearest bucket, and every mismatch said aloud."""

import itertools

import pytest
from builders import make_plan, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from strategies_codegen import loaded

from codegen.emit import emit_program
from codegen.kernels import load_spec
from planner import bundle, tuned
from planner.tuned import choose, chosen, load_records, products_of, records_for, sizes_of
from plans.codec import dump_file
from plans.errors import InvalidFile
from plans.mesh import Parallelism
from plans.tuned import Bucket, Tuned, most_tokens, nearest

SIZES = st.fixed_dictionaries({"tokens": st.integers(1, 9000), "width": st.sampled_from([64, 128])})


def bucket(regime="rows", params=None, **when):
    return Bucket(
        regime=regime,
        when=when,
        params=params or {"BLOCK": 512},
        us=2.0,
        spread_us=0.1,
        default_us=3.0,
        floor_us=1.0,
        error=0.5,
    )


def record(op="silu_mul", **changes):
    values = {
        "op": op,
        "device": "NVIDIA H200",
        "compute_capability": "9.0",
        "driver": "1",
        "torch": "2",
        "triton": "3.6.0",
        "source_sha256": f"sha of {op}",
        "effort": "quick",
        "made": "2026-11-27",
        "command": "medha-tune --kernels",
        "buckets": (bucket(tokens=64, width=128),),
    }
    return Tuned(**(values | changes))


def install(folder, device, *records):
    for each in records:
        path = folder / device / f"{each.op}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        dump_file(path, each)


def plan_on(device):
    plan = make_plan(model=tiny_model(weight_dtype="bf16"), kv_dtype="bf16")
    # what attention's lists and partial results take on a chip of 132 processors
    memory = structs.replace(plan.memory, activations_bytes=64 << 20)
    topology = structs.replace(plan.topology, device=device)
    return structs.replace(plan, topology=topology, memory=memory)


def sha(op):
    return f"sha of {op}"


@given(sizes=SIZES, others=st.lists(SIZES, min_size=1, max_size=5))
def test_the_nearest_bucket_is_one_of_equal_width_where_there_is_one(sizes, others):
    found = nearest([bucket(**each) for each in others], "rows", sizes)
    if any(each["width"] == sizes["width"] for each in others):
        assert found.when["width"] == sizes["width"]
    assert nearest([bucket(**each) for each in others], "decode", sizes) is None


def test_nearness_is_counted_in_powers():
    rivals = [bucket(tokens=16, width=64), bucket(tokens=1024, width=64)]
    assert nearest(rivals, "rows", {"tokens": 120, "width": 64}).when["tokens"] == 16
    assert nearest(rivals, "rows", {"tokens": 140, "width": 64}).when["tokens"] == 1024


def test_a_record_of_the_device_itself_gives_parameters_without_a_word(tmp_path):
    install(tmp_path, "h200-sxm-141gb", record())
    found = choose(plan_on("h200-sxm-141gb"), sha, "3.6.0", tmp_path)
    assert found.params == {"silu_mul": {"BLOCK": 512}}
    assert found.notes == ()


def test_a_record_of_a_sibling_is_used_and_named(tmp_path):
    install(tmp_path, "h200-sxm-141gb", record())
    found = choose(plan_on("h100-sxm-80gb"), sha, "3.6.0", tmp_path)
    assert found.params == {"silu_mul": {"BLOCK": 512}}
    (note,) = found.notes
    for part in ("h100-sxm-80gb", "NVIDIA H200", "medha-tune --kernels --install"):
        assert part in note


def test_a_device_of_another_generation_takes_nothing(tmp_path):
    install(tmp_path, "h200-sxm-141gb", record())
    assert choose(plan_on("a100-sxm-80gb"), sha, "3.6.0", tmp_path).params == {}
    assert records_for("a100-sxm-80gb", tmp_path) == ({}, "a100-sxm-80gb")


def test_a_kernel_that_changed_since_keeps_its_defaults_and_is_named(tmp_path):
    install(tmp_path, "h200-sxm-141gb", record(), record("rope", source_sha256="older"))
    found = choose(plan_on("h200-sxm-141gb"), sha, "3.6.0", tmp_path)
    assert set(found.params) == {"silu_mul"}
    (note,) = found.notes
    assert "rope changed since" in note


def test_another_triton_is_said(tmp_path):
    install(tmp_path, "h200-sxm-141gb", record())
    (note,) = choose(plan_on("h200-sxm-141gb"), sha, "3.7.1", tmp_path).notes
    assert "Triton 3.6.0, here is 3.7.1" in note


def test_each_regime_gives_its_own_parameters():
    joined = record(
        buckets=(
            bucket("decode", {"DECODE_KEYS": 64}, batch=1, keys=4096),
            bucket("decode", {"DECODE_KEYS": 128}, batch=32, keys=4096),
            bucket("short", {"CHUNK_KEYS": 64}, tokens=16, keys=4096),
        )
    )
    sizes = sizes_of(plan_on("h200-sxm-141gb"))
    assert chosen(joined, sizes) == {"DECODE_KEYS": 128, "CHUNK_KEYS": 64}


PRODUCTS = st.lists(
    st.fixed_dictionaries(
        {
            "n": st.sampled_from([512, 1024]),
            "k": st.sampled_from([256, 512]),
            "count": st.integers(1, 3),
        }
    ),
    min_size=1,
    max_size=3,
)


def timed(tokens, n, k, us, library_us):
    regime = "few" if tokens <= 32 else "some"
    return structs.replace(
        bucket(regime, {"SHORT_K": 256}, tokens=tokens, n=n, k=k), us=us, library_us=library_us
    )


@given(products=PRODUCTS, data=st.data())
def test_our_products_run_up_to_the_last_tokens_for_which_all_together_are_faster(products, data):
    time = st.integers(1, 5).map(float)
    grid = {
        (tokens, n, k): (data.draw(time), data.draw(time))
        for tokens in (1, 16, 64)
        for n in (512, 1024)
        for k in (256, 512)
    }
    buckets = [timed(*key, *times) for key, times in grid.items()]
    slower = [
        tokens
        for tokens in (1, 16, 64)
        if sum(p["count"] * grid[tokens, p["n"], p["k"]][0] for p in products)
        > sum(p["count"] * grid[tokens, p["n"], p["k"]][1] for p in products)
    ]
    expected = {(): 64, 1: 0, 16: 1, 64: 16}[min(slower) if slower else ()]
    assert most_tokens(buckets, products) == expected


def test_records_without_the_librarys_time_leave_the_bound_alone(tmp_path):
    assert most_tokens([bucket(tokens=1, n=8, k=8)], [{"n": 8, "k": 8, "count": 1}]) is None
    install(tmp_path, "h200-sxm-141gb", record("linear"))
    found = choose(plan_on("h200-sxm-141gb"), sha, "3.6.0", tmp_path)
    assert found.params == {"linear": {"BLOCK": 512}}


def test_a_plan_takes_the_library_where_the_tuner_found_it_faster(tmp_path):
    plan = plan_on("h200-sxm-141gb")
    down = {"n": plan.model.hidden, "k": plan.model.ffn}
    buckets = tuple(timed(t, **down, us=us, library_us=3.0) for t, us in ((1, 2.0), (64, 4.0)))
    install(tmp_path, "h200-sxm-141gb", record("linear", buckets=buckets))
    found = choose(plan, sha, "3.6.0", tmp_path)
    assert found.params == {"linear": {"SHORT_K": 256, "TOKENS_MAX": 1}}


@pytest.mark.parametrize("parallelism", [Parallelism(), Parallelism(tp=2), Parallelism(tp=4)])
def test_a_plans_products_are_those_of_its_program(tmp_path, parallelism):
    plan = make_plan(model=tiny_model(weight_dtype="bf16"), parallelism=parallelism)
    with loaded(emit_program(plan), tmp_path) as load:
        parameters = load("stage_0").PARAMETERS
    shapes = sorted(
        tuple(each["shape"])
        for each in parameters
        if len(each["shape"]) == 2 and "embed" not in each["name"]
    )
    expected = sorted(
        (each["n"], each["k"])
        for each in itertools.chain(*products_of(plan).values())
        for _ in range(each["count"])
    )
    assert shapes == expected


def test_a_record_under_another_name_is_refused(tmp_path):
    install(tmp_path, "h200-sxm-141gb", record())
    path = tmp_path / "h200-sxm-141gb" / "silu_mul.yaml"
    path.rename(path.with_name("rope.yaml"))
    with pytest.raises(InvalidFile, match=r"rope\.yaml: op: 'silu_mul'"):
        load_records("h200-sxm-141gb", tmp_path)


def test_a_bundle_has_the_tuned_values_in_its_kernels_and_its_source(tmp_path, monkeypatch):
    own = bundle.source_sha256("add_rms_norm")
    buckets = (bucket(params={"ELEMENTS_A_WARP": 256}, tokens=64, width=128),)
    tuned_here = record("add_rms_norm", source_sha256=own, triton="9", buckets=buckets)
    install(tmp_path, "h200-sxm-141gb", tuned_here)
    monkeypatch.setattr(tuned, "TUNED", tmp_path)
    plan, files = bundle.compile_plan(plan_on("h200-sxm-141gb"))
    (kernel,) = [each for each in plan.kernels if each.op == "add_rms_norm"]
    assert kernel.params == {**load_spec("add_rms_norm").params, "ELEMENTS_A_WARP": 256}
    assert b"\nELEMENTS_A_WARP = 256\n" in files[kernel.file]
    assert any("Triton 9" in note for note in plan.predicted.notes)
    cpu, _ = bundle.compile_plan(plan_on("cpu"))
    assert cpu.predicted.notes == ()


def test_shipped_records_are_whole_and_of_real_kernels():
    for folder in sorted(tuned.TUNED.glob("*")):
        for op, each in load_records(folder.name).items():
            assert each.buckets
            if each.source_sha256 != bundle.source_sha256(op):
                continue  # not used, and every plan says so
            spaces = {search.regime: search.values for search in load_spec(op).searches}
            for one in each.buckets:
                assert one.params.keys() <= load_spec(op).params.keys()
                assert one.us <= one.default_us
                assert one.error <= 1
                for name, value in one.params.items():
                    assert value in spaces[one.regime][name]


@pytest.mark.parametrize(
    ("buckets", "field"),
    [
        ((), "buckets: is empty"),
        ((bucket(params={"BLOCK": -7}, tokens=64),), r"buckets\[0\]\.params\.BLOCK: -7"),
        ((bucket(tokens=-1),), r"buckets\[0\]\.when\.tokens: -1"),
        ((structs.replace(bucket(width=8), library_us=1.0),), r"buckets\[0\]\.when: has no tokens"),
    ],
)
def test_a_record_that_no_kernel_can_have_is_refused(tmp_path, buckets, field):
    install(tmp_path, "h200-sxm-141gb", record(buckets=buckets))
    with pytest.raises(InvalidFile, match=rf"silu_mul\.yaml: {field}"):
        load_records("h200-sxm-141gb", tmp_path)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"BLOK": 1024}, r"buckets\[0\]\.params\.BLOK: no tunable of silu_mul; nearest: BLOCK"),
        ({"BLOCK": 1000}, r"buckets\[0\]\.params\.BLOCK: 1000 .*nearest: 1024"),
    ],
)
def test_a_record_of_todays_source_has_todays_tunables(tmp_path, monkeypatch, params, said):
    own = bucket(params=params, tokens=64, width=128)
    source = bundle.source_sha256("silu_mul")
    install(tmp_path, "h200-sxm-141gb", record(buckets=(own,), source_sha256=source))
    monkeypatch.setattr(tuned, "TUNED", tmp_path)
    with pytest.raises(InvalidFile, match=rf"silu_mul\.yaml: {said}"):
        bundle.tuned(plan_on("h200-sxm-141gb"))


def test_every_record_of_the_catalog_that_is_used_keeps_to_its_search():
    found = bundle.tuned(plan_on("h100-sxm-80gb"))
    assert found.params or found.notes


def test_a_product_that_is_always_the_librarys_has_no_range_of_no_tokens():
    program = emit_program(
        plan_on("h200-sxm-141gb"), target="triton", params={"linear": {"TOKENS_MAX": 0}}
    )
    rows = [each for each in program.kernels if each.op == "linear"]
    assert [each.when.tokens_max for each in rows] == [None]

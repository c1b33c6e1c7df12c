"""The plans in plans/samples: canonical, valid, and made by the builders that tests use."""

from collections.abc import Callable
from pathlib import Path

import pytest
from strategies import sixteen_gpu_plan, tiny_plan

from plans.check import failures, load_plan
from plans.codec import dumps, load_file
from plans.plan import Plan

SAMPLES = Path(__file__).parents[2] / "plans" / "samples"
BUILDERS: dict[str, Callable[[], Plan]] = {
    "llama3-70b-16xh100.yaml": sixteen_gpu_plan,
    "tiny.yaml": tiny_plan,
}


def test_every_sample_is_known():
    assert {path.name for path in SAMPLES.iterdir()} == set(BUILDERS)


@pytest.mark.parametrize("name", BUILDERS)
def test_sample_is_what_its_builder_makes(name, request):
    path = SAMPLES / name
    text = dumps(BUILDERS[name]())
    if request.config.getoption("--refresh") and (not path.exists() or path.read_text() != text):
        path.write_text(text)
    assert path.read_text() == text, "differs; if that is meant: pytest --refresh"


@pytest.mark.parametrize("name", BUILDERS)
def test_sample_is_canonical_and_valid(name):
    path = SAMPLES / name
    plan = load_file(path, Plan)
    assert dumps(plan) == path.read_text()
    assert failures(plan) == []


def test_tiny_sample_agrees_with_sums_done_by_hand():
    plan = load_plan(SAMPLES / "tiny.yaml")
    # 256 tokens are two chunks of 128: each has 1 ms of overhead, 4 layers of 128 us and 10 us of
    # head; the first sees 128 x 129 / 2 = 8256 pairs, the second 128 x 128 more, 1 ns each.
    by_hand = 2 * (0.001 + 4 * 128e-6 + 10e-6) + 4 * (8256 + 8256 + 16384) * 1e-9
    assert plan.prefill.chunks[0].predicted_s == pytest.approx(by_hand, rel=1e-12)
    # a token's KV: K and V of 2 heads of 16 in fp32 over 4 layers = 1024 bytes; 128 pages of 16
    assert plan.memory.kv_bytes == 1024 * 16 * 128
    # a layer: q and o 64 x 64 each, k and v 64 x 32 each, mlp 3 x 64 x 128, two norms of 64
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    assert plan.memory.weights_bytes == 4 * (4 * layer + 2 * 256 * 64)


def test_sixteen_gpu_sample_accounts_for_every_device():
    plan = load_plan(SAMPLES / "llama3-70b-16xh100.yaml")
    assert plan.parallelism.ranks == plan.topology.devices == 16
    assert len(set(plan.placement.rank_map)) == 16
    # K and V of one head of 128 in bf16 over 40 layers = 20480 bytes a token and rank
    assert plan.memory.kv_bytes == plan.kv.pages_per_rank * 128 * 20480

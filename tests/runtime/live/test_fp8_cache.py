"""A live run whose cache holds fp8: the pool, the pages' scales, and what it costs the logits."""

import msgspec
import pytest
import torch
from builders import make_plan
from live_bundles import HandScheduler, write_bundle

from codegen.emit import emit_program
from plans.check import check_plan
from plans.mesh import Coordinates
from plans.plan import Plan
from runtime.clock import WallClock
from runtime.executor.live import LiveExecutor
from runtime.parallel.inputs import page_pool
from runtime.program import load_bundle
from runtime.sampling_params import SamplingParams
from runtime.weights import random_weights

PROMPT = [(7 * at + 3) % 250 for at in range(50)]
GREEDY = SamplingParams()


def plan_of(kv_dtype: str) -> Plan:
    return make_plan(kv_dtype=kv_dtype, rows=((64, 32), (128, 32)))


def logits(plan: Plan, folder, chunks: list[int]) -> torch.Tensor:
    """Logits behind the prompt, computed in these chunks."""
    program = emit_program(plan, target="torch")
    files = {name: content.decode() for name, content in program.files.items()}
    stage = load_bundle(write_bundle(folder, plan, files)).load_stage(0)
    seen: dict[int, torch.Tensor] = {}

    def note(number: int, position: int, logits_V: torch.Tensor) -> None:
        seen[position] = logits_V.clone()

    weights = random_weights(stage.parameters, tp=1, tp_rank=0)
    executor = LiveExecutor(plan, stage, weights, clock=WallClock(), on_logits=note)
    executor.warm_up()
    hand = HandScheduler(plan, executor)
    hand.add(0, PROMPT, GREEDY)
    for tokens in chunks:
        hand.step({0: tokens})
    return seen[0]


def test_the_pool_of_an_fp8_plan_is_as_large_as_the_plan_says():
    plan = plan_of("fp8")
    check_plan(plan)
    pool = page_pool(plan, Coordinates(replica=0, stage=0, group=0, tp=0), torch.device("cpu"))
    tensors = [*pool.k_pages, *pool.v_pages, *pool.k_scales, *pool.v_scales]
    assert {each.dtype for each in pool.k_pages} == {torch.float8_e4m3fn}
    assert sum(each.nbytes for each in tensors) == plan.memory.kv_bytes


def test_a_plan_that_forgets_the_scales_is_refused():
    plan = plan_of("fp8")
    less = plan.memory.kv_bytes - 4
    memory = msgspec.structs.replace(
        plan.memory, kv_bytes=less, free_bytes=plan.memory.free_bytes + 4
    )
    with pytest.raises(Exception, match="kv_bytes"):
        check_plan(msgspec.structs.replace(plan, memory=memory))


def test_logits_of_a_live_run_stay_within_the_bound_of_the_rounding(tmp_path):
    """However the prompt is cut; and they are not those of an fp32 cache.

    K and V are off by 2^-4 / sqrt(3) = 3.6 % in the mean, which moves attention's output by sqrt(2)
    times that, over 4 layers in random directions twice that: 10 % of the logits' size, and half as
    much again for what the products between them add.
    """
    whole = logits(plan_of("fp32"), tmp_path / "fp32", [50])
    for at, chunks in enumerate(([50], [20, 1, 29])):
        found = logits(plan_of("fp8"), tmp_path / f"fp8-{at}", chunks)
        error = (found - whole).square().mean().sqrt() / whole.std()
        assert 1e-3 < error < 0.15

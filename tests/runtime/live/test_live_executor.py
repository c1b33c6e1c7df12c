"""The live executor and the engine over it, exact on a program whose every key matters."""

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bundles import (
    TOY_FILES,
    TOY_VOCAB,
    HandScheduler,
    toy_answer,
    toy_plan,
    with_pages,
    write_bundle,
)

from plans.errors import BundleMismatch, MedhaError
from plans.mesh import Parallelism
from plans.plan import Plan
from runtime.clock import WallClock
from runtime.engine import Engine
from runtime.executor.live import LiveExecutor, device_for
from runtime.program import StageProgram, load_bundle
from runtime.request import Request
from runtime.sampling_params import SamplingParams
from runtime.scheduler import load_policy

GREEDY = SamplingParams()
PROMPTS = st.lists(st.integers(0, TOY_VOCAB - 1), min_size=1, max_size=60)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> StageProgram:
    folder = write_bundle(tmp_path_factory.mktemp("toy"), toy_plan(), TOY_FILES)
    return load_bundle(folder).load_stage(0)


def executor_of(plan: Plan, program: StageProgram) -> LiveExecutor:
    return LiveExecutor(plan, program, {}, clock=WallClock())


@given(st.data(), st.lists(PROMPTS, min_size=1, max_size=4))
def test_any_mix_of_chunks_decodes_and_evictions_gives_the_same_tokens(program, data, prompts):
    plan = toy_plan()
    hand = HandScheduler(plan, executor_of(plan, program))
    for number, prompt in enumerate(prompts):
        hand.add(number, prompt, GREEDY)
    for _ in range(data.draw(st.integers(1, 12))):
        chosen = data.draw(st.sets(st.sampled_from(range(len(prompts))), min_size=1))
        for number in data.draw(st.sets(st.sampled_from(range(len(prompts))), max_size=1)):
            hand.evict(number)
        tokens = {each: data.draw(st.integers(1, hand.missing(each))) for each in sorted(chosen)}
        hand.step(tokens)
    for number, prompt in enumerate(prompts):
        assert hand.answers[number] == toy_answer(prompt, len(hand.answers[number]))


@pytest.mark.parametrize("policy", ["lars", "fcfs", "fcfs,chunk=7"])
@pytest.mark.parametrize("pages", [17, 80])
@settings(max_examples=20)
@given(data=st.data())
def test_the_engine_gives_every_request_its_tokens(program, policy, pages, data):
    """17 pages hold one request of full length and one token: the rest is taken from each other."""
    plan = with_pages(toy_plan(), pages)
    prompts = data.draw(st.lists(PROMPTS, min_size=1, max_size=8))
    executor = executor_of(plan, program)
    answers: dict[int, list[int]] = {number: [] for number in range(len(prompts))}

    def on_token(number: int, token: int) -> None:
        answers[number].append(token)

    scheduling = load_policy(policy, plan.scheduler)
    engine = Engine(plan, executor, WallClock(), scheduling, on_token=on_token)
    wanted = {}
    for number, prompt in enumerate(prompts):
        wanted[number] = data.draw(st.integers(1, 40))
        executor.add_request(number, prompt, GREEDY)
        engine.add(
            Request(
                number=number,
                arrival_s=0.0,
                prompt_tokens=len(prompt),
                max_tokens=wanted[number],
            )
        )
    engine.run()
    assert answers == {
        number: toy_answer(prompt, wanted[number]) for number, prompt in enumerate(prompts)
    }
    engine.book.check_integrity()


def test_an_eviction_does_not_move_a_request_in_its_random_stream(tmp_path):
    flat = "import torch\nPARAMETERS = ()\ndef forward(weights, inputs, kv, comm):\n"
    flat += f"    return torch.zeros(len(inputs.sample_rows_R), {TOY_VOCAB})\n"
    folder = write_bundle(tmp_path, toy_plan(), {"program/stage_0.py": flat})
    program = load_bundle(folder).load_stage(0)
    sampling = SamplingParams(temperature=1.0, seed=5)
    answers = []
    for evicts in (False, True):
        hand = HandScheduler(toy_plan(), executor_of(toy_plan(), program))
        hand.add(0, [1, 2, 3], sampling)
        hand.add(1, [4], SamplingParams(temperature=1.0, seed=6))
        for _ in range(6):
            if evicts:
                hand.evict(0)
                hand.step({0: 1, 1: 1})
            hand.step({0: hand.missing(0)})
        answers.append(hand.answers[0])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1


def test_ended_requests_are_forgotten_and_evicted_ones_are_not(program):
    hand = HandScheduler(toy_plan(), executor_of(toy_plan(), program))
    for number in range(3):
        hand.add(number, [1, 2], GREEDY)
    hand.step({0: 2, 1: 2})
    hand.evict(1)
    hand.step({2: 1}, ended=[0])
    assert hand.executor.known_requests() == 2
    hand.step({1: 3})
    assert hand.answers[1] == toy_answer([1, 2], 2)


def test_a_request_that_ends_before_its_first_step_is_no_error(program):
    hand = HandScheduler(toy_plan(), executor_of(toy_plan(), program))
    hand.add(0, [1], GREEDY)
    hand.step({0: 1}, ended=[9])
    assert hand.executor.known_requests() == 1


def test_logits_are_shown_with_their_request_and_position(program):
    seen = []
    executor = LiveExecutor(
        toy_plan(), program, {}, clock=WallClock(), on_logits=lambda *each: seen.append(each)
    )
    hand = HandScheduler(toy_plan(), executor)
    hand.add(4, [1, 2], GREEDY)
    hand.step({4: 1})
    hand.step({4: 1})
    hand.step({4: 1})
    assert [(number, position) for number, position, _ in seen] == [(4, 0), (4, 1)]
    assert [int(logits.argmax()) for _, _, logits in seen] == hand.answers[4]


def test_a_warm_up_leaves_no_trace(program):
    hand = HandScheduler(toy_plan(), executor_of(toy_plan(), program))
    hand.executor.warm_up()
    assert hand.executor.can_submit()
    assert hand.executor.known_requests() == 0
    hand.add(0, [1, 2], GREEDY)
    hand.step({0: 2})
    assert hand.answers[0] == toy_answer([1, 2], 1)


def test_a_plan_for_several_ranks_is_refused_before_anything_is_loaded():
    topology = msgspec.structs.replace(toy_plan().topology, devices_per_node=2)
    plan = toy_plan(parallelism=Parallelism(kvp=2), topology=topology)
    with pytest.raises(BundleMismatch, match=r"2 ranks.*nearest: plan with --gpus 1"):
        device_for(plan)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is to be missing")
def test_a_plan_for_a_gpu_is_refused_where_there_is_none():
    topology = msgspec.structs.replace(toy_plan().topology, device="h100-sxm-80gb")
    with pytest.raises(BundleMismatch, match="no CUDA device"):
        device_for(toy_plan(topology=topology))


def test_a_page_pool_that_does_not_fit_says_how_large_it_is(program):
    with pytest.raises(MedhaError, match=r"needs \d+\.\d GB"):
        executor_of(with_pages(toy_plan(), 1 << 50), program)


@pytest.mark.parametrize("error", ["RuntimeError('no kernel')", "torch.OutOfMemoryError('full')"])
def test_a_failing_program_ends_with_the_step_and_the_device(tmp_path, error):
    text = f"import torch\nPARAMETERS = ()\ndef forward(*args):\n    raise {error}\n"
    folder = write_bundle(tmp_path, toy_plan(), {"program/stage_0.py": text})
    hand = HandScheduler(toy_plan(), executor_of(toy_plan(), load_bundle(folder).load_stage(0)))
    hand.add(0, [1], GREEDY)
    with pytest.raises(MedhaError, match=r"step 0 .*cpu"):
        hand.step({0: 1})

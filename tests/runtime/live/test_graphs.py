"""Decode steps by graphs: padding, static inputs and fed-back tokens, with a recorder of our own.

The recorder notes the operations of a program on the CPU and runs them again on the same tensors,
as a CUDA graph does. Where there is a GPU, the same runs as CUDA graphs.
"""

import dataclasses
import logging

import msgspec
import pytest
import torch
from builders import make_plan, tiny_model, tiny_topology
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bundles import (
    TOY_FILES,
    TOY_PROGRAM,
    TOY_VOCAB,
    HandScheduler,
    toy_answer,
    toy_plan,
    with_pages,
    write_bundle,
)
from tapes import TapeRecorder

from codegen.emit import emit_program
from codegen.kernels import source_texts
from plans.errors import MedhaError
from plans.plan import Plan
from runtime.clock import WallClock
from runtime.engine import Engine
from runtime.executor import live
from runtime.executor.live import LiveExecutor
from runtime.parallel.graphs import SIZES
from runtime.parallel.recorder import CudaRecorder
from runtime.parallel.table import Row, State
from runtime.program import StageProgram, load_bundle
from runtime.request import Request
from runtime.sampling_params import SamplingParams
from runtime.scheduler import load_policy
from runtime.weights import random_weights

GREEDY = SamplingParams()
RANDOM = SamplingParams(temperature=0.8, top_k=7, seed=11)
PROMPTS = st.lists(st.integers(0, TOY_VOCAB - 1), min_size=1, max_size=60)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> StageProgram:
    folder = write_bundle(tmp_path_factory.mktemp("toy"), toy_plan(), TOY_FILES)
    return load_bundle(folder).load_stage(0)


def recording(plan: Plan, program: StageProgram) -> tuple[LiveExecutor, TapeRecorder]:
    """An executor that feeds tokens back and records, as on a GPU."""
    recorder = TapeRecorder()
    executor = LiveExecutor(plan, program, {}, clock=WallClock(), ahead=True, recorder=recorder)
    executor.warm_up()
    return executor, recorder


@settings(max_examples=40)
@given(st.data(), st.lists(PROMPTS, min_size=1, max_size=5))
def test_any_mix_of_chunks_decodes_and_evictions_gives_the_same_tokens(program, data, prompts):
    plan = toy_plan()
    executor, _ = recording(plan, program)
    hand = HandScheduler(plan, executor)
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


@settings(max_examples=25)
@given(data=st.data(), pages=st.sampled_from([17, 80]), policy=st.sampled_from(["lars", "fcfs"]))
def test_the_engine_gives_every_request_its_tokens_a_step_ahead(program, data, pages, policy):
    plan = with_pages(toy_plan(), pages)
    prompts = data.draw(st.lists(PROMPTS, min_size=1, max_size=8))
    executor, recorder = recording(plan, program)
    answers: dict[int, list[int]] = {number: [] for number in range(len(prompts))}
    stop_at = data.draw(st.integers(0, TOY_VOCAB - 1))
    most = 0

    def on_token(number: int, token: int) -> str | None:
        nonlocal most
        most = max(most, executor.in_flight())
        answers[number].append(token)
        return "stop" if token == stop_at else None

    engine = Engine(
        plan,
        executor,
        WallClock(),
        load_policy(policy, plan.scheduler),
        on_token=on_token,
        ahead=executor.feeds_back,
    )
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
    for number, prompt in enumerate(prompts):
        expected = toy_answer(prompt, wanted[number])
        if stop_at in expected:
            expected = expected[: expected.index(stop_at) + 1]
        assert answers[number] == expected
    engine.book.check_integrity()
    if max(map(len, answers.values())) > 2:
        assert most == 1, "no step stood behind the one that was collected"
        assert recorder.replayed > 0


def test_recording_and_padding_touch_no_page(program):
    executor, recorder = recording(toy_plan(), program)
    pool = executor._rank.cache.k_pages[0]  # noqa: SLF001 - what no output shows
    pool.fill_(7.0)
    hand = HandScheduler(toy_plan(), executor)
    for number in range(3):
        hand.add(number, [5, 6], GREEDY)
        hand.step({number: 2})
    before = pool.clone()
    replayed = recorder.replayed
    hand.step({0: 1, 1: 1, 2: 1})
    assert recorder.replayed == replayed + 1, "three decodes run as a graph of four"
    changed = (pool != before).flatten(2).any(-1).sum()
    assert int(changed) <= 3, "one slot a decode, none for the padding"


@pytest.mark.parametrize("sequences", [1, 3, 16, 300])
def test_batches_up_to_the_limit_or_the_largest_graph_have_one(program, sequences):
    plan = toy_plan()
    limits = type(plan.limits)(context_tokens=plan.limits.context_tokens, sequences=sequences)
    plan = toy_plan(limits=limits)
    executor, _ = recording(plan, program)
    graphs = executor._graphs  # noqa: SLF001 - what no output shows
    assert graphs is not None
    decodes, chunks = graphs.count()
    assert decodes == len([size for size in SIZES if size < min(sequences, 256)]) + 1
    assert chunks == plan.scheduler.max_step_tokens // 64
    state = State(tokens=[1, 2], prompt_tokens=1, sampling=GREEDY)
    rows = [Row(number=0, state=state, prefix=1, tokens=1, home=0, samples=True)]
    assert graphs.takes(rows * min(sequences, 256))
    assert not graphs.takes(rows * (min(sequences, 256) + 1))


def test_a_program_that_cannot_be_recorded_runs_without_graphs(program, caplog):
    class Broken(TapeRecorder):
        def begin(self):
            raise RuntimeError("operation not permitted when stream is capturing")

    executor = LiveExecutor(
        toy_plan(), program, {}, clock=WallClock(), ahead=True, recorder=Broken()
    )
    with caplog.at_level(logging.WARNING):
        executor.warm_up()
    assert "launched kernel by kernel" in caplog.text
    hand = HandScheduler(toy_plan(), executor)
    hand.add(0, [1, 2], GREEDY)
    for _ in range(3):
        hand.step({0: hand.missing(0)})
    assert hand.answers[0] == toy_answer([1, 2], 3)


def test_memory_that_is_missing_beside_the_pages_is_an_error_that_says_so(program, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 126 MiB")

    monkeypatch.setattr(live, "StepGraphs", full)
    with pytest.raises(MedhaError, match=r"ran out of memory on cpu.*fewer pages"):
        LiveExecutor(toy_plan(), program, {}, clock=WallClock(), recorder=TapeRecorder())


def test_steps_of_more_tokens_than_a_request_may_have_are_recorded_within_the_table(program):
    """A table's row ends with the longest request: a kernel would read beyond it, unseen."""
    plan = toy_plan()
    scheduler = msgspec.structs.replace(plan.scheduler, max_step_tokens=640)
    plan = toy_plan(scheduler=scheduler)
    assert plan.kv.tokens_per_kvp_shard == 256
    executor, _ = recording(plan, program)
    assert executor._graphs.count()[1] == 10  # noqa: SLF001 - what no output shows
    hand = HandScheduler(plan, executor)
    prompts = [[(7 * number + at) % TOY_VOCAB for at in range(150)] for number in range(4)]
    for number, prompt in enumerate(prompts):
        hand.add(number, prompt, GREEDY)
    hand.step(dict.fromkeys(range(4), 150))
    hand.step(dict.fromkeys(range(4), 1))
    assert hand.answers == {n: toy_answer(prompt, 2) for n, prompt in enumerate(prompts)}


def test_a_recording_that_fails_leaves_nothing_of_itself(program):
    """What it had recorded would keep its memory."""

    class Full(TapeRecorder):
        def end(self):
            replay = super().end()
            if self.recorded == 5:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return replay

    plan = toy_plan()
    executor = LiveExecutor(plan, program, {}, clock=WallClock(), ahead=True, recorder=Full())
    executor.warm_up()
    pieces = executor._graphs._pieces  # noqa: SLF001 - what no output shows
    assert not pieces.count()
    assert not pieces._tails  # noqa: SLF001
    assert not pieces._buffers  # noqa: SLF001


@pytest.mark.parametrize("wanted", [True, False])
def test_graphs_can_be_declined_by_whoever_runs_and_by_the_program(program, wanted):
    recorder = TapeRecorder()
    stage = program if wanted else StageProgram(parameters=(), forward=program.forward)
    executor = LiveExecutor(
        toy_plan(), stage, {}, clock=WallClock(), graphs=not wanted, recorder=recorder
    )
    executor.warm_up()
    assert recorder.recorded == 0


def answers_of(
    plan: Plan, program: StageProgram, *, device: str = "cpu", **how: object
) -> dict[int, list[int]]:
    """Answers of a crowd of greedy and random requests, some decoding beside chunks."""
    weights = random_weights(program.parameters, device=torch.device(device))
    executor = LiveExecutor(plan, program, weights, clock=WallClock(), **how)  # type: ignore[arg-type]
    executor.warm_up()
    answers: dict[int, list[int]] = {number: [] for number in range(7)}
    engine = Engine(
        plan,
        executor,
        WallClock(),
        load_policy("fcfs,chunk=24", plan.scheduler),
        on_token=lambda number, token: answers[number].append(token),
        ahead=executor.feeds_back,
    )
    for number in answers:
        prompt = [(3 * number + place * place) % 256 for place in range(3 + 11 * number)]
        executor.add_request(number, prompt, RANDOM if number % 3 == 0 else GREEDY)
        engine.add(Request(number=number, arrival_s=0.0, prompt_tokens=len(prompt), max_tokens=12))
    engine.run()
    return answers


@pytest.mark.parametrize("graphs", [False, True])
def test_the_sampler_of_a_program_draws_the_same_tokens(graphs, tmp_path):
    plan = toy_plan()
    files = {
        **TOY_FILES,
        "program/stage_0.py": f"{TOY_PROGRAM}\nfrom .sample import sample\nSAMPLE = sample\n",
        **{f"program/{name}.py": text for name, text in source_texts("sample", "triton").items()},
    }
    program = load_bundle(write_bundle(tmp_path / "kernel", plan, files)).load_stage(0)
    given: list[int] = []

    def counted(logits_RV: torch.Tensor, controls_R5: torch.Tensor) -> torch.Tensor:
        given.extend(controls_R5[:, 0].tolist())
        return program.sample(logits_RV, controls_R5)

    how: dict[str, object] = {"ahead": True, "recorder": TapeRecorder()} if graphs else {}
    found = answers_of(plan, dataclasses.replace(program, sample=counted), **how)
    assert given.count(RANDOM.temperature) == 3 * 12
    plain = load_bundle(write_bundle(tmp_path / "plain", plan, TOY_FILES)).load_stage(0)
    assert plain.sample is None
    assert found == answers_of(plan, plain)


IN_PLACE = """

summed = weighted
places = []


def weighted(tokens_T1, pages, inputs):
    found_T1 = summed(tokens_T1, pages, inputs)
    if inputs.results is None:
        return found_T1
    places.append(inputs.results[0].data_ptr())
    inputs.results[0].copy_(found_T1)
    return inputs.results[0]
"""


def test_an_op_between_pieces_may_write_its_results_where_they_are_read(tmp_path):
    plan = toy_plan()
    plain = load_bundle(write_bundle(tmp_path / "plain", plan, TOY_FILES)).load_stage(0)
    files = {**TOY_FILES, "program/toy_sums.py": TOY_FILES["program/toy_sums.py"] + IN_PLACE}
    program = load_bundle(write_bundle(tmp_path / "there", plan, files)).load_stage(0)
    found = answers_of(plan, program, ahead=True, recorder=TapeRecorder())
    assert found == answers_of(plan, plain)
    places = program.namespace["weighted"].__globals__["places"]
    assert len(places) > 5
    assert len(set(places)) == 1


DENSE = """

def paged_attention(q_TNH, k_pages, v_pages, written, inputs, scale, k_scales=None, v_scales=None):
    \"\"\"Over all pages of the table at once: no number is read on the host.\"\"\"
    row_T = torch.arange(len(q_TNH))
    sequence_T = torch.searchsorted(inputs.query_starts_B1[1:], row_T.int(), right=True)
    sequence_T = sequence_T.clamp_max(len(inputs.kv_lens_B) - 1)
    table_TP = inputs.page_table_BP[sequence_T].long()
    k_TSKH, v_TSKH = (pages[table_TP].flatten(1, 2) for pages in (k_pages, v_pages))
    group = q_TNH.shape[1] // k_pages.shape[2]
    k_TSNH, v_TSNH = (each.repeat_interleave(group, 2) for each in (k_TSKH, v_TSKH))
    logits_TNS = torch.einsum("tnh,tsnh->tns", q_TNH, k_TSNH) * scale
    behind_T = inputs.kv_lens_B[sequence_T] - inputs.query_starts_B1[sequence_T + 1]
    seen_TS = torch.arange(k_TSNH.shape[1]) <= (behind_T + row_T)[:, None]
    logits_TNS = logits_TNS.masked_fill(~seen_TS[:, None], -1e30)
    return torch.einsum("tns,tsnh->tnh", logits_TNS.softmax(-1), v_TSNH), logits_TNS.logsumexp(-1)
"""
"""A stand-in for the reference, which reads lengths and so cannot be recorded."""


def test_tokens_are_the_same_with_and_without_graphs_and_a_step_ahead(tmp_path):
    """In fp32 on one thread, where a row's numbers do not depend on the rows beside it enough to
    move a token: the layouts of tests/runtime/parallel are held to the same."""
    plan = make_plan(model=tiny_model(layers=2), rows=((64, 32), (256, 16)))
    files = {name: text.decode() for name, text in emit_program(plan, target="torch").files.items()}
    program = load_bundle(write_bundle(tmp_path / "plain", plan, files)).load_stage(0)
    assert not program.recordable
    plain = answers_of(plan, program)
    assert answers_of(plan, program, ahead=True, graphs=False) == plain
    stage = files["program/stage_0.py"]
    files["program/stage_0.py"] = stage.replace("RECORDABLE = False", "RECORDABLE = True")
    files["program/paged_attention.py"] += DENSE
    program = load_bundle(write_bundle(tmp_path / "dense", plan, files)).load_stage(0)
    recorder = TapeRecorder()
    assert answers_of(plan, program, ahead=True, recorder=recorder) == plain
    layers = 2
    assert recorder.replayed > 10 * layers


def test_a_program_of_our_kernels_alone_can_be_recorded():
    plan = make_plan(model=tiny_model(weight_dtype="bf16", head_dim=64), kv_dtype="bf16")
    text = emit_program(plan, target="triton").files["program/stage_0.py"].decode()
    assert "RECORDABLE = True" in text


BF16_NEAR_TIE = 2**-4
"""Two steps of bf16 for logits between 4 and 8, where the best of 256 random ones lie: products of
another batch size add up in another order, and each row of logits is rounded to bf16 once."""


@pytest.mark.gpu
def test_cuda_graphs_give_the_tokens_of_plain_launches(tmp_path):
    model = tiny_model(weight_dtype="bf16", head_dim=64, hidden=128)
    plan = make_plan(
        model=model,
        kv_dtype="bf16",
        rows=((64, 32), (256, 16)),
        topology=tiny_topology(device="h100-sxm-80gb"),
    )
    emitted = emit_program(plan)
    files = {name: text.decode() for name, text in emitted.files.items()}
    program = load_bundle(write_bundle(tmp_path, plan, files)).load_stage(0)
    assert program.recordable
    best: dict[tuple[int, int], torch.Tensor] = {}
    plain = answers_of(
        plan,
        program,
        graphs=False,
        ahead=False,
        device="cuda",
        on_logits=lambda number, at, logits_V: best.__setitem__((number, at), logits_V.cpu()),
    )
    for how in ({"graphs": False}, {"graphs": True}):
        for number, answer in answers_of(plan, program, device="cuda", **how).items():
            differing = [
                at for at, pair in enumerate(zip(answer, plain[number], strict=True))
                if pair[0] != pair[1]
            ]  # fmt: skip
            if differing and number % 3:  # what is drawn may change with the last bit of any logit
                logits_V = best[number, differing[0]]
                behind = float(logits_V.max() - logits_V[answer[differing[0]]])
                assert behind <= BF16_NEAR_TIE, (how, number, differing[0])


@pytest.mark.gpu
def test_the_graphs_of_a_device_write_what_was_recorded():
    device = torch.device("cuda", 0)
    x, runs = torch.zeros(4, device=device), []
    recorder = CudaRecorder(device)
    with recorder.session():
        for size in (4, 2):
            recorder.begin()
            out = x[:size] * 2 + 1
            runs.append((recorder.end(), out))
    for value in (3.0, 5.0):
        x.fill_(value)
        for replay, out in runs:
            replay()
            assert out.tolist() == [2 * value + 1] * len(out)

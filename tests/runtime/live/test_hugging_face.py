"""The live path against Hugging Face transformers, on checkpoints that transformers wrote.

Reference: one forward pass of transformers over the whole sequence, eager attention, fp32. Its
logits at each place are compared with those that the live path drew the next token from, and each
drawn token with the reference's best one (teacher-forced, so one near-tie spoils no comparison).
"""

import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from builders import make_plan, tiny_topology
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bundles import HandScheduler, with_pages, write_bundle

import runtime.cli_run
from codegen.emit import emit_program
from planner.hf_config import read_config
from plans.plan import Plan
from runtime.clock import WallClock
from runtime.engine import Engine
from runtime.executor.live import LiveExecutor, device_for
from runtime.program import StageProgram, load_bundle
from runtime.request import Request
from runtime.sampling_params import SamplingParams
from runtime.scheduler import load_policy
from runtime.weights import load_weights

VOCAB = 131  # prime: nothing divides it by luck
TOLERANCE = 1e-4
"""A logit behind two layers ends a chain of about 2 x (64 + 128 + 64 + 128) + 64 fp32 additions.
Their roundings, 2^-24 of sums below 4 each, add up like a random walk to sqrt(832) x 2^-24 x 4 =
7e-6; more than ten times that does not come from rounding."""
NEAR_TIE = 2 * TOLERANCE

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "llama-3.1": lambda: transformers.LlamaConfig(
        **COMMON, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True
    ),
    "mistral": lambda: transformers.MistralConfig(**COMMON, head_dim=32, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=16),
    "qwen3-yarn": lambda: transformers.Qwen3Config(
        **{**COMMON, "max_position_embeddings": 64}, head_dim=16, rope_parameters=YARN_ROPE
    ),
}


@dataclass(frozen=True)
class World:
    """A checkpoint, its bundle and its reference."""

    checkpoint: Path
    bundle: Path
    plan: Plan
    program: StageProgram
    weights: dict[str, torch.Tensor]
    reference: transformers.PreTrainedModel

    def hand(self) -> tuple[HandScheduler, dict[tuple[int, int], torch.Tensor]]:
        """A scheduler over a fresh executor, and the logits that it will have drawn from."""
        seen: dict[tuple[int, int], torch.Tensor] = {}
        return HandScheduler(self.plan, self.executor(self.plan, seen)), seen

    def executor(self, plan: Plan, seen: dict[tuple[int, int], torch.Tensor]) -> LiveExecutor:
        """An executor that notes its logits in `seen` by (request, position)."""

        def note(number: int, position: int, logits_V: torch.Tensor) -> None:
            seen[number, position] = logits_V.cpu().clone()

        return LiveExecutor(plan, self.program, self.weights, clock=WallClock(), on_logits=note)

    def assert_equal(
        self,
        number: int,
        prompt: Sequence[int],
        answer: Sequence[int],
        seen: dict[tuple[int, int], torch.Tensor],
    ) -> None:
        """Logits and greedy tokens of one request are the reference's."""
        with torch.inference_mode():
            tokens = torch.tensor([[*prompt, *answer]])
            logits_TV = self.reference(tokens).logits[0, len(prompt) - 1 : -1]
        for position, (expected_V, token) in enumerate(zip(logits_TV, answer, strict=True)):
            torch.testing.assert_close(seen[number, position], expected_V, atol=TOLERANCE, rtol=0.0)
            best, second = expected_V.topk(2).values.tolist()
            assert token == int(expected_V.argmax()) or best - second <= NEAR_TIE


@functools.cache
def random_model(kind: str) -> transformers.PreTrainedModel:
    """A model whose every parameter, biases and norms included, is far from its default."""
    torch.manual_seed(sorted(CONFIGS).index(kind))
    config = CONFIGS[kind]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        spread = 0.3 if parameter.dim() == 1 else 0.12
        torch.nn.init.normal_(parameter, float(name.endswith("norm.weight")), spread)
    return model.float().eval()


@pytest.fixture(scope="module", params=CONFIGS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(request.param, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world("llama", tmp_path_factory.mktemp("world"))


def make_world(kind: str, folder: Path, *, device: str = "cpu") -> World:
    """A world on a device, with the `torch` target."""
    model = random_model(kind)
    checkpoint = folder / kind
    model.save_pretrained(checkpoint, max_shard_size="100KB")
    plan = make_plan(
        model=read_config(checkpoint),
        rows=((64, 32), (256, 16)),
        topology=tiny_topology(device=device),
    )
    program = emit_program(plan, target="torch")
    files = {name: text.decode() for name, text in program.files.items()}
    bundle = write_bundle(folder / "bundle", plan, files)
    stage = load_bundle(bundle).load_stage(0)
    weights = load_weights(checkpoint, stage.parameters, device=device_for(plan))
    return World(
        checkpoint=checkpoint,
        bundle=bundle,
        plan=plan,
        program=stage,
        weights=weights,
        reference=model,
    )


def prompt_of(tokens: int, seed: int) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (tokens,), generator=generator).tolist()


GREEDY = SamplingParams()


def test_the_checkpoint_is_a_sharded_one(llama):
    assert len(list(llama.checkpoint.glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_one_request_in_chunks_of_any_size(world, chunk):
    prompt = prompt_of(150, seed=chunk)
    hand, seen = world.hand()
    hand.add(0, prompt, GREEDY)
    while len(hand.answers[0]) < 6:
        hand.step({0: min(chunk, hand.missing(0))})
    world.assert_equal(0, prompt, hand.answers[0], seen)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CONFIGS)
def test_one_request_on_a_gpu(kind, tmp_path):
    world = make_world(kind, tmp_path, device="h100-sxm-80gb")
    prompt = prompt_of(100, seed=3)
    hand, seen = world.hand()
    hand.add(0, prompt, GREEDY)
    while len(hand.answers[0]) < 6:
        hand.step({0: min(16, hand.missing(0))})
    world.assert_equal(0, prompt, hand.answers[0], seen)


@settings(max_examples=12)
@given(data=st.data())
def test_any_mix_of_chunks_decodes_and_evictions(world, data):
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=4))
    prompts = [prompt_of(tokens, seed=tokens) for tokens in lengths]
    hand, seen = world.hand()
    for number, prompt in enumerate(prompts):
        hand.add(number, prompt, GREEDY)
    everyone = st.sampled_from(range(len(prompts)))
    for _ in range(data.draw(st.integers(1, 8))):
        for number in data.draw(st.sets(everyone, max_size=1)):
            hand.evict(number)
        chosen = sorted(data.draw(st.sets(everyone, min_size=1)))
        hand.step({each: data.draw(st.integers(1, hand.missing(each))) for each in chosen})
    for number, prompt in enumerate(prompts):
        while len(hand.answers[number]) < 2:
            hand.step({number: hand.missing(number)})
        world.assert_equal(number, prompt, hand.answers[number], seen)


@pytest.mark.parametrize("boundary", range(1, 6))
@pytest.mark.parametrize("evicted", [True, False])
def test_a_prefill_preempted_at_any_chunk_boundary(llama, boundary, evicted):
    prompt, other = prompt_of(90, seed=1), prompt_of(40, seed=2)
    hand, seen = llama.hand()
    hand.add(0, prompt, GREEDY)
    hand.add(1, other, GREEDY)
    for _ in range(boundary):
        hand.step({0: 16})
    if evicted:
        hand.evict(0)
    for _ in range(5):
        hand.step({1: hand.missing(1)})
    while len(hand.answers[0]) < 5:
        hand.step({0: min(16, hand.missing(0)), 1: 1})
    llama.assert_equal(0, prompt, hand.answers[0], seen)
    llama.assert_equal(1, other, hand.answers[1], seen)


@pytest.mark.parametrize("policy", ["lars", "fcfs"])
def test_recomputation_under_memory_pressure(world, policy):
    """17 pages hold one request of full length; six of up to 150 tokens need 50."""
    plan = with_pages(world.plan, 17)
    seen: dict[tuple[int, int], torch.Tensor] = {}
    executor = world.executor(plan, seen)
    prompts = [prompt_of(tokens, seed=tokens) for tokens in (30, 120, 9, 60, 31, 110)]
    answers: list[list[int]] = [[] for _ in prompts]
    engine = Engine(
        plan,
        executor,
        WallClock(),
        load_policy(policy, plan.scheduler),
        on_token=lambda number, token: answers[number].append(token),
    )
    for number, prompt in enumerate(prompts):
        executor.add_request(number, prompt, GREEDY)
        engine.add(Request(number=number, arrival_s=0.0, prompt_tokens=len(prompt), max_tokens=40))
    engine.run()
    engine.book.check_integrity()
    assert sum(record.evictions for record in engine.records) > 0
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert len(answer) == 40
        world.assert_equal(number, prompt, answer, seen)


def test_the_command_answers_as_transformers_generates(world, tmp_path, monkeypatch, capsysbinary):
    prompts = [prompt_of(tokens, seed=tokens) for tokens in (5, 80)]
    requests = tmp_path / "requests.jsonl"
    lines = [
        json.dumps({"token_ids": prompt, "max_tokens": 12, "ignore_eos": True})
        for prompt in prompts
    ]
    requests.write_text("\n".join(lines))
    flags = ["--weights", world.checkpoint, "--requests", requests, "--tokenizer", "none"]
    monkeypatch.setattr(sys, "argv", [str(each) for each in ("medha-run", world.bundle, *flags)])
    with pytest.raises(SystemExit) as ended:
        runtime.cli_run.main()
    assert not ended.value.code
    results = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    for prompt, result in zip(prompts, results, strict=True):
        expected = world.reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for position, logits in enumerate(expected.logits):
            best, second = logits[0].topk(2).values.tolist()
            if best - second <= NEAR_TIE:
                break
            assert result["token_ids"][position] == int(logits[0].argmax())

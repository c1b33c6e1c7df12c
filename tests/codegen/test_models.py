"""The model files equal transformers on the same weights, by random configuration."""

import pytest
import torch
from builders import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_codegen import logit_tolerance, reference, ropes, small_models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from codegen.models import load_model
from codegen.models.frequencies import attention_factor, inverse_frequencies
from plans.errors import UnknownName
from plans.model import Model, Rope, RopeScaling


def rope_parameters(rope: Rope) -> dict[str, object]:
    """The same as a Hugging Face config says it."""
    if rope.scaling is None:
        return {"rope_type": "default", "rope_theta": rope.theta}
    scaling = rope.scaling
    return {
        "rope_type": scaling.kind,
        "rope_theta": rope.theta,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_context_tokens,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
    }


def fields(model: Model) -> dict[str, object]:
    return {
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn,
        "vocab_size": model.vocab,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "max_position_embeddings": model.context_limit,
        "rope_parameters": rope_parameters(model.rope),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }


def peer(model: Model) -> torch.nn.Module:
    """transformers' model of the same configuration."""
    shared = fields(model)
    if model.qk_norm:
        return Qwen3ForCausalLM(Qwen3Config(**shared, attention_bias=False))
    if model.qkv_bias:
        return Qwen2ForCausalLM(Qwen2Config(**shared, use_sliding_window=False))
    if model.heads == model.kv_heads:
        return LlamaForCausalLM(LlamaConfig(**shared))
    return MistralForCausalLM(MistralConfig(**shared, sliding_window=None))


def check_equal(model: Model, tokens: list[int]) -> None:
    ours, theirs = reference(model), peer(model).eval()
    missing, extra = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert extra == []
    assert missing == (["lm_head.weight"] if model.tie_embeddings else [])
    theirs.tie_weights()
    ids = torch.tensor(tokens)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    logits = ours(ids, torch.arange(len(ids)))
    # transformers rounds frequencies as fp32 powers do, one unit away from ours: 2^-23 of an angle
    # of at most 40 positions is 5e-6, of the size of what the products' order changes
    torch.testing.assert_close(logits, expected, rtol=0, atol=2 * logit_tolerance(expected))


@settings(max_examples=25)
@given(model=small_models(), tokens=st.lists(st.integers(0, 49), min_size=1, max_size=40))
def test_logits_equal_transformers(model, tokens):
    if model.qk_norm:
        model = tiny_model(**{**_changes(model), "qkv_bias": False})  # no such checkpoint
    check_equal(model, tokens)


def _changes(model: Model) -> dict[str, object]:
    return {field: getattr(model, field) for field in model.__struct_fields__}


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": 4, "kv_heads": 4},
        {"heads": 4, "kv_heads": 2},
        {"qkv_bias": True, "tie_embeddings": True},
        {"qk_norm": True, "head_dim": 32},
    ],
    ids=["llama", "mistral", "qwen2.5", "qwen3"],
)
def test_each_family_equals_its_transformers_class(changes):
    check_equal(tiny_model(layers=2, **changes), list(range(0, 200, 7)))


@settings(max_examples=60)
@given(rope=ropes(), head_dim=st.sampled_from([8, 64, 128]))
def test_rotary_frequencies_equal_transformers(rope, head_dim):
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=1 << 20,
        rope_parameters=rope_parameters(rope),
    )
    if rope.scaling is None:
        power = torch.arange(0, head_dim, 2).float() / head_dim
        expected, factor = 1 / rope.theta**power, 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[rope.scaling.kind](config, "cpu")
    ours = torch.tensor(inverse_frequencies(rope, head_dim))
    # they compute in fp32: the exponent is off by 2^-25 at most, which ln(1e6) turns into 7 units,
    # and a handful of roundings follow, with cancellation in the blended range of at most 4
    torch.testing.assert_close(ours, expected, rtol=32 * 2**-24, atol=0)
    assert attention_factor(rope) == pytest.approx(factor, rel=1e-12)


def test_unscaled_long_positions_stay_within_one_unit_of_the_angle():
    """Frequencies are rounded once from double precision, so no angle is off by more than 2^-24."""
    ours = torch.tensor(inverse_frequencies(Rope(theta=5e5), 128)).double()
    exact = torch.tensor([5e5 ** (-pair / 64) for pair in range(64)], dtype=torch.float64)
    assert ((ours - exact).abs() <= exact * 2**-24).all()


def test_yarn_keeps_fast_waves_and_stretches_slow_ones():
    plain = inverse_frequencies(Rope(theta=1e4), 128)
    scaling = RopeScaling(kind="yarn", factor=8.0, original_context_tokens=4096)
    scaled = inverse_frequencies(Rope(theta=1e4, scaling=scaling), 128)
    assert scaled[0] == plain[0]
    assert scaled[-1] == pytest.approx(plain[-1] / 8)


def test_an_unknown_family_names_the_known_ones():

    with pytest.raises(UnknownName, match="llama"):
        load_model("lama")

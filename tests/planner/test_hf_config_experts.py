"""Reading config.json of models with experts or latent attention, as planned only."""

import json
from typing import Any

import pytest

from planner.catalog import load_model
from planner.hf_config import read_config
from plans.errors import InvalidFile
from plans.model import Model


@pytest.fixture
def read(tmp_path):
    """Reads a configuration, with fields replaced; `...` takes a field away."""

    def call(content: dict[str, Any], *, name="model", **changed) -> Model:
        merged = {key: value for key, value in (content | changed).items() if value is not ...}
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(merged))
        return read_config(folder)

    return call


# As published on the Hugging Face Hub, without fields that say nothing about shapes.
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


@pytest.mark.parametrize(
    ("content", "name"),
    [(MIXTRAL, "mixtral-8x7b"), (QWEN3_MOE, "qwen3-30b-a3b"), (DEEPSEEK_V3, "deepseek-v3")],
)
def test_experts_and_latent_attention_are_read_as_the_catalog_has_them(read, content, name):
    assert read(content, name=name) == load_model(name)


@pytest.mark.parametrize(
    ("content", "changed", "path", "rule"),
    [
        (QWEN3_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step", "only 1"),
        (QWEN3_MOE, {"mlp_only_layers": [3]}, "mlp_only_layers", "only an empty list"),
        (MIXTRAL, {"num_local_experts": ...}, "num_local_experts", "is missing"),
        (DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq", "only 1"),
        (DEEPSEEK_V3, {"first_k_dense_replace": "3"}, "first_k_dense_replace", "whole number"),
        (DEEPSEEK_V3, {"num_key_value_heads": 64}, "num_key_value_heads", "must equal the 128"),
        (DEEPSEEK_V3, {"quantization_config": {"quant_method": "awq"}}, "quantization_config",
         "nearest: bf16"),
        (MIXTRAL, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config",
         "nearest: bf16"),
    ],
)  # fmt: skip
def test_what_changes_the_shape_of_experts_is_refused(read, content, changed, path, rule):
    with pytest.raises(InvalidFile, match=rule) as caught:
        read(content, **changed)
    assert caught.value.path == path

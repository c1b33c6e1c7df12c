"""config.json of Hugging Face checkpoints: what is read, and that what is unsupported is named."""

import json
from typing import Any

import pytest

from planner.catalog import load_model
from planner.hf_config import read_config
from plans.errors import InvalidFile
from plans.model import Model, Rope, RopeScaling

# As published by meta-llama/Llama-3.1-8B, in the spelling of transformers 4.
LLAMA31 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL = {
    "hidden_act": "silu",
    "hidden_size": 5120,
    "head_dim": 128,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "vocab_size": 131072,
}
QWEN2 = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3 = {
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED = {
    "llama3.1-8b": LLAMA31,
    "mistral-nemo-12b": MISTRAL,
    "qwen2.5-7b": QWEN2,
    "qwen3-0.6b": QWEN3,
}


@pytest.fixture
def read(tmp_path):
    """Reads a configuration, with fields replaced; `...` takes a field away."""

    def call(content: dict[str, Any], *, name="model", context_tokens=None, **changed) -> Model:
        merged = {key: value for key, value in (content | changed).items() if value is not ...}
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(merged))
        return read_config(folder, context_tokens=context_tokens)

    return call


# --- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_model_of_the_catalog(read, name):
    assert read(PUBLISHED[name], name=name) == load_model(name)


@pytest.mark.parametrize(
    ("kind", "biased", "normed"),
    [
        ("Llama", False, False),
        ("Mistral", False, False),
        ("Qwen2", True, False),
        ("Qwen3", False, True),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_writes_is_read(tmp_path, kind, biased, normed, tied):
    transformers = pytest.importorskip("transformers")
    extra: dict[str, Any] = {"sliding_window": None} if kind == "Mistral" else {}
    written = getattr(transformers, f"{kind}Config")(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0,
                         "original_max_position_embeddings": 4096},
        tie_word_embeddings=tied,
        dtype="float16",
        architectures=[f"{kind}ForCausalLM"],
        **extra,
    )  # fmt: skip
    written.save_pretrained(tmp_path)
    assert read_config(tmp_path) == Model(
        family="llama",
        name=tmp_path.name,
        layers=2,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=32,
        ffn=96,
        vocab=128,
        norm_eps=1e-5,
        qkv_bias=biased,
        qk_norm=normed,
        tie_embeddings=tied,
        weight_dtype="fp16",
        context_limit=8192,
        rope=Rope(
            theta=1e6,
            scaling=RopeScaling(kind="yarn", factor=2.0, original_context_tokens=4096),
        ),
    )


def test_transformers_writes_the_count_of_parameters_that_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for kind in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        with torch.device("meta"):
            extra = {"sliding_window": None} if kind == "Mistral" else {}
            config = getattr(transformers, f"{kind}Config")(
                vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, head_dim=16, **extra,
            )  # fmt: skip
            reference = transformers.AutoModelForCausalLM.from_config(config)
        config.save_pretrained(tmp_path)
        counted = sum(each.numel() for each in reference.parameters())
        assert read_config(tmp_path).parameters == counted, kind


def test_both_spellings_of_the_rotary_settings_mean_the_same(read):
    scaling = LLAMA31["rope_scaling"]
    modern = {**scaling, "rope_theta": 500000.0}
    moved = read(LLAMA31, rope_scaling=..., rope_theta=..., rope_parameters=modern)
    old = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    assert moved == read(LLAMA31) == read(LLAMA31, rope_scaling=old)


def test_missing_fields_have_the_defaults_of_transformers(read):
    bare = read(
        LLAMA31, num_key_value_heads=..., rope_theta=..., rope_scaling=..., rms_norm_eps=...,
        torch_dtype=..., tie_word_embeddings=...,
    )  # fmt: skip
    assert bare.kv_heads == bare.heads
    assert bare.rope == Rope(theta=10000.0)
    assert bare.norm_eps == 1e-6
    assert bare.weight_dtype == "fp32"
    assert not bare.tie_embeddings


@pytest.mark.parametrize("head_dim", [None, ...])
def test_head_size_defaults_to_hidden_over_heads(read, head_dim):
    assert read(LLAMA31, head_dim=head_dim).head_dim == 128
    assert read(QWEN2, head_dim=head_dim).head_dim == 128
    assert read(QWEN3, head_dim=head_dim).head_dim == 128  # 1024 / 16 would be 64


def test_linear_and_yarn_stretch_the_limit_and_llama3_includes_it(read):
    linear = read(QWEN2, rope_scaling={"type": "linear", "factor": 2.0})
    yarn = read(
        QWEN2,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    )
    assert linear.context_limit == 65536
    assert yarn.context_limit == 131072
    assert yarn.rope.scaling == RopeScaling(kind="yarn", factor=4.0, original_context_tokens=32768)
    assert read(LLAMA31).context_limit == 131072


@pytest.mark.parametrize("torch_dtype", [{"dtype": "float32"}, {"torch_dtype": "float32"}])
def test_both_spellings_of_the_dtype_are_read(read, torch_dtype):
    assert read(LLAMA31 | {"torch_dtype": ...} | torch_dtype).weight_dtype == "fp32"


# --- sliding windows ----------------------------------------------------------------------------

WINDOWED = {
    "mistral": MISTRAL | {"sliding_window": 4096},
    "mistral by default": {key: MISTRAL[key] for key in MISTRAL if key != "sliding_window"},
    "qwen2": QWEN2 | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 20},
    "qwen3, newer spelling": QWEN3
    | {"sliding_window": 4096, "layer_types": ["full_attention", "sliding_attention"] * 14},
}


@pytest.mark.parametrize("content", WINDOWED.values(), ids=WINDOWED)
def test_a_window_is_refused_beyond_it_and_exact_inside_it(read, content):
    for asked in (None, 4097):
        with pytest.raises(InvalidFile, match="at most 4096 tokens") as caught:
            read(content, context_tokens=asked)
        assert caught.value.path == "sliding_window"
    assert read(content, context_tokens=4096).context_limit == 4096


@pytest.mark.parametrize(
    "content",
    [
        QWEN2 | {"use_sliding_window": False, "sliding_window": 4096},
        QWEN2 | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28},
        QWEN2 | {"use_sliding_window": True, "max_window_layers": 0},  # as long as the limit
        QWEN3 | {"sliding_window": 4096, "layer_types": ["full_attention"] * 28},
        MISTRAL | {"sliding_window": 131072},
    ],
)
def test_a_window_that_cuts_nothing_changes_nothing(read, content):
    assert read(content).context_limit == content["max_position_embeddings"]


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "changed", "path", "rule"),
    [
        (LLAMA31, {"model_type": "gpt2"}, "model_type",
         "supported: deepseek_v3, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe"),
        (LLAMA31, {"model_type": ...}, "model_type", "supported: deepseek_v3, llama"),
        (LLAMA31, {"architectures": ["LlamaModel"]}, "architectures", "no language model head"),
        (LLAMA31, {"hidden_act": "gelu"}, "hidden_act", "supported: silu"),
        (LLAMA31, {"attention_bias": True}, "attention_bias", "true is not supported"),
        (QWEN3, {"attention_bias": True}, "attention_bias", "true is not supported"),
        (LLAMA31, {"mlp_bias": True}, "mlp_bias", "true is not supported"),
        (LLAMA31, {"mlp_bias": "no"}, "mlp_bias", "neither true nor false"),
        (LLAMA31, {"quantization_config": {"bits": 4}}, "quantization_config", "nearest: bf16"),
        (LLAMA31, {"torch_dtype": "float8_e4m3fn"}, "torch_dtype", "supported: bfloat16"),
        (LLAMA31, {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "only 1"),
        (QWEN2, {"use_mrope": True}, "use_mrope", "true is not supported"),
        (LLAMA31, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type",
         "supported: default, linear, llama3, yarn"),
        (LLAMA31, {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type",
         "supported: default"),
        (LLAMA31, {"rope_scaling": {"factor": 2.0}}, "rope_scaling.rope_type", "is missing"),
        (LLAMA31, {"rope_scaling": "linear"}, "rope_scaling", "must hold an object"),
        (LLAMA31, {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor", "is missing"),
        (LLAMA31, {"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor",
         "0.5 is not from 1 to"),
        (LLAMA31, {"rope_scaling": {"type": "linear", "factor": 1e308}}, "rope_scaling.factor",
         "not from 1 to"),
        (LLAMA31, {"architectures": 5}, "architectures", "5 is not a list"),
        (QWEN2, {"layer_types": [["full_attention"]]}, "layer_types", "supported are"),
        (LLAMA31, {"rope_scaling": {"type": "llama3", "factor": 8.0}},
         "rope_scaling.original_max_position_embeddings", "is missing"),
        (LLAMA31, {"rope_scaling": LLAMA31["rope_scaling"] | {"high_freq_factor": 1.0}},
         "rope_scaling.high_freq_factor", "must exceed"),
        (QWEN2, {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.0}},
         "rope_scaling.attention_factor", "is not supported"),
        (QWEN2, {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}},
         "rope_scaling.truncate", "false is not supported"),
        (LLAMA31, {"rope_parameters": {"partial_rotary_factor": 0.5}},
         "rope_parameters.partial_rotary_factor", "only 1"),
        (LLAMA31, {"num_key_value_heads": 5}, "num_key_value_heads", "does not divide 32"),
        (QWEN2, {"num_key_value_heads": ...}, "num_key_value_heads", "is missing"),
        (LLAMA31, {"hidden_size": ...}, "hidden_size", "is missing"),
        (LLAMA31, {"hidden_size": 4000, "num_attention_heads": 24}, "hidden_size", "give head_dim"),
        (LLAMA31, {"hidden_size": "4096"}, "hidden_size", "not a whole number"),
        (LLAMA31, {"hidden_size": True}, "hidden_size", "not a whole number"),
        (LLAMA31, {"num_hidden_layers": 0}, "num_hidden_layers", "at least 1"),
        (LLAMA31, {"rms_norm_eps": -1.0}, "rms_norm_eps", "not a number above 0"),
        (LLAMA31, {"rope_theta": float("inf")}, "rope_theta", "not a number above 0"),
        (LLAMA31, {"head_dim": 33}, "head_dim", "is odd"),
        (QWEN3, {"layer_types": ["chunked_attention"] * 28}, "layer_types", "supported"),
    ],
)  # fmt: skip
def test_what_would_change_the_numbers_is_refused(read, content, changed, path, rule):
    with pytest.raises(InvalidFile, match=rule) as caught:
        read(content | changed)
    assert caught.value.path == path
    assert caught.value.where.endswith("config.json")


def test_a_file_that_is_no_object_is_refused(tmp_path):
    path = tmp_path / "config.json"
    for text, rule in (("{", "not readable JSON"), ("[1]", "one JSON object"), ("\xff", "JSON")):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(InvalidFile, match=rule):
            read_config(tmp_path)

"""Reads the config.json of a Hugging Face checkpoint as a Model, or says what is unsupported.

Nothing is guessed: a field that changes the numbers and that Model cannot say is an InvalidFile.
A missing field has the default that transformers gives it. Both spellings of the rotary settings
are read: `rope_theta` with `rope_scaling`, and the `rope_parameters` of transformers 5.
"""

import json
from math import inf
from pathlib import Path
from typing import Any, NoReturn

from plans.errors import InvalidFile
from plans.model import Dtype, Experts, Latent, Model, Rope, RopeScaling

FAMILIES = {  # one file of codegen/models serves the dense ones; the others are planned only
    "deepseek_v3": "deepseek_v3",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "mixtral",
    "qwen2": "llama",
    "qwen3": "llama",
    "qwen3_moe": "qwen3_moe",
}
MODEL_TYPES = tuple(FAMILIES)
DTYPES: dict[str, Dtype] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
SCALINGS = ("default", "linear", "llama3", "yarn")
DEFAULT_THETA = 10000.0
DEFAULT_NORM_EPS = 1e-6
QWEN3_HEAD_DIM = 128
MISTRAL_WINDOW = 4096
MOST_FACTOR = 1e6
"""Of RoPE scaling; beyond any use, and it keeps the context limit a sane number."""


def read_config(folder: Path, *, context_tokens: int | None = None) -> Model:
    """Model of a checkpoint folder, named after the folder.

    context_tokens  longest context asked for; a model with a sliding window is exact up to its
                    window and is refused beyond it, or when nothing is asked for
    raises          InvalidFile with the field and the rule
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidFile(str(folder), "", "has no config.json") from None
    except (OSError, RecursionError, ValueError) as error:
        raise InvalidFile(str(path), "", f"is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise InvalidFile(str(path), "", "must hold one JSON object")
    fields = _Fields(str(path), content)
    model_type = fields.choice("model_type", MODEL_TYPES)
    _refuse_unsupported(fields, model_type)
    heads = fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", default=heads if model_type == "llama" else None)
    if heads % kv_heads:
        fields.fail("num_key_value_heads", f"{kv_heads} does not divide {heads} attention heads")
    rope, limit = _rope(fields, latent=model_type == "deepseek_v3")
    experts = _experts(fields, model_type)
    latent = _latent(fields, heads) if model_type == "deepseek_v3" else None
    return Model(
        family=FAMILIES[model_type],
        name=folder.resolve().name,
        layers=fields.count("num_hidden_layers"),
        hidden=fields.count("hidden_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=latent.nope_dim + latent.rope_dim
        if latent
        else _head_dim(fields, model_type, heads),
        ffn=fields.count("intermediate_size"),
        vocab=fields.count("vocab_size"),
        norm_eps=fields.positive("rms_norm_eps", default=DEFAULT_NORM_EPS),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type in {"qwen3", "qwen3_moe"},
        tie_embeddings=fields.flag("tie_word_embeddings"),
        weight_dtype=_dtype(fields),
        context_limit=_context_limit(fields, model_type, limit, context_tokens),
        rope=rope,
        experts=experts,
        latent=latent,
    )


def _experts(fields: "_Fields", model_type: str) -> Experts | None:
    """The mixture of experts of the types that have one."""
    if model_type == "mixtral":
        return Experts(
            count=fields.count("num_local_experts"),
            per_token=fields.count("num_experts_per_tok"),
            ffn=fields.count("intermediate_size"),
        )
    if model_type == "qwen3_moe":
        if fields.count("decoder_sparse_step", default=1) != 1:
            fields.fail("decoder_sparse_step", "only 1 is supported: experts in every layer")
        if fields.get("mlp_only_layers"):
            fields.fail("mlp_only_layers", "only an empty list is supported")
        return Experts(
            count=fields.count("num_experts"),
            per_token=fields.count("num_experts_per_tok"),
            ffn=fields.count("moe_intermediate_size"),
        )
    if model_type == "deepseek_v3":
        if fields.count("moe_layer_freq", default=1) != 1:
            fields.fail("moe_layer_freq", "only 1 is supported: experts in every later layer")
        width = fields.count("moe_intermediate_size")
        dense = fields.get("first_k_dense_replace")
        if not isinstance(dense, int) or isinstance(dense, bool) or dense < 0:
            fields.fail("first_k_dense_replace", f"{dense!r} is not a whole number of layers")
        return Experts(
            count=fields.count("n_routed_experts"),
            per_token=fields.count("num_experts_per_tok"),
            ffn=width,
            shared_ffn=fields.count("n_shared_experts") * width,
            dense_layers=dense,
        )
    return None


def _latent(fields: "_Fields", heads: int) -> Latent:
    """Multi-head latent attention."""
    if fields.count("num_key_value_heads", default=heads) != heads:
        fields.fail("num_key_value_heads", f"must equal the {heads} heads of latent attention")
    ranked = fields.get("q_lora_rank") is not None
    return Latent(
        q_rank=fields.count("q_lora_rank") if ranked else None,
        kv_rank=fields.count("kv_lora_rank"),
        rope_dim=fields.count("qk_rope_head_dim"),
        nope_dim=fields.count("qk_nope_head_dim"),
        value_dim=fields.count("v_head_dim"),
    )


class _Fields:
    """Typed access to a JSON object, with errors that name the file and the field."""

    def __init__(self, where: str, content: dict[str, Any], prefix: str = "") -> None:
        """Fields of `content`, which stands at `prefix` in the file `where`."""
        self.where = where
        self.content = content
        self.prefix = prefix

    def fail(self, field: str, problem: str) -> NoReturn:
        """Raises InvalidFile."""
        raise InvalidFile(self.where, self.prefix + field, problem)

    def get(self, field: str) -> Any:  # JSON
        """Value of a field; null and missing are alike."""
        return self.content.get(field)

    def count(self, field: str, *, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = default if self.get(field) is None else self.get(field)
        if value is None:
            self.fail(field, "is missing; a whole number is needed")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(field, f"{value!r} is not a whole number of at least 1")
        return value

    def positive(self, field: str, *, default: float | None = None) -> float:
        """A finite number above 0."""
        value = default if self.get(field) is None else self.get(field)
        if value is None:
            self.fail(field, "is missing; a number is needed")
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < inf:
            self.fail(field, f"{value!r} is not a number above 0")
        return float(value)

    def flag(self, field: str) -> bool:
        """True or false; false where it is missing."""
        value = self.get(field)
        if value is not None and not isinstance(value, bool):
            self.fail(field, f"{value!r} is neither true nor false")
        return bool(value)

    def choice(self, field: str, known: tuple[str, ...]) -> str:
        """One of some texts."""
        value = self.get(field)
        if value not in known:
            self.fail(field, f"{value!r} is not supported; supported: {', '.join(known)}")
        return str(value)

    def inside(self, field: str) -> "_Fields":
        """The object that a field holds; empty where it is missing."""
        value = self.get(field)
        if value is not None and not isinstance(value, dict):
            self.fail(field, "must hold an object")
        return _Fields(self.where, value or {}, f"{self.prefix}{field}.")


def _refuse_unsupported(fields: _Fields, model_type: str) -> None:
    """Raises InvalidFile for what changes the numbers and cannot be said by Model."""
    named = fields.get("architectures") or []
    if not isinstance(named, list):
        fields.fail("architectures", f"{named!r} is not a list")
    if named and not any(str(name).endswith("ForCausalLM") for name in named):
        fields.fail("architectures", f"{named!r} has no language model head; ...ForCausalLM has")
    quantised = fields.get("quantization_config")
    native = model_type == "deepseek_v3" and isinstance(quantised, dict)
    if quantised is not None and not (native and quantised.get("quant_method") == "fp8"):
        fields.fail("quantization_config", "quantised checkpoints are not supported; nearest: bf16")
    activation = fields.get("hidden_act")
    if activation not in (None, "silu"):
        fields.fail("hidden_act", f"{activation!r} is not supported; supported: silu")
    biases = ("mlp_bias",) if model_type == "qwen2" else ("attention_bias", "mlp_bias")
    for bias in biases:  # qwen2 has its q, k and v biases whatever attention_bias says
        if fields.flag(bias):
            fields.fail(bias, "true is not supported: it also biases the output projections")
    if fields.flag("use_mrope"):
        fields.fail("use_mrope", "true is not supported: positions have one axis here")


def _dtype(fields: _Fields) -> Dtype:
    """Dtype of the weights; fp32 where neither spelling is given, as in torch."""
    if fields.get("quantization_config") is not None:
        return "fp8"  # the only one that is let through
    field = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    if fields.get(field) is None:
        return "fp32"
    return DTYPES[fields.choice(field, tuple(DTYPES))]


def _head_dim(fields: _Fields, model_type: str, heads: int) -> int:
    """Head size: given, or hidden over heads (128 for qwen3)."""
    hidden = fields.count("hidden_size")
    qwen3 = model_type in {"qwen3", "qwen3_moe"}
    if fields.get("head_dim") is None and not qwen3 and hidden % heads:
        fields.fail("hidden_size", f"{hidden} is no multiple of {heads} heads; give head_dim")
    default = QWEN3_HEAD_DIM if qwen3 else hidden // heads
    head_dim = fields.count("head_dim", default=default)
    if head_dim % 2:
        fields.fail("head_dim", f"{head_dim} is odd; rotary embeddings turn pairs")
    return head_dim


def _rope(fields: _Fields, *, latent: bool = False) -> tuple[Rope, int]:
    """Rotary settings, and the context limit with their scaling.

    latent  yarn comes with its own factors on the scores, which planning does not need
    """
    limit = fields.count("max_position_embeddings")
    modern = fields.get("rope_parameters") is not None
    settings = fields.inside("rope_parameters" if modern else "rope_scaling")
    holders = (settings, fields) if modern else (fields, settings)
    theta = next(
        (each.positive("rope_theta") for each in holders if each.get("rope_theta") is not None),
        DEFAULT_THETA,
    )
    for each in holders:
        if each.positive("partial_rotary_factor", default=1.0) != 1.0:
            each.fail("partial_rotary_factor", "only 1 is supported: the whole head turns")
    kind_field = "rope_type" if settings.get("rope_type") is not None else "type"
    if settings.get(kind_field) is None:
        if set(settings.content) - {"rope_theta", "partial_rotary_factor"}:
            settings.fail("rope_type", f"is missing; supported: {', '.join(SCALINGS)}")
        return Rope(theta=theta), limit
    kind = settings.choice(kind_field, SCALINGS)
    if kind == "default":
        return Rope(theta=theta), limit
    if latent:
        plain = {key: value for key, value in settings.content.items() if "mscale" not in key}
        settings = _Fields(settings.where, plain, settings.prefix)
    return _scaled_rope(settings, kind, theta=theta, limit=limit)


def _scaled_rope(settings: _Fields, kind: str, *, theta: float, limit: int) -> tuple[Rope, int]:
    """Rotary settings of one of the scalings.

    max_position_embeddings includes the scaling of llama3 only; linear and yarn multiply it.
    """
    for field in ("attention_factor", "mscale", "mscale_all_dim"):
        if settings.get(field) is not None:
            settings.fail(field, "is not supported: yarn's own 0.1 ln(factor) + 1 is used")
    if settings.get("truncate") is False:
        settings.fail("truncate", "false is not supported; supported: true")
    factor = settings.positive("factor")
    if not 1 <= factor <= MOST_FACTOR:
        settings.fail("factor", f"{factor:g} is not from 1 to {MOST_FACTOR:g}")
    original_field = "original_max_position_embeddings"
    if kind == "linear":
        scaling = RopeScaling(kind="linear", factor=factor, original_context_tokens=limit)
        return Rope(theta=theta, scaling=scaling), int(limit * factor)
    if kind == "llama3":
        scaling = RopeScaling(
            kind="llama3",
            factor=factor,
            original_context_tokens=settings.count(original_field),
            low_freq_factor=settings.positive("low_freq_factor"),
            high_freq_factor=settings.positive("high_freq_factor"),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            settings.fail("high_freq_factor", "must exceed low_freq_factor")
        return Rope(theta=theta, scaling=scaling), limit
    original = settings.count(original_field, default=limit)
    scaling = RopeScaling(
        kind="yarn",
        factor=factor,
        original_context_tokens=original,
        beta_fast=settings.positive("beta_fast", default=32.0),
        beta_slow=settings.positive("beta_slow", default=1.0),
    )
    return Rope(theta=theta, scaling=scaling), int(original * factor)


def _context_limit(fields: _Fields, model_type: str, limit: int, asked: int | None) -> int:
    """The limit, cut to a sliding window that is active and covers the context asked for."""
    window = _window(fields, model_type)
    if window is None or window >= limit:
        return limit
    if asked is None or asked > window:
        wanted = f"{limit if asked is None else asked} tokens of context"
        fields.fail(
            "sliding_window",
            f"attention is cut at {window} tokens, and {wanted} are asked for; sliding windows are"
            f" not supported; nearest: a context of at most {window} tokens",
        )
    return window


def _window(fields: _Fields, model_type: str) -> int | None:
    """Tokens that the narrowest layer attends to, or None where all layers see everything."""
    kinds = fields.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
            fields.fail("layer_types", f"{kinds!r}: supported are full and sliding attention")
        return fields.count("sliding_window") if "sliding_attention" in kinds else None
    if model_type == "mistral":
        # transformers reads null as no window, and a missing field as the window of v0.1
        if "sliding_window" not in fields.content:
            return MISTRAL_WINDOW
        return None if fields.get("sliding_window") is None else fields.count("sliding_window")
    if not fields.flag("use_sliding_window"):
        return None
    whole = fields.get("max_window_layers")  # the first layers that attend to everything
    if isinstance(whole, int) and whole >= fields.count("num_hidden_layers"):
        return None
    return fields.count("sliding_window")

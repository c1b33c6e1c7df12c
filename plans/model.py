"""What a model is: shapes, dtypes and position encoding; bytes and FLOPs as properties.

Shape letters as in plans/ops.py: D hidden, N query heads, K KV heads, H head size, F ffn, V vocab.
"""

from collections.abc import Callable
from typing import Annotated, Literal

from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=1)]
Dtype = Literal["fp32", "bf16", "fp16", "fp8"]
DTYPE_BYTES: dict[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1}


class RopeScaling(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How rotary frequencies are stretched beyond the length the base frequencies were trained for.

    Formulas: `linear` and `yarn` as in arXiv 2309.00071, `llama3` as published with Llama 3.1.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: Annotated[float, Meta(ge=1)]
    """Context after scaling over context before."""
    original_context_tokens: Count
    """Context limit before scaling."""
    low_freq_factor: float = 1.0
    """llama3 only."""
    high_freq_factor: float = 4.0
    """llama3 only."""
    beta_fast: float = 32.0
    """yarn only."""
    beta_slow: float = 1.0
    """yarn only."""
    assumed: bool = False
    """True where the planner chose it to reach the context asked for: the checkpoint was not
    trained with it, so the quality beyond the trained limit is unknown."""


class Rope(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rotary position embedding over the whole head, halves rotated (NeoX layout)."""

    theta: Annotated[float, Meta(gt=0)]
    scaling: RopeScaling | None = None


class Experts(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mixture of experts in place of the MLP: each token goes to a few of many gated MLPs."""

    count: Count
    """Experts of a layer that tokens are routed to."""
    per_token: Count
    """Experts that one token visits."""
    ffn: Count
    """Width of one expert."""
    shared_ffn: Annotated[int, Meta(ge=0)] = 0
    """Width of the experts that every token visits, all together."""
    dense_layers: Annotated[int, Meta(ge=0)] = 0
    """First layers that have a plain MLP of width `Model.ffn` instead."""

    def visited(self, tokens: float) -> float:
        """Expected number of experts that `tokens` tokens visit, were routing uniform."""
        missed: float = (1 - self.per_token / self.count) ** tokens
        return self.count * (1 - missed)


class Latent(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Multi-head latent attention (arXiv 2405.04434): one compressed vector a token is the KV."""

    q_rank: Count | None = None
    """Width of the compressed query; None where queries are projected directly."""
    kv_rank: Count
    """Width of the compressed key and value."""
    rope_dim: Count
    """Further width of the key, shared by all heads, that carries the position."""
    nope_dim: Count
    """Width of a head's query and key without position; Model.head_dim is nope_dim + rope_dim."""
    value_dim: Count
    """Width of a head's value."""


class Model(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A decoder-only transformer with a gated SiLU MLP or experts, and grouped-query attention.

    With `latent`, kv_heads equals heads and the cache holds the compressed vector instead.
    """

    family: str
    """Which file of codegen/models defines it; also fixes the checkpoint's tensor names."""
    name: str
    layers: Count
    hidden: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    ffn: Count
    """Width of the MLP; with experts, of the layers that have none."""
    vocab: Count
    norm_eps: Annotated[float, Meta(gt=0)] = 1e-5
    qkv_bias: bool = False
    """Bias on the q, k and v projections (Qwen2.5)."""
    qk_norm: bool = False
    """RMSNorm over each head of q and k before RoPE (Qwen3)."""
    tie_embeddings: bool = False
    """The head reads the embedding matrix."""
    weight_dtype: Dtype = "bf16"
    context_limit: Count
    """Longest context of the checkpoint as published, in tokens, its own RoPE scaling included."""
    rope: Rope
    experts: Experts | None = None
    latent: Latent | None = None

    @property
    def unsupported(self) -> tuple[str, ...]:
        """What a plan can be made for and no program can be emitted for yet."""
        return self.unsupported_with(self.weight_dtype)

    def unsupported_with(self, weight_dtype: str) -> tuple[str, ...]:
        """The same with weights in another dtype."""
        names = {
            "mixture of experts": self.experts is not None,
            "latent attention": self.latent is not None,
            "fp8 weights": weight_dtype == "fp8",
        }
        return tuple(name for name, used in names.items() if used)

    @property
    def plain_dtype(self) -> Dtype:
        """Of the activations, and of embedding, head, norms and biases.

        Checkpoints in fp8 hold the matrices of the layers in it and the rest in bf16.
        """
        return "bf16" if self.weight_dtype == "fp8" else self.weight_dtype

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    @property
    def dense_layers(self) -> int:
        """Layers with a plain MLP."""
        return self.layers if self.experts is None else min(self.experts.dense_layers, self.layers)

    def attention_parameters(self, tp: int = 1) -> int:
        """Parameters of one layer's attention products on one of tp ranks.

        Above tp = kv_heads each rank keeps one whole KV head; latent vectors are made on each rank.
        """
        heads = self.heads // tp
        if self.latent is None:
            kv_heads = max(self.kv_heads // tp, 1)
            return (2 * heads + 2 * kv_heads) * self.head_dim * self.hidden
        latent = self.latent
        query = heads * (latent.nope_dim + latent.rope_dim)
        query *= self.hidden if latent.q_rank is None else latent.q_rank
        query += self.hidden * (latent.q_rank or 0)
        down = self.hidden * (latent.kv_rank + latent.rope_dim)
        up = latent.kv_rank * heads * (latent.nope_dim + latent.value_dim)
        return query + down + up + heads * latent.value_dim * self.hidden

    def mlp_parameters(self, layer: int, tp: int = 1) -> int:
        """Parameters of a layer's MLP, or of its experts and their router, on one of tp ranks."""
        if self.experts is None or layer < self.experts.dense_layers:
            return 3 * self.hidden * self.ffn // tp
        width = self.experts.count * self.experts.ffn + self.experts.shared_ffn
        return 3 * self.hidden * width // tp + self.experts.count * self.hidden

    def active_mlp_parameters(self, layer: int, tp: int = 1) -> int:
        """The same, only what one token is multiplied with."""
        if self.experts is None or layer < self.experts.dense_layers:
            return self.mlp_parameters(layer, tp)
        width = self.experts.per_token * self.experts.ffn + self.experts.shared_ffn
        return 3 * self.hidden * width // tp + self.experts.count * self.hidden

    @property
    def layer_matmul_parameters(self) -> int:
        """Parameters of one layer's matrix products; with experts the mean over the layers."""
        return self._mean_mlp(self.mlp_parameters) + self.attention_parameters()

    @property
    def active_layer_parameters(self) -> int:
        """The same, only what one token is multiplied with: FLOPs follow it."""
        return self._mean_mlp(self.active_mlp_parameters) + self.attention_parameters()

    def _mean_mlp(self, parameters: Callable[[int], int]) -> int:
        dense = self.dense_layers
        first, last = parameters(0), parameters(self.layers - 1)
        return (dense * first + (self.layers - dense) * last) // self.layers

    def other_layer_parameters(self, tp: int = 1) -> int:
        """Norms and biases of one layer on one of tp ranks; norms are on each."""
        kv_heads = max(self.kv_heads // tp, 1)
        biases = (self.heads // tp + 2 * kv_heads) * self.head_dim if self.qkv_bias else 0
        head_norms = 2 * self.head_dim if self.qk_norm else 0
        if self.latent is not None:
            head_norms += (self.latent.q_rank or 0) + self.latent.kv_rank
        return biases + head_norms + 2 * self.hidden

    def layer_parameters(self, layer: int = 0, tp: int = 1) -> int:
        """All parameters of one layer on one of tp ranks."""
        products = self.attention_parameters(tp) + self.mlp_parameters(layer, tp)
        return products + self.other_layer_parameters(tp)

    def stage_parameters(self, first: int, end: int, tp: int = 1) -> int:
        """Parameters of the layers [first, end) on one of tp ranks, without embedding and head."""
        dense = max(min(end, self.dense_layers) - first, 0)
        parameters = dense * self.layer_parameters(0, tp)
        return parameters + (end - first - dense) * self.layer_parameters(self.layers - 1, tp)

    def stage_bytes(self, first: int, end: int, tp: int = 1) -> int:
        """Bytes of the same."""
        others = (end - first) * self.other_layer_parameters(tp)
        products = self.stage_parameters(first, end, tp) - others
        return products * DTYPE_BYTES[self.weight_dtype] + others * DTYPE_BYTES[self.plain_dtype]

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding matrix; the head has as many unless it is tied."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        return self.stage_parameters(0, self.layers) + self._end_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that one token is multiplied with or reads, embedding and head included."""
        idle = sum(
            self.mlp_parameters(layer) - self.active_mlp_parameters(layer)
            for layer in range(self.layers)
        )
        return self.parameters - idle

    @property
    def weight_bytes(self) -> int:
        """Bytes of one copy of the weights."""
        ends = self._end_parameters * DTYPE_BYTES[self.plain_dtype]
        return self.stage_bytes(0, self.layers) + ends

    @property
    def _end_parameters(self) -> int:
        """Of embedding, last norm and head."""
        heads = 1 if self.tie_embeddings else 2
        return heads * self.embedding_parameters + self.hidden

    def rank_kv_elements(self, tp: int) -> int:
        """Numbers that one token keeps in one layer's cache on one of tp ranks."""
        if self.latent is not None:
            return self.latent.kv_rank + self.latent.rope_dim
        return 2 * max(self.kv_heads // tp, 1) * self.head_dim

    def rank_page_bytes(self, tp: int, page_tokens: int, kv_dtype: str) -> int:
        """Bytes of one layer's page on one of tp ranks.

        A page in fp8 has a scale in fp32 for K and for V of each KV head.
        """
        elements = page_tokens * self.rank_kv_elements(tp) * DTYPE_BYTES[kv_dtype]
        heads = 1 if self.latent is not None else max(self.kv_heads // tp, 1)
        return elements + (2 * heads * DTYPE_BYTES["fp32"] if kv_dtype == "fp8" else 0)

    def kv_bytes_per_token(self, kv_dtype: str) -> int:
        """Bytes of the cache of one token over all layers, unsharded."""
        return self.layers * self.rank_kv_elements(1) * DTYPE_BYTES[kv_dtype]

    @property
    def pair_flops(self) -> int:
        """FLOPs of one (query, key) pair in one head: scores, and the sum over values.

        With latent attention keys and values are taken as projected up, as prefills do.
        """
        value_dim = self.head_dim if self.latent is None else self.latent.value_dim
        return 2 * (self.head_dim + value_dim)

    def attention_flops(self, tokens: int, prefix_tokens: int) -> int:
        """FLOPs of causal attention of `tokens` queries behind `prefix_tokens` keys, all layers."""
        pairs = tokens * prefix_tokens + tokens * (tokens + 1) // 2
        return self.layers * self.heads * self.pair_flops * pairs

    def matmul_flops(self, tokens: int) -> int:
        """FLOPs of the layers' matrix products for `tokens` tokens, without the head."""
        return 2 * self.layers * self.active_layer_parameters * tokens

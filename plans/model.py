"""What a model is: shapes, dtypes and position encoding; bytes and FLOPs as properties.

Shape letters as in plans/ops.py: D hidden, N query heads, K KV heads, H head size, F ffn, V vocab.
"""

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


class Model(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A decoder-only transformer with grouped-query attention and a gated SiLU MLP."""

    family: str
    """Which file of codegen/models defines it; also fixes the checkpoint's tensor names."""
    name: str
    layers: Count
    hidden: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    ffn: Count
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

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    @property
    def layer_matmul_parameters(self) -> int:
        """Parameters of one layer's four matrix products."""
        qkv = self.hidden * (self.heads + 2 * self.kv_heads) * self.head_dim
        out = self.heads * self.head_dim * self.hidden
        return qkv + out + 3 * self.hidden * self.ffn

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer, norms and biases included."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        head_norms = 2 * self.head_dim if self.qk_norm else 0
        return self.layer_matmul_parameters + biases + head_norms + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding matrix; the head has as many unless it is tied."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        heads = 1 if self.tie_embeddings else 2
        return self.layers * self.layer_parameters + heads * self.embedding_parameters + self.hidden

    @property
    def weight_bytes(self) -> int:
        """Bytes of one copy of the weights."""
        return self.parameters * DTYPE_BYTES[self.weight_dtype]

    def kv_bytes_per_token(self, kv_dtype: str) -> int:
        """Bytes of K and V of one token over all layers, unsharded."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[kv_dtype]

    def attention_flops(self, tokens: int, prefix_tokens: int) -> int:
        """FLOPs of causal attention of `tokens` queries behind `prefix_tokens` keys, all layers."""
        pairs = tokens * prefix_tokens + tokens * (tokens + 1) // 2
        return 4 * self.layers * self.heads * self.head_dim * pairs

    def matmul_flops(self, tokens: int) -> int:
        """FLOPs of the layers' matrix products for `tokens` tokens, without the head."""
        return 2 * self.layers * self.layer_matmul_parameters * tokens

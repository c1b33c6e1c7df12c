"""Llama, Mistral, Qwen2.5 and Qwen3: decoder-only transformers that differ by configuration.

The executable truth: no parallelism, no cache. It runs as it stands, as the unchunked reference,
and capture.py traces it over the functional ops. Parameters have their Hugging Face names.

T tokens of one sequence, D hidden, N query heads, K KV heads, H head size, F ffn, V vocabulary.
"""

import torch
from torch import nn

from codegen.kernels.add.reference import add
from codegen.kernels.attention.reference import attention
from codegen.kernels.embedding.reference import embedding
from codegen.kernels.join_heads.reference import join_heads
from codegen.kernels.linear.reference import linear
from codegen.kernels.mul.reference import mul
from codegen.kernels.rms_norm.reference import rms_norm
from codegen.kernels.rope.reference import rope
from codegen.kernels.silu.reference import silu
from codegen.kernels.split_heads.reference import split_heads
from codegen.kernels.to_fp32.reference import to_fp32
from codegen.models.frequencies import attention_factor, inverse_frequencies
from plans.model import Model

for op in (
    *("add", "attention", "embedding", "join_heads", "linear", "mul", "rms_norm", "rope"),
    *("silu", "split_heads", "to_fp32"),
):
    torch.fx.wrap(op)  # the trace stops at the ops

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Projection(nn.Module):
    """A matrix, with a bias where the checkpoint has one."""

    def __init__(
        self, inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype)) if bias else None

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return linear(x_TD, self.weight, self.bias)


class Norm(nn.Module):
    """RMSNorm over the last dim."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, head_dim, bias = model.hidden, model.head_dim, model.qkv_bias
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.rope_scale = attention_factor(model.rope)
        self.q_proj = Projection(hidden, model.heads * head_dim, dtype, bias=bias)
        self.k_proj = Projection(hidden, model.kv_heads * head_dim, dtype, bias=bias)
        self.v_proj = Projection(hidden, model.kv_heads * head_dim, dtype, bias=bias)
        self.o_proj = Projection(model.heads * head_dim, hidden, dtype)
        self.q_norm = Norm(head_dim, model.norm_eps, dtype) if model.qk_norm else None
        self.k_norm = Norm(head_dim, model.norm_eps, dtype) if model.qk_norm else None

    def forward(
        self, x_TD: torch.Tensor, positions_T: torch.Tensor, inv_freq_H2: torch.Tensor
    ) -> torch.Tensor:
        q_TNH = split_heads(self.q_proj(x_TD), self.head_dim)
        k_TKH = split_heads(self.k_proj(x_TD), self.head_dim)
        v_TKH = split_heads(self.v_proj(x_TD), self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
        q_TNH = rope(q_TNH, positions_T, inv_freq_H2, self.rope_scale)
        k_TKH = rope(k_TKH, positions_T, inv_freq_H2, self.rope_scale)
        out_TNH = attention(q_TNH, k_TKH, v_TKH, self.scale)
        y_TD: torch.Tensor = self.o_proj(join_heads(out_TNH))
        return y_TD


class Mlp(nn.Module):
    """Feed-forward layer with a SiLU gate."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = Projection(model.hidden, model.ffn, dtype)
        self.up_proj = Projection(model.hidden, model.ffn, dtype)
        self.down_proj = Projection(model.ffn, model.hidden, dtype)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        y_TD: torch.Tensor = self.down_proj(mul(silu(self.gate_proj(x_TD)), self.up_proj(x_TD)))
        return y_TD


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = Norm(model.hidden, model.norm_eps, dtype)
        self.self_attn = Attention(model, dtype)
        self.post_attention_layernorm = Norm(model.hidden, model.norm_eps, dtype)
        self.mlp = Mlp(model, dtype)

    def forward(
        self, x_TD: torch.Tensor, positions_T: torch.Tensor, inv_freq_H2: torch.Tensor
    ) -> torch.Tensor:
        x_TD = add(self.self_attn(self.input_layernorm(x_TD), positions_T, inv_freq_H2), x_TD)
        return add(self.mlp(self.post_attention_layernorm(x_TD)), x_TD)


class Embedding(nn.Module):
    """One vector for each token of the vocabulary."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.vocab, model.hidden, dtype=dtype))

    def forward(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        return embedding(token_ids_T, self.weight)


class Decoder(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = Embedding(model, dtype)
        self.layers = nn.ModuleList(Layer(model, dtype) for _ in range(model.layers))
        self.norm = Norm(model.hidden, model.norm_eps, dtype)
        frequencies = torch.tensor(
            inverse_frequencies(model.rope, model.head_dim), dtype=torch.float32
        )
        self.register_buffer("inv_freq_H2", frequencies, persistent=False)

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        x_TD = self.embed_tokens(token_ids_T)
        for layer in self.layers:
            x_TD = layer(x_TD, positions_T, self.inv_freq_H2)
        normed_TD: torch.Tensor = self.norm(x_TD)
        return normed_TD


class Llama(nn.Module):
    """Decoder and language-model head."""

    def __init__(self, model: Model) -> None:
        """Makes the module with uninitialised weights on the current default device."""
        super().__init__()
        dtype = DTYPES[model.weight_dtype]
        self.model = Decoder(model, dtype)
        self.lm_head = (
            None if model.tie_embeddings else Projection(model.hidden, model.vocab, dtype)
        )

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """Logits of every token of one sequence that starts at its first token: fp32 [T, V]."""
        x_TD = self.model(token_ids_T, positions_T)
        if self.lm_head is None:
            return to_fp32(linear(x_TD, self.model.embed_tokens.weight, None))
        return to_fp32(self.lm_head(x_TD))

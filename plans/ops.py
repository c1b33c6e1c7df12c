"""The functional ops of a program, and the protocols through which it meets the runtime.

Names only, no torch: codegen binds each op to a kernel, the runtime implements the protocols.

Shape letters, used as suffixes everywhere (`q_TNH`):
T tokens of the step, S keys, N query heads, K KV heads, H head size, D hidden, F ffn, V vocab,
G KVP groups, B sequences of the step, P pages of a sequence (longest), R sampled rows.
Inside a tensor-parallel program N, K, F and V are this rank's share.
"""

from typing import Any, Protocol

from msgspec import Struct

Tensor = Any
"""A torch.Tensor; this package does not import torch."""


class Op(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Signature of one op: argument names with shape suffixes, results, and what it computes."""

    inputs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    """Further inputs, all given or none."""
    outputs: tuple[str, ...]
    computes: str


OPS: dict[str, Op] = {
    "add": Op(inputs=("a_TD", "b_TD"), outputs=("sum_TD",), computes="a + b"),
    "add_rms_norm": Op(
        inputs=("x_TD", "residual_TD", "weight_D", "eps"),
        outputs=("normed_TD", "sum_TD"),
        computes="sum = x + residual in their dtype; normed = rms_norm(sum)",
    ),
    "all_reduce": Op(inputs=("x_TD",), outputs=("sum_TD",), computes="sum over the tp ranks"),
    "all_reduce_add_rms_norm": Op(
        inputs=("x_TD", "residual_TD", "weight_D", "eps", "comm"),
        outputs=("normed_TD", "sum_TD"),
        computes="add_rms_norm of all_reduce(x) and residual; comm is the program's Comm",
    ),
    "all_gather": Op(
        inputs=("x_RV",), outputs=("x_RV",), computes="tp ranks' shares joined on the last dim"
    ),
    "attention": Op(
        inputs=("q_TNH", "k_TKH", "v_TKH", "scale"),
        outputs=("out_TNH",),
        computes="causal attention of one whole sequence; becomes kv_write + paged_attention",
    ),
    "embedding": Op(
        inputs=("token_ids_T", "weight_VD"), outputs=("x_TD",), computes="rows of the matrix"
    ),
    "embedding_share": Op(
        inputs=("token_ids_T", "weight_VD", "first_row"),
        outputs=("x_TD",),
        computes="rows of a rank's share of the matrix; 0 for ids of other ranks",
    ),
    "gate_up_silu": Op(
        inputs=("x_TD", "weight_F2D"),
        outputs=("x_TF",),
        computes="silu_mul of linear: the weight's first half of rows is gate, its second up",
    ),
    "join_heads": Op(inputs=("x_TNH",), outputs=("x_TO",), computes="heads side by side, a view"),
    "kv_write": Op(
        inputs=("k_TKH", "v_TKH", "k_pages", "v_pages", "slots_T"),
        optional=("k_scales_PK", "v_scales_PK"),
        outputs=("written",),
        computes="stores K and V at slots, page x page_tokens + offset; slot -1 stores nothing; "
        "pages in fp8 hold x / scale, and only they have scales",
    ),
    "kvp_merge": Op(
        inputs=("out_TNH", "lse_TN", "rows_S", "shares_GS", "places_3E", "received"),
        outputs=("out_TNH",),
        computes="the kvp groups' partial attention of shared rows joined in place; received holds "
        "the other groups' as kvp_pack lays them",
    ),
    "kvp_pack": Op(
        inputs=("out_TNH", "lse_TN", "rows_E", "places_3E"),
        outputs=("sent",),
        computes="partial attention of shared rows as bytes: for each peer outputs, then log sums",
    ),
    "linear": Op(
        inputs=("x_TD", "weight_OD", "bias_O"),
        outputs=("y_TO",),
        computes="x @ weight.T + bias, bias may be None",
    ),
    "merge": Op(
        inputs=("out_TNH", "lse_TN"),
        outputs=("out_TNH",),
        computes="the kvp groups' partial attention joined (design section 4)",
    ),
    "mul": Op(inputs=("a_TF", "b_TF"), outputs=("product_TF",), computes="a * b"),
    "paged_attention": Op(
        inputs=("q_TNH", "k_pages", "v_pages", "written", "inputs", "scale"),
        optional=("k_scales_PK", "v_scales_PK"),
        outputs=("out_TNH", "lse_TN"),
        computes="causal attention behind each sequence's prefix, keys from its pages; a sequence "
        "whose first slot is -1 brought no keys, so its queries see all kv_lens_B keys; "
        "no keys give out 0 and lse -inf",
    ),
    "qkv_rope_write": Op(
        inputs=(
            *("x_TD", "weight_OD", "bias_O", "q_norm_H", "k_norm_H", "eps", "cos_sin_T2H2"),
            *("k_pages", "v_pages", "slots_T"),
        ),
        optional=("k_scales_PK", "v_scales_PK"),
        outputs=("q_TNH", "written"),
        computes="linear to heads of queries, keys and values; rms_norm of the first two unless "
        "the norms are None; rope of them; kv_write of keys and values",
    ),
    "rms_norm": Op(
        inputs=("x_TD", "weight_D", "eps"),
        outputs=("normed_TD",),
        computes="x / sqrt(mean(x^2) + eps) in fp32, cast, times weight; last dim of any rank",
    ),
    "rope": Op(
        inputs=("x_TNH", "positions_T", "inv_freq_H2", "scale"),
        outputs=("x_TNH",),
        computes="rotation of halves by position x frequency in fp32, times the yarn scale",
    ),
    "rotary": Op(
        inputs=("positions_T", "inv_freq_H2", "scale"),
        outputs=("cos_sin_T2H2",),
        computes="cosines, then sines, of position x frequency in fp32, times the yarn scale",
    ),
    "sample": Op(
        inputs=("logits_RV", "controls_R5"),
        outputs=("drawn_2R",),
        computes="a token a row by (temperature, top_k, top_p, min_p, number in [0, 1)), as "
        "runtime/sampling.py draws; and 1 where the row's best logit is finite",
    ),
    "select_rows": Op(
        inputs=("x_TD", "rows_R"), outputs=("x_RD",), computes="rows whose logits are wanted"
    ),
    "silu": Op(inputs=("x_TF",), outputs=("y_TF",), computes="x * sigmoid(x)"),
    "silu_mul": Op(
        inputs=("gate_up_TF2",), outputs=("x_TF",), computes="silu(first half) * second half"
    ),
    "split": Op(
        inputs=("x_TO", "sizes"), outputs=("parts",), computes="views of the last dim, cut by sizes"
    ),
    "split_heads": Op(
        inputs=("x_TO", "head_dim"), outputs=("x_TNH",), computes="the last dim as heads, a view"
    ),
    "to_fp32": Op(inputs=("x_RV",), outputs=("x_RV",), computes="x in fp32"),
    "vocab_offset": Op(
        inputs=("share",), outputs=("first_row",), computes="first vocabulary row of this rank"
    ),
}
"""Sorted by name. A new op is one line here and one folder in codegen/kernels."""


class HostInputs(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The lengths of a step as the host knows them, so that no launch waits for the device."""

    query_starts: tuple[int, ...]
    """As query_starts_B1."""
    kv_lens: tuple[int, ...]
    """As kv_lens_B."""
    causal: tuple[bool, ...]
    """Of each sequence, whether its keys are written here: its first slot is not -1."""


class StepInputs(Protocol):
    """What one step of one stage reads besides weights and cache; all tensors on its device.

    Sequences of the step are packed: sequence b owns rows query_starts_B1[b] to [b + 1] of T.
    """

    token_ids_T: Tensor
    """int64; only stage 0 reads it."""
    hidden_TD: Tensor
    """The stage before's output; stage 0 has none."""
    positions_T: Tensor
    """int64, absolute position of each token in its request."""
    slots_T: Tensor
    """int64, where K and V of each token go: page x page_tokens + offset, or -1 (another group's).

    A sequence's tokens in a step are all this group's or all another's: chunks never cross a shard.
    """
    query_starts_B1: Tensor
    """int32, B + 1 row offsets."""
    kv_lens_B: Tensor
    """int32, keys of each sequence in this group's pages, with this step's own if written here."""
    page_table_BP: Tensor
    """int32, page numbers of each sequence; entries past its end are 0."""
    sample_rows_R: Tensor
    """int64, rows of T whose logits the last stage returns."""
    host: HostInputs | None
    """None where the host does not know them: whoever needs the lengths waits for the device."""
    recorded: bool
    """The launches of this step run again with other numbers in its tensors (a CUDA graph): none of
    them may depend on a number, `host` is None, every sequence has at most one token, and T == B.
    A sequence of no keys is padding: its row is any finite value."""
    results: tuple[Tensor, ...] | None
    """Where paged_attention leaves its results, if it can; None where it makes their tensors."""
    memo: dict[Any, Any]
    """What an op keeps for the step's other layers, such as work lists; a new step has it empty."""


class KvCache(Protocol):
    """The paged cache of one rank: one pair of tensors a layer of its stage."""

    page_tokens: int
    k_pages: list[Tensor]
    """Per layer of the stage: [pages, page_tokens, K, H]."""
    v_pages: list[Tensor]
    k_scales: list[Tensor]
    """Of pages in fp8, per layer: fp32 [pages, K], a power of two; without pages otherwise."""
    v_scales: list[Tensor]


class Peers(Protocol):
    """Memory of the tp ranks that each other's kernels read and write, where devices reach it.

    The same on all ranks but for `rank` and the addresses. Tensors are on the rank's device.
    """

    rank: int
    ranks: int
    slots: int
    slot_bytes: int
    """A multiple of 16."""
    buffers: Tensor
    """int64 [ranks], addresses of each rank's data: two halves of slots x slot_bytes."""
    flags: Tensor
    """int64 [ranks], addresses of each rank's flags: int32 [slots, ranks], 0 at first. Entry
    [slot, r] is written by rank r alone."""
    epochs: Tensor
    """int32 [slots], 0 at first: launches of this rank that used each slot."""


class Comm(Protocol):
    """Collectives of one rank; a program calls only those that its degrees need."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the tp ranks."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Join of the tp ranks' shares on the last dimension, in rank order."""
        ...

    def peers(self, slots: int, slot_bytes: int) -> Peers | None:
        """Shared memory of the tp ranks, the same at every call with these sizes.

        The first call is a collective. None, on all ranks alike, where devices do not reach each
        other's memory; and while a CUDA graph is recorded, unless there was a call before.
        """
        ...

    def vocab_offset(self, share: int) -> int:
        """First vocabulary row of this rank, where each rank holds `share` rows."""
        ...

    def merge(self, out_TNH: Tensor, lse_TN: Tensor) -> Tensor:
        """Merge of the KVP groups' partial attention (design section 4)."""
        ...


class Source(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor of a checkpoint that goes into a parameter."""

    name: str
    """Its Hugging Face name."""
    shape: tuple[int, ...]
    """Its whole shape in the checkpoint."""
    shard_dim: int | None = None
    """Dim that the tp ranks share; None where each holds all of it."""
    shards: int = 1
    """Pieces of that dim: tp, or fewer where several ranks hold the same KV head."""


class Parameter(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A weight of a stage program: this rank's pieces of the sources, joined on dim 0."""

    name: str
    shape: tuple[int, ...]
    """This rank's shape."""
    dtype: str
    sources: tuple[Source, ...]

    def source_slice(self, source: Source, tp: int, tp_rank: int) -> tuple[slice, ...]:
        """Index of this rank's piece of a source."""
        index = [slice(None)] * len(source.shape)
        if source.shard_dim is not None:
            size = source.shape[source.shard_dim] // source.shards
            piece = tp_rank * source.shards // tp
            index[source.shard_dim] = slice(piece * size, (piece + 1) * size)
        return tuple(index)

"""The tensors of one step on one rank, and the rank's page pool.

A group runs the rows whose request has a shard in it. In the newest shard the row's keys are
written and its queries are causal; in an older one nothing is written (slot -1), and every query
sees the whole shard.

Letters as in plans/ops.py: T tokens, B sequences, P pages of a sequence, R sampled rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plans.errors import MedhaError
from plans.mesh import Coordinates
from plans.ops import HostInputs
from plans.plan import Plan
from runtime.executor.base import Ints
from runtime.parallel.table import Row, newest_shard
from runtime.parallel.transfers import Array, to_device
from runtime.weights import TORCH_DTYPE


@dataclass(kw_only=True)
class PackedInputs:
    """StepInputs of plans/ops.py."""

    token_ids_T: Tensor
    hidden_TD: Tensor | None
    positions_T: Tensor
    slots_T: Tensor
    query_starts_B1: Tensor
    kv_lens_B: Tensor
    page_table_BP: Tensor
    sample_rows_R: Tensor
    host: HostInputs | None = None
    recorded: bool = False
    results: tuple[Tensor, ...] | None = None
    memo: dict[Any, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class PagedCache:
    """KvCache of plans/ops.py: the pages of the layers of one stage."""

    page_tokens: int
    k_pages: list[Tensor]
    v_pages: list[Tensor]
    k_scales: list[Tensor] = field(default_factory=list)
    v_scales: list[Tensor] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [*self.k_pages, *self.v_pages, *self.k_scales, *self.v_scales]


def shard_in(plan: Plan, row: Row, group: int) -> int:
    """The shard of a row's request that a group holds, or would hold."""
    return (group - row.home) % plan.parallelism.kvp


def rows_of_group(plan: Plan, rows: Sequence[Row], group: int) -> list[Row]:
    """The rows whose request has a shard in the group, in the order of the step."""
    if plan.parallelism.kvp == 1:
        return list(rows)
    return [row for row in rows if shard_in(plan, row, group) <= newest_shard(plan, row)]


def sampled_rows(plan: Plan, rows: Sequence[Row], group: int) -> list[Row]:
    """The rows of a group that it samples: it holds their newest shard."""
    return [
        row for row in rows if row.samples and shard_in(plan, row, group) == newest_shard(plan, row)
    ]


@dataclass(frozen=True, kw_only=True)
class PackedNumbers:
    """The numbers of a group's rows on the host, int64; letters as of the tensors."""

    token_ids_T: Ints
    positions_T: Ints
    slots_T: Ints
    starts_B1: Ints
    kv_lens_B: Ints
    table_BP: Ints
    rows_R: Ints
    writes_B: Array
    """bool, whether a sequence's keys are written here."""


def packed(plan: Plan, rows: Sequence[Row], group: int) -> PackedNumbers:
    """The numbers of a group's rows, in their order.

    rows  of the group (rows_of_group), at least one
    """
    page_tokens, shard_tokens = plan.kv.page_tokens, plan.kv.tokens_per_kvp_shard
    shards = [shard_in(plan, row, group) for row in rows]
    lengths = np.array([row.tokens for row in rows], dtype=np.int64)
    prefixes = np.array([row.prefix for row in rows], dtype=np.int64)
    shard_starts = np.array(shards, dtype=np.int64) * shard_tokens
    kv_lens = np.minimum(prefixes + lengths - shard_starts, shard_tokens)
    writes = prefixes - shard_starts < shard_tokens
    starts = np.concatenate(([0], lengths.cumsum()))
    counts = -(-kv_lens // page_tokens)
    table = np.zeros((len(rows), counts.max()), dtype=np.int64)
    ids: list[int] = []
    for row, shard, count, entries in zip(rows, shards, counts.tolist(), table, strict=True):
        entries[:count] = row.state.pages(shard, count)
        ids += row.state.tokens[row.prefix : row.prefix + row.tokens]
    sequence = np.repeat(np.arange(len(rows)), lengths)
    positions = np.arange(len(ids)) + (prefixes - starts[:-1])[sequence]
    inside = np.where(writes[sequence], positions - shard_starts[sequence], 0)
    slots = table[sequence, inside // page_tokens] * page_tokens + inside % page_tokens
    slots[~writes[sequence]] = -1
    samples = [row.samples and bool(own) for row, own in zip(rows, writes, strict=True)]
    return PackedNumbers(
        token_ids_T=np.array(ids, dtype=np.int64),
        positions_T=positions,
        slots_T=slots,
        starts_B1=starts,
        kv_lens_B=kv_lens,
        table_BP=table,
        rows_R=starts[1:][samples] - 1,
        writes_B=writes,
    )


def pack(plan: Plan, rows: Sequence[Row], group: int, device: torch.device) -> PackedInputs:
    """Packs a group's rows, in their order; built in numpy and sent in one copy.

    rows  of the group (rows_of_group), at least one
    """
    numbers = packed(plan, rows, group)
    token_ids_T, positions_T, slots_T, starts_B1, kv_lens_B, table_BP, rows_R = to_device(
        [
            numbers.token_ids_T,
            numbers.positions_T,
            numbers.slots_T,
            numbers.starts_B1.astype(np.int32),
            numbers.kv_lens_B.astype(np.int32),
            numbers.table_BP.astype(np.int32),
            numbers.rows_R,
        ],
        device,
    )
    return PackedInputs(
        token_ids_T=token_ids_T,
        hidden_TD=None,
        positions_T=positions_T,
        slots_T=slots_T,
        query_starts_B1=starts_B1,
        kv_lens_B=kv_lens_B,
        page_table_BP=table_BP,
        sample_rows_R=rows_R,
        host=HostInputs(
            query_starts=tuple(numbers.starts_B1.tolist()),
            kv_lens=tuple(numbers.kv_lens_B.tolist()),
            causal=tuple(numbers.writes_B.tolist()),
        ),
    )


def page_pool(plan: Plan, place: Coordinates, device: torch.device) -> PagedCache:
    """The zeroed pages of a stage's layers: what an unwritten slot holds must be finite.

    Raises MedhaError where they do not fit.
    """
    model, kv = plan.model, plan.kv
    first, end = plan.stages[place.stage]
    heads = max(model.kv_heads // plan.parallelism.tp, 1)  # more ranks than heads share them
    shape = (kv.pages_per_rank, kv.page_tokens, heads, model.head_dim)
    dtype = TORCH_DTYPE[kv.dtype]
    if device.type == "cuda":
        torch.cuda.empty_cache()  # pieces that loading has left behind; the pool is one large one
    try:
        pairs = [
            (_zeros(shape, dtype, device), _zeros(shape, dtype, device)) for _ in range(first, end)
        ]
    except (MemoryError, RuntimeError) as error:  # of numpy and of torch
        page = model.rank_page_bytes(plan.parallelism.tp, kv.page_tokens, kv.dtype)
        need = kv.pages_per_rank * page * (end - first)
        raise MedhaError(
            f"KV of {kv.pages_per_rank} pages needs {need / 1e9:.1f} GB on {device}, which has not "
            "as much free; free the device, or plan with a smaller --max-context"
        ) from error
    return PagedCache(
        page_tokens=kv.page_tokens,
        k_pages=[k for k, _ in pairs],
        v_pages=[v for _, v in pairs],
        k_scales=[_scales(shape, kv.dtype, device) for _ in pairs],
        v_scales=[_scales(shape, kv.dtype, device) for _ in pairs],
    )


def _scales(shape: tuple[int, ...], dtype: str, device: torch.device) -> Tensor:
    """fp32 [pages, K] of pages in fp8, which kv_write fills; empty for other dtypes."""
    pages, _, heads, _ = shape
    return torch.zeros((pages if dtype == "fp8" else 0, heads), device=device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy takes zeroed memory from the system, page by page as it is used; torch.zeros would
    # write all of a pool that a CPU run may never fill
    return (
        torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8))
        .view(dtype)
        .view(shape)
    )

"""The exchange of a step between kvp groups: partial attention out, merged attention back.

Two groups exchange the tokens of the rows that both hold a shard of, and nothing else; a group
without such rows waits for nobody. Both list these rows in the order of the step, so sizes and
order agree without a message. All groups of a row merge the same partial results in the order of
the groups, so that they go on with the same bits.

Every rank runs steps in step_id order and layers in order, and in one exchange all sends and
receives are posted before any is awaited; so whom a rank waits for is always at the same exchange
or before it, and no circle of waiting ranks can form.

T tokens of the step, S shared ones of them, N query heads, H head size, G kvp groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from plans.plan import Plan
from runtime.parallel.table import Row, row_groups
from runtime.parallel.transfers import to_device
from runtime.program import Exchanger

LSE_BYTES = 4
OWN, ABSENT = -2, -1
"""Shares that were not received: this group's own, and that of a group without a shard."""


def merge_shards(out_GTNH: Tensor, lse_GTN: Tensor) -> Tensor:
    """Merges the attention of G shards into out_TNH, in the dtype of out_GTNH.

    out_GTNH  each shard's output, normalised over that shard alone; 0 for an empty shard
    lse_GTN   natural log of the shard's softmax sum, fp32; -inf for an empty shard
    errors    none; a token with no key in any shard gives 0
    source    design section 4, KVP; arXiv 2409.17264v5, section 3.3
    """
    # the floor: -inf - -inf would be NaN
    top_TN = lse_GTN.amax(dim=0).clamp_min(torch.finfo(torch.float32).min)
    weight_GTN = torch.exp(lse_GTN - top_TN)  # fp32: exponents spread over a million keys
    out_TNH = (out_GTNH.float() * weight_GTN[..., None]).sum(dim=0)
    total_TN = weight_GTN.sum(dim=0)  # at least 1, or 0 where no shard has a key
    return (out_TNH / total_TN.clamp_min(1.0)[..., None]).to(out_GTNH.dtype)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another group with which a step shares rows."""

    group: int
    rank: int
    shared_S: Tensor
    """int64, places of the common tokens among this group's shared ones."""


class Merges(Protocol):
    """What stands for the exchange of a step."""

    def peer_names(self) -> str:
        """Groups that this one waits for, for messages."""
        ...

    def merge(self, out_TNH: Tensor, lse_TN: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The attention of the step's rows over all groups."""
        ...


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What one group exchanges in each layer of a step."""

    group: int
    groups: int
    rows_S: Tensor
    """int64, rows of T that other groups work on too."""
    peers: tuple[Peer, ...]
    """By group."""
    rows_E: Tensor
    """int64, row of T of each shared token, once a peer, peer behind peer; with the next two for
    the kernels alone."""
    places_3E: Tensor
    """int32: entries of the peers before its own, of its own, and its place among them."""
    shares_GS: Tensor
    """int32, the entry that holds a group's share of a token; OWN or ABSENT."""
    kernels: Exchanger | None = None
    """Those of the program, which pack and merge on a GPU instead of some thirty operations."""

    def peer_names(self) -> str:
        """Groups that this one waits for, for messages."""
        return ", ".join(str(peer.group) for peer in self.peers)

    def merge(self, out_TNH: Tensor, lse_TN: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Sends and receives packed (out, lse) and merges; other rows stay as they are.

        On a GPU the rows are merged in place, where the program has kernels for it.
        """
        if self.kernels is not None and out_TNH.is_cuda:
            return self._merge_in_place(
                self.kernels, out_TNH.contiguous(), lse_TN.contiguous(), group
            )
        out_SNH, lse_SN = out_TNH[self.rows_S], lse_TN[self.rows_S]
        packed = pack_partial(out_SNH, lse_SN)
        sent = [packed[peer.shared_S] for peer in self.peers]
        received = [torch.empty_like(each) for each in sent]
        self._swap(sent, received, group)
        out_GSNH = out_SNH.new_zeros((self.groups, *out_SNH.shape))
        lse_GSN = lse_SN.new_full((self.groups, *lse_SN.shape), -torch.inf)
        out_GSNH[self.group], lse_GSN[self.group] = out_SNH, lse_SN
        for peer, values in zip(self.peers, received, strict=True):
            out, lse = unpack_partial(values, out_TNH.dtype)
            out_GSNH[peer.group, peer.shared_S] = out
            lse_GSN[peer.group, peer.shared_S] = lse
        merged_TNH = out_TNH.clone()
        merged_TNH[self.rows_S] = merge_shards(out_GSNH, lse_GSN)
        return merged_TNH

    def _merge_in_place(
        self, kernels: Exchanger, out_TNH: Tensor, lse_TN: Tensor, group: dist.ProcessGroup
    ) -> Tensor:
        pack, merge = kernels
        sent = pack(out_TNH, lse_TN, self.rows_E, self.places_3E)
        received = torch.empty_like(sent)
        token_bytes = len(sent) // len(self.rows_E)
        sizes = [len(peer.shared_S) * token_bytes for peer in self.peers]
        self._swap(torch.split(sent, sizes), torch.split(received, sizes), group)
        merge(out_TNH, lse_TN, self.rows_S, self.shares_GS, self.places_3E, received)
        return out_TNH

    def _swap(
        self, sent: Sequence[Tensor], received: Sequence[Tensor], group: dist.ProcessGroup
    ) -> None:
        """Sends each peer its tensor and fills the one from it; all are posted before any waits."""
        operations = [
            dist.P2POp(operation, tensor, peer.rank, group)
            for operation, tensors in ((dist.irecv, received), (dist.isend, sent))
            for peer, tensor in zip(self.peers, tensors, strict=True)
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def exchange_of(
    plan: Plan,
    rows: Sequence[Row],
    group: int,
    ranks: Sequence[int],
    device: torch.device,
    *,
    kernels: Exchanger | None = None,
) -> Exchange | None:
    """The exchange of a group's rows; None where no other group works on any.

    rows     of the group, in the order of the step
    ranks    of the kvp axis, by group
    kernels  of the program, if it has any
    """
    shared: list[int] = []
    common: dict[int, list[int]] = {}
    start = 0
    for row in rows:
        others = [other for other in row_groups(plan, row) if other != group]
        if others:
            places = range(len(shared), len(shared) + row.tokens)
            shared += range(start, start + row.tokens)
            for other in others:
                common.setdefault(other, []).extend(places)
        start += row.tokens
    if not shared:
        return None

    others = sorted(common)
    lists = [shared, *(common[other] for other in others)]
    arrays = [np.array(each, dtype=np.int64) for each in lists]
    counts = [len(each) for each in arrays[1:]]
    before = np.cumsum([0, *counts])
    shares = np.full((plan.parallelism.kvp, len(shared)), ABSENT, dtype=np.int32)
    shares[group] = OWN
    for other, first, common_S in zip(others, before[:-1], arrays[1:], strict=True):
        shares[other, common_S] = first + np.arange(len(common_S))
    within = np.concatenate([np.arange(count) for count in counts])
    entry_places = np.stack((np.repeat(before[:-1], counts), np.repeat(counts, counts), within))
    entries = arrays[0][np.concatenate(arrays[1:])]
    rows_S, rows_E, places_3E, shares_GS, *shared_S = to_device(
        [arrays[0], entries, entry_places.astype(np.int32), shares, *arrays[1:]], device
    )
    return Exchange(
        group=group,
        groups=plan.parallelism.kvp,
        rows_S=rows_S,
        rows_E=rows_E,
        places_3E=places_3E,
        shares_GS=shares_GS,
        kernels=kernels,
        peers=tuple(
            Peer(group=other, rank=ranks[other], shared_S=tensor)
            for other, tensor in zip(others, shared_S, strict=True)
        ),
    )


def pack_partial(out_SNH: Tensor, lse_SN: Tensor) -> Tensor:
    """Bytes [S, N, H x itemsize + 4]: the output as it is and its fp32 log sum behind."""
    out = out_SNH.contiguous().view(torch.uint8)
    lse = lse_SN.float().unsqueeze(-1).contiguous().view(torch.uint8)
    return torch.cat([out, lse], dim=-1)


def unpack_partial(packed: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out_SNH, lse_SN) of packed bytes."""
    out = packed[..., :-LSE_BYTES].contiguous().view(dtype)
    lse = packed[..., -LSE_BYTES:].contiguous().view(torch.float32)
    return out, lse.squeeze(-1)

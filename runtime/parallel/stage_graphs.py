"""Decode steps of one rank among many as CUDA graphs: its stage, with the collectives of its group.

As in graphs.py, a graph is recorded for each of a few batch sizes and padded with sequences of no
keys. Other than there, tokens come from the host, which has them from the last stage anyway: the
numbers of a step are sent in one copy when it becomes known, and copied on the device to where the
graphs read them just before it runs. That copy stands on the stream behind the step before, so a
step prepared ahead overwrites nothing that is still read. The hidden states of the stage before
come and go the same way: what is received or sent is never what a graph reads or writes.

Which collectives a graph holds is a matter of the tp ranks of one stage and group. They have the
same rows, so they choose the same graph, and they record the same sizes in the same order. Where
one rank cannot record, none does: they agree before any of them goes on.

The exchange of the kvp groups follows the rows that groups share, in sizes that differ from group
to group, so no graph of one group would fit the other's. It stands between two pieces of a graph,
as it is without graphs; so groups need not choose alike, and one may have no rows at all.

B sequences, R sampled rows, D hidden, V vocabulary, N query heads, H head size, P pages.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from plans.errors import MedhaError
from plans.mesh import axis_ranks
from runtime.parallel.graphs import SIZES
from runtime.parallel.groups import RankComm
from runtime.parallel.inputs import PackedInputs, packed, sampled_rows
from runtime.parallel.rank import NOTHING_DRAWN, Drawn, Rank
from runtime.parallel.recorder import CudaRecorder, Recorder, Replay
from runtime.parallel.resident import WIDTH_MULTIPLE
from runtime.parallel.table import Row
from runtime.parallel.transfers import to_device
from runtime.sampling import draw_greedy
from runtime.weights import TORCH_DTYPE

AGREE = timedelta(minutes=10)
"""How long a rank may take to compile what others have, or to record all sizes."""
SAID = "said: "
"""Before what a rank says, so that no value of the store is empty."""
NUMBERS = 5
"""A sequence's: token, position, slot, keys, and a row to sample; padding has the last ones' 0."""


def stride(size: int) -> int:
    """Of the numbers of so many sequences: kernels are compiled for pointers that 16 divides."""
    return -(-size // 2) * 2


RecorderOf = Callable[[torch.device], Recorder | None]
"""What records on a device; None where nothing can."""


def recorder_of(device: torch.device) -> Recorder | None:
    """CUDA graphs on a GPU."""
    return CudaRecorder(device) if device.type == "cuda" else None


class Agreement:
    """What all ranks of a replica have to say, through their store: no device takes part."""

    def __init__(self, store: Store, rank: int, ranks: int) -> None:
        """rank  counts from 0 in the replica."""
        self._store = store
        self._rank = rank
        self._ranks = ranks

    def problems(self, what: str, own: str) -> dict[int, str]:
        """Waits until every rank has called this for `what`: the texts by rank, but empty ones.

        Once for each `what`. Raises MedhaError for ranks that do not within AGREE.
        """
        self._store.set(f"{what}/{self._rank}", f"{SAID}{own}")
        names = [f"{what}/{rank}" for rank in range(self._ranks)]
        try:
            self._store.wait(names, AGREE)
        except RuntimeError as error:  # of the store: time is over, or the connection lost
            missing = [rank for rank, name in enumerate(names) if not self._store.check([name])]
            raise MedhaError(
                f"ranks {missing} said nothing of the {what} within {AGREE.total_seconds():.0f} s; "
                "run with --no-graphs"
            ) from error
        texts = [self._store.get(name).decode().removeprefix(SAID) for name in names]
        return {rank: text for rank, text in enumerate(texts) if text}


@dataclass(frozen=True, kw_only=True)
class DecodeNumbers:
    """A step's numbers on the device, in memory of their own, padded for a graph."""

    size: int
    """Of the graph."""
    rows: int
    sampled: int
    """Of the rows, those that this group samples."""
    numbers: Tensor
    """int64 [NUMBERS x stride(size)]."""
    table_BP: Tensor
    """int32, as wide as the longest sequence needs."""


@dataclass(kw_only=True)
class _Graph:
    """The stage for one batch size."""

    pieces: list[Replay] = field(default_factory=list)
    """Cut where kvp groups exchange; else one."""
    hidden_BD: Tensor | None = None
    """Where it leaves what goes to the next stage; held, so that no other graph writes there."""


class _Cut:
    """Stands for the exchange of the kvp groups while a stage is recorded: ends a piece."""

    def __init__(self, owner: "StageGraphs", size: int, recorder: Recorder | None) -> None:
        self.pieces: list[Replay] = []
        self._owner = owner
        self._size = size
        self._recorder = recorder

    def peer_names(self) -> str:
        """Nobody is waited for."""
        return "none"

    def merge(self, out_TNH: Tensor, lse_TN: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Leaves this group's share where the exchange finds it, and goes on from there."""
        out_BNH, lse_BN = self._owner.shares(self._size, out_TNH, lse_TN)
        out_BNH.copy_(out_TNH)
        lse_BN.copy_(lse_TN)
        self.end()
        if self._recorder is not None:
            self._recorder.begin()
        return out_BNH

    def end(self) -> None:
        """Ends a piece."""
        if self._recorder is not None:
            self.pieces.append(self._recorder.end())


class StageGraphs:
    """The graphs of one rank's decode steps."""

    def __init__(self, rank: Rank, comm: RankComm, recorder: Recorder) -> None:
        """Takes the memory of the largest batch and records nothing yet.

        comm    the rank's own
        errors  MedhaError where there is no such memory beside the pages
        """
        plan = rank.plan
        self.used = True
        """Whether steps go by graph where they can."""
        self.problem = ""
        """Why nothing is recorded, where that failed on any rank."""
        self._rank = rank
        self._comm = comm
        self._recorder = recorder
        self._most = most = min(plan.limits.sequences, SIZES[-1])
        self._sizes = [*(size for size in SIZES if size < most), most]
        self._shares: tuple[Tensor, Tensor] | None = None
        self._graphs: dict[int, _Graph] = {}
        self._hidden_BD: Tensor | None = None
        self._logits_RV: Tensor | None = None
        with rank.explained("what stands beside the pages"):
            self._allocate(most)

    def _allocate(self, most: int) -> None:
        rank, plan, device = self._rank, self._rank.plan, self._rank.device
        pages = -(-plan.kv.tokens_per_kvp_shard // plan.kv.page_tokens)
        width = -(-pages // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        self._numbers = torch.zeros(NUMBERS * stride(most), dtype=torch.int64, device=device)
        self._table_BP = torch.zeros((most, width), dtype=torch.int32, device=device)
        self._starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        if not rank.is_first:
            dtype = TORCH_DTYPE[plan.model.weight_dtype]
            self._hidden_BD = torch.zeros((most, plan.model.hidden), dtype=dtype, device=device)
        if rank.is_last and rank.place.tp == 0:  # the one that draws
            self._logits_RV = torch.zeros((most, plan.model.vocab), device=device)
        self._drawn_2R = torch.zeros((2, most), dtype=torch.int64, device=device)

    # --- recording ------------------------------------------------------------------------------

    def record(self, agreement: Agreement) -> None:
        """Records all sizes, the largest first; with one that fails on any rank, no rank has any.

        Call on all ranks while nothing is in flight; it writes no page. Raises MedhaError where a
        rank has failed amid collectives that others are still at.
        """
        try:
            with self._recorder.session():
                # inside: its end waits for the device, which may wait for a rank that has failed
                problems = self._first_runs(agreement)
            if not problems:
                own = self._try(self._record_all)
                problems = agreement.problems("recorded decode steps", own)
        finally:
            self._comm.exchange = None
        if not problems:
            return
        self._graphs.clear()
        first = min(problems)
        self.problem = f"rank {first}: {problems[first]}"

    @staticmethod
    def _try(act: Callable[[], object]) -> str:
        """What went wrong."""
        try:
            act()
        except Exception as error:  # noqa: BLE001 - of torch, of Triton, of a library
            return f"{type(error).__name__}: {error}".strip().split("\n", maxsplit=1)[0]
        return ""

    def _check_together(self, failed: Mapping[int, str]) -> None:
        """Whether the tp ranks of a group all failed at this size, or none: else some wait."""
        mesh = self._rank.plan.parallelism
        for number, text in failed.items():
            others = [each for each in axis_ranks(mesh, number, "tp") if each not in failed]
            if others:
                raise MedhaError(
                    f"rank {number} failed in its first decode steps ({text}) and left ranks "
                    f"{others} of its tp group waiting; run with --no-graphs"
                )

    def _first_runs(self, agreement: Agreement) -> dict[int, str]:
        """Every size as it is: kernels are compiled and loaded, and communicators set up.

        No rank begins a size before all are through the one before, so those that fail do so at
        the same one: a rank that went on would launch collectives that nobody joins.
        """
        for size in reversed(self._sizes):
            own = self._try(partial(self._run, size, None))
            problems = agreement.problems(f"first decode steps of {size}", own)
            self._check_together(problems)
            if problems:
                return problems
        return {}

    def _record_all(self) -> None:
        with self._recorder.session():
            for size in reversed(self._sizes):
                self._graphs[size] = self._run(size, self._recorder)

    def _clear(self, size: int) -> None:
        """Padding alone."""
        numbers = self._numbers_of(size)
        numbers.zero_()
        numbers[2].fill_(-1)

    def _run(self, size: int, recorder: Recorder | None) -> _Graph:
        """Runs the stage on padding alone, or records what that launches."""
        rank, cut = self._rank, _Cut(self, size, recorder)
        self._clear(size)
        self._comm.exchange = cut if rank.plan.parallelism.kvp > 1 else None
        if recorder is not None:
            recorder.begin()
        out = rank.forward(self._inputs(size))
        if self._logits_RV is not None:
            self._logits_RV[:size].copy_(out)
            self._drawn_2R[:, :size].copy_(draw_greedy(out))
        cut.end()
        return _Graph(pieces=cut.pieces, hidden_BD=None if rank.is_last else out)

    def _numbers_of(self, size: int) -> Tensor:
        """int64 [NUMBERS, size], where a graph of this size reads them."""
        return self._numbers[: NUMBERS * stride(size)].view(NUMBERS, -1)[:, :size]

    def _inputs(self, size: int) -> PackedInputs:
        token_B, position_B, slot_B, kv_lens_B, rows_R = self._numbers_of(size)
        return PackedInputs(
            token_ids_T=token_B,
            hidden_TD=None if self._hidden_BD is None else self._hidden_BD[:size],
            positions_T=position_B,
            slots_T=slot_B,
            query_starts_B1=self._starts[: size + 1],
            kv_lens_B=kv_lens_B.int(),
            page_table_BP=self._table_BP[:size],
            sample_rows_R=rows_R,
            recorded=True,
        )

    def shares(self, size: int, out_TNH: Tensor, lse_TN: Tensor) -> tuple[Tensor, Tensor]:
        """(out_BNH, lse_BN) that all layers leave for the exchange, made for the first who asks.

        The largest size comes first.
        """
        if self._shares is None:
            self._shares = torch.zeros_like(out_TNH), torch.zeros_like(lse_TN)
        out_BNH, lse_BN = self._shares
        return out_BNH[:size], lse_BN[:size]

    # --- steps ----------------------------------------------------------------------------------

    def count(self) -> int:
        """Sizes that have graphs."""
        return len(self._graphs)

    def takes(self, rows: Sequence[Row]) -> bool:
        """Whether a step of these rows of the group, at least one, goes by graph.

        The same answer on all tp ranks: they have the same rows.
        """
        return (
            self.used
            and bool(self._graphs)
            and len(rows) <= self._most
            and all(row.tokens == 1 and row.samples for row in rows)
        )

    def numbers(self, rows: Sequence[Row]) -> DecodeNumbers:
        """Sends the numbers of such a step; call when it becomes known."""
        rank = self._rank
        size = next(size for size in self._sizes if size >= len(rows))
        found = packed(rank.plan, rows, rank.place.group)
        numbers = np.zeros((NUMBERS, stride(size)), dtype=np.int64)
        numbers[2] = -1
        columns = (found.token_ids_T, found.positions_T, found.slots_T, found.kv_lens_B)
        numbers[:4, : len(rows)] = columns
        numbers[4, : len(found.rows_R)] = found.rows_R
        table = np.zeros((size, found.table_BP.shape[1]), dtype=np.int32)
        table[: len(rows)] = found.table_BP
        numbers_5B, table_BP = to_device([numbers.reshape(-1), table], rank.device)
        return DecodeNumbers(
            size=size,
            rows=len(rows),
            sampled=len(found.rows_R),
            numbers=numbers_5B,
            table_BP=table_BP,
        )

    def run(self, step: DecodeNumbers, hidden_TD: Tensor | None) -> Tensor:
        """Starts a step: what to send to the next stage, in memory of its own; or the logits_RV of
        the sampled rows, valid until the next step, on the rank that draws.

        hidden_TD  of the rows, from the stage before; its memory may be used again
        """
        size = step.size
        self._numbers[: len(step.numbers)].copy_(step.numbers)
        self._table_BP[:size, : step.table_BP.shape[1]].copy_(step.table_BP)
        if self._hidden_BD is not None:
            assert hidden_TD is not None, "a later stage has an input"
            self._hidden_BD[: step.rows].copy_(hidden_TD)
        graph = self._graphs[size]
        for piece in graph.pieces[:-1]:
            piece()
            self._exchange(size)
        graph.pieces[-1]()
        if graph.hidden_BD is not None:
            return graph.hidden_BD[: step.rows].clone()  # it may leave behind the next step
        return self._drawn_2R if self._logits_RV is None else self._logits_RV[: step.sampled]

    def _exchange(self, size: int) -> None:
        assert self._shares is not None, "pieces end at exchanges"
        out_BNH, lse_BN = (each[:size] for each in self._shares)
        merged_BNH = self._comm.merge(out_BNH, lse_BN)
        if merged_BNH.data_ptr() != out_BNH.data_ptr():
            out_BNH.copy_(merged_BNH)

    def drawn(self, rows: Sequence[Row]) -> Drawn:
        """The tokens of the step that `run` has started, of the rows that this group samples."""
        rank = self._rank
        sampled = sampled_rows(rank.plan, rows, rank.place.group)
        if not sampled:
            return NOTHING_DRAWN
        if all(row.state.sampling.greedy for row in sampled):
            return Drawn([row.number for row in sampled], self._drawn_2R[:, : len(sampled)])
        assert self._logits_RV is not None, "this rank draws"
        return rank.draw(self._logits_RV[: len(sampled)], rows, None)

"""What a lone rank's device keeps of the requests between steps: page tables and newest tokens.

A request with pages has a place, a row of both. Steps bring only new pages, and a decode reads its
token where the step before has left it: nothing of a decode's input waits for the host.

Letters as in plans/ops.py, and U places.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plans.errors import MedhaError
from plans.ops import HostInputs
from plans.plan import Plan
from runtime.executor.base import Ints, Step
from runtime.parallel.inputs import PackedInputs
from runtime.parallel.table import Row
from runtime.parallel.transfers import to_device

WIDTH_MULTIPLE = 16
"""Row length of the page table: kernels are compiled for strides that 16 divides."""


@dataclass(frozen=True, kw_only=True)
class PackedStep:
    """A step's rows as numbers on the host."""

    known_T: Ints
    """Token ids, -1 where only the device knows it: the newest of its place."""
    positions_T: Ints
    place_T: Ints
    starts_B1: Ints
    kv_lens_B: Ints
    rows_R: Ints
    place_R: Ints
    host: HostInputs


class Residents:
    """The places of one rank. Steps are applied in their order, on the stream that runs them."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        """Nobody has a place; the last one stays nobody's, for padding."""
        self.page_tokens = plan.kv.page_tokens
        self.most_tokens = plan.kv.tokens_per_kvp_shard
        """Of a request: what a row of the table holds."""
        self.nobody = plan.limits.sequences
        self._device = device
        pages = -(-plan.kv.tokens_per_kvp_shard // plan.kv.page_tokens)
        width = -(-pages // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        self.table_UP = torch.zeros((self.nobody + 1, width), dtype=torch.int32, device=device)
        self.newest_U = torch.zeros(self.nobody + 1, dtype=torch.int64, device=device)
        """Token that a request decodes next, once one has been sampled."""
        self._free = list(range(self.nobody - 1, -1, -1))
        self._places: dict[int, int] = {}
        self._fed: set[int] = set()
        """Requests whose newest token is there."""
        self._held: dict[int, int] = {}
        """Pages by request."""
        self._cells: list[int] = []
        self._pages: list[int] = []
        """Entries of the table, flat, that are still to be written."""

    def apply(self, step: Step) -> None:
        """Gives and takes places and notes the new pages of a step."""
        for number in (*step.ended, *step.evicted):
            place = self._places.pop(number, None)
            if place is not None:
                self._free.append(place)
                self._fed.discard(number)
                del self._held[number]
        width = self.table_UP.shape[1]
        for new in step.pages:
            place = self._place(new.request)
            held = self._held[new.request]
            start = place * width + held
            self._cells += range(start, start + len(new.pages))
            self._pages += new.pages
            self._held[new.request] = held + len(new.pages)

    def _place(self, number: int) -> int:
        place = self._places.get(number)
        if place is None:
            if not self._free:
                raise MedhaError(
                    f"more than limits.sequences ({self.nobody}) requests hold pages at once; "
                    "plan with more sequences"
                )
            place = self._places[number] = self._free.pop()
            self._held[number] = 0
        return place

    def places(self, numbers: Iterable[int]) -> Ints:
        """Places of requests that have pages."""
        return np.array([self._places[number] for number in numbers], dtype=np.int64)

    def write(self) -> None:
        """Brings the device's table up to date; call before a step's launches."""
        if not self._cells:
            return
        # one entry may come twice, a place having changed hands: the later page holds
        last = dict(zip(self._cells, self._pages, strict=True))
        cells, pages = to_device(
            [
                np.fromiter(last.keys(), dtype=np.int64, count=len(last)),
                np.fromiter(last.values(), dtype=np.int32, count=len(last)),
            ],
            self._device,
        )
        self.table_UP.view(-1).index_copy_(0, cells, pages)
        self._cells, self._pages = [], []

    def keep(self, place_R: Tensor, token_R: Tensor) -> None:
        """Keeps sampled tokens for the next step, on the device; `kept` says so on the host."""
        self.newest_U.index_copy_(0, place_R, token_R)

    def kept(self, numbers: Iterable[int]) -> None:
        """Notes requests whose newest token is on the device."""
        self._fed.update(numbers)

    def unfed(self, numbers: Sequence[int]) -> list[int]:
        """Those whose newest token only the host knows: they decode behind a recomputation."""
        return [] if self._fed.issuperset(numbers) else sorted(set(numbers) - self._fed)

    def feed(self, numbers: Sequence[int], tokens: Sequence[int]) -> None:
        """Sends newest tokens from the host."""
        place_R, token_R = to_device(
            [self.places(numbers), np.array(tokens, dtype=np.int64)], self._device
        )
        self.keep(place_R, token_R)
        self.kept(numbers)

    def packed(self, rows: Sequence[Row], places: Ints) -> PackedStep:
        """The numbers of any rows of a step, at least one."""
        lengths = np.array([row.tokens for row in rows], dtype=np.int64)
        prefixes = np.array([row.prefix for row in rows], dtype=np.int64)
        samples = np.array([row.samples for row in rows], dtype=bool)
        kv_lens = prefixes + lengths
        starts = np.concatenate(([0], lengths.cumsum()))
        ids: list[int] = []
        for row in rows:
            ids += row.state.tokens[row.prefix : row.prefix + row.tokens] or [-1]
        sequence = np.repeat(np.arange(len(rows)), lengths)
        return PackedStep(
            known_T=np.array(ids, dtype=np.int64),
            positions_T=np.arange(len(ids)) + (prefixes - starts[:-1])[sequence],
            place_T=places[sequence],
            starts_B1=starts,
            kv_lens_B=kv_lens,
            rows_R=starts[1:][samples] - 1,
            place_R=places[samples],
            host=HostInputs(
                query_starts=tuple(starts.tolist()),
                kv_lens=tuple(kv_lens.tolist()),
                causal=(True,) * len(rows),
            ),
        )

    def inputs(self, rows: Sequence[Row], places: Ints) -> tuple[PackedInputs, Tensor]:
        """Tensors of any rows of a step, and place_R of the rows that it samples.

        Slots are looked up on the device, and so are the tokens that the host does not know yet.
        """
        step = self.packed(rows, places)
        known_T, positions_T, place_T, starts_B1, kv_lens_B, place_B, rows_R, place_R = to_device(
            [
                step.known_T,
                step.positions_T,
                step.place_T,
                step.starts_B1.astype(np.int32),
                step.kv_lens_B.astype(np.int32),
                places,
                step.rows_R,
                step.place_R,
            ],
            self._device,
        )
        token_ids_T, positions_T, slots_T = self.token_inputs(known_T, positions_T, place_T)
        pages = -(-int(step.kv_lens_B.max()) // self.page_tokens)
        inputs = PackedInputs(
            token_ids_T=token_ids_T,
            hidden_TD=None,
            positions_T=positions_T,
            slots_T=slots_T,
            query_starts_B1=starts_B1,
            kv_lens_B=kv_lens_B,
            # whole rows, so that the stride never changes
            page_table_BP=self.table_UP.index_select(0, place_B)[:, :pages],
            sample_rows_R=rows_R,
            host=step.host,
        )
        return inputs, place_R

    def token_inputs(
        self, known_T: Tensor, positions_T: Tensor, place_T: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(token_ids_T, positions_T, slots_T) of tokens in places: fit to be recorded.

        known_T      -1 where the token is the newest of its place
        positions_T  -1 for padding, which has position 0 and slot -1
        """
        padding_T = positions_T < 0
        positions_T = positions_T.clamp_min(0)
        page_T = self.table_UP[place_T, positions_T // self.page_tokens]
        slots_T = page_T.long() * self.page_tokens + positions_T % self.page_tokens
        token_ids_T = torch.where(known_T < 0, self.newest_U[place_T], known_T)
        return token_ids_T, positions_T, slots_T.masked_fill(padding_T, -1)

    def decode_inputs(
        self, place_B: Tensor, kv_lens_B: Tensor, starts_B1: Tensor, rows_B: Tensor
    ) -> PackedInputs:
        """Tensors of a step of decodes alone, from tensors alone: fit to be recorded.

        kv_lens_B  int64, each with its new token; 0 for padding, which writes nothing
        starts_B1  int32, 0 to B; rows_B int64, 0 to B - 1
        """
        position_B = (kv_lens_B - 1).clamp_min(0)
        table_BP = self.table_UP.index_select(0, place_B)
        page_B = table_BP.gather(1, (position_B // self.page_tokens)[:, None]).squeeze(1)
        slot_B = page_B.long() * self.page_tokens + position_B % self.page_tokens
        return PackedInputs(
            token_ids_T=self.newest_U.index_select(0, place_B),
            hidden_TD=None,
            positions_T=position_B,
            slots_T=slot_B.masked_fill(kv_lens_B == 0, -1),
            query_starts_B1=starts_B1,
            kv_lens_B=kv_lens_B.int(),
            page_table_BP=table_BP,
            sample_rows_R=rows_B,
            recorded=True,
        )

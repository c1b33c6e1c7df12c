"""Decode steps as CUDA graphs: one launch for a whole step, from its inputs to its greedy tokens.

A graph is recorded for each of a few batch sizes; a step takes the least that holds it and pads the
rest with sequences of no keys in nobody's place. Its inputs are two numbers a sequence, place and
length, in a buffer that every graph reads; all else is on the device already (resident.py).

The largest is recorded first and all share one memory pool, so that the smaller ones live in its
memory: they never run at the same time. Steps with chunks are recorded in pieces (pieces.py).

Letters: B sequences, R sampled rows (here all of B), V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from runtime.executor.base import Ints
from runtime.parallel.inputs import PackedInputs
from runtime.parallel.recorder import Recorder, Replay
from runtime.parallel.resident import Residents
from runtime.parallel.transfers import overwrite
from runtime.sampling import draw_greedy

SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
"""Batches with a graph of their own; above the last, decode steps are launched kernel by kernel."""

_LOG = logging.getLogger(__name__)


class Sampled:
    """Where all graphs leave their logits and greedy tokens, whatever their size."""

    def __init__(self, residents: Residents, *, vocab: int, device: torch.device) -> None:
        """Takes the memory of the largest batch."""
        self.most = min(residents.nobody, SIZES[-1])
        self._residents = residents
        self._logits_RV = torch.zeros((self.most, vocab), device=device)
        self._drawn_2R = torch.zeros((2, self.most), dtype=torch.int64, device=device)

    def take(self, logits_RV: Tensor, place_R: Tensor) -> None:
        """Draws greedily and keeps the tokens in their places: fit to be recorded."""
        rows = len(logits_RV)
        drawn_2R = draw_greedy(logits_RV)
        self._residents.keep(place_R, drawn_2R[0])
        self._logits_RV[:rows].copy_(logits_RV)
        self._drawn_2R[:, :rows].copy_(drawn_2R)

    def of(self, rows: int) -> tuple[Tensor, Tensor]:
        """(logits_RV, drawn_2R of sampling.draw) of the first rows, valid until the next step."""
        return self._logits_RV[:rows], self._drawn_2R[:, :rows]


class DecodeGraphs:
    """The graphs of one rank's decode steps."""

    def __init__(
        self,
        forward: Callable[[PackedInputs], Tensor],
        residents: Residents,
        sampled: Sampled,
        recorder: Recorder,
        *,
        device: torch.device,
    ) -> None:
        """Records nothing yet."""
        self._forward = forward
        self._residents = residents
        self._sampled = sampled
        self._recorder = recorder
        most = sampled.most
        self._sizes = [*(size for size in SIZES if size < most), most]
        self._numbers = torch.full((2 * most,), residents.nobody, device=device)
        self._starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(most, device=device)
        self._graphs: dict[int, Replay] = {}

    def record(self) -> None:
        """Records all sizes, the largest first; with one that fails, none is used.

        Call while nothing is in flight. It writes no page and no request's token.
        """
        try:
            with self._recorder.session():
                for size in reversed(self._sizes):
                    self._graphs[size] = self._recorded(size)
        except Exception as error:  # noqa: BLE001 - of torch, of Triton, of a library
            self._graphs.clear()
            warn_unrecorded("decode steps", error)

    def _recorded(self, size: int) -> Replay:
        self._send(size, [], [])
        self._run(size)  # so that its kernels are compiled and loaded
        self._recorder.begin()
        self._run(size)
        return self._recorder.end()

    def count(self) -> int:
        """Sizes that have graphs."""
        return len(self._graphs)

    def takes(self, sequences: int) -> bool:
        """Whether a decode step of so many has a graph."""
        return bool(self._graphs) and sequences <= self._sizes[-1]

    def run(self, places: Ints, kv_lens: Ints) -> tuple[Tensor, Tensor, Tensor]:
        """Starts a step: (place_R, logits_RV, drawn_2R of sampling.draw), valid until the next.

        The greedy tokens are kept in the sequences' places already.
        kv_lens  tokens of each sequence with its new one
        """
        count = len(places)
        size = next(size for size in self._sizes if size >= count)
        self._send(size, places, kv_lens)
        self._graphs[size]()
        return self._numbers[:count], *self._sampled.of(count)

    def _send(self, size: int, places: Sequence[int] | Ints, kv_lens: Sequence[int] | Ints) -> None:
        """Fills the inputs of a graph of so many sequences, with padding behind those given."""
        numbers = np.zeros(2 * size, dtype=np.int64)
        numbers[:size] = self._residents.nobody
        numbers[: len(places)] = places
        numbers[size : size + len(kv_lens)] = kv_lens
        overwrite(self._numbers, numbers)

    def _run(self, size: int) -> None:
        """What a graph of so many sequences holds."""
        place_B, kv_lens_B = self._numbers[:size], self._numbers[size : 2 * size]
        inputs = self._residents.decode_inputs(
            place_B, kv_lens_B, self._starts[: size + 1], self._rows[:size]
        )
        self._sampled.take(self._forward(inputs), place_B)


def warn_unrecorded(what: str, error: Exception) -> None:
    """Says once that graphs are not used, and why."""
    reason = str(error).strip().split("\n", maxsplit=1)[0]
    _LOG.warning(
        "%s are launched kernel by kernel: recording failed (%s: %s)",
        what,
        type(error).__name__,
        reason,
    )

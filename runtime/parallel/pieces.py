"""Steps with chunks as CUDA graphs of everything but attention.

What attention launches follows the lengths of a step; all other launches follow its number of
tokens alone. So for each of some numbers of tokens the program is recorded in pieces, which end
where such an op stands; a step takes the least that holds it. Between two pieces the op runs as it
does without graphs, on the tokens that the step really has: its arguments stand in buffers that
every size shares, and its results in others, from which the next piece reads them. An op that does
not write there itself has them copied.

The last piece ends where sampled rows are selected. What follows depends on their number alone and
is recorded once for each of a few; a step that samples nothing leaves it out.

T tokens of the step, R sampled rows, as in plans/ops.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plans.ops import HostInputs
from plans.plan import Plan
from runtime.executor.base import Ints
from runtime.parallel.graphs import DecodeGraphs, Sampled, warn_unrecorded
from runtime.parallel.inputs import PackedInputs
from runtime.parallel.recorder import Recorder, Replay
from runtime.parallel.resident import PackedStep, Residents
from runtime.parallel.table import Row
from runtime.parallel.transfers import overwrite, to_device
from runtime.program import StageProgram

SIZES = (*range(64, 1024, 64), *range(1024, 2049, 128))
"""Tokens with graphs of their own. Larger steps keep the device busy for longer than their launches
take; a matrix product takes 64 rows at a time in any case."""
TAIL_SIZES = (1, 8, 64, 256)
"""Sampled rows with a graph of what follows their selection."""


class _Results(Sequence[Tensor]):
    """An op's results in buffers, and which of them the program reads: no other is copied."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self.buffers = buffers
        self.read: set[int] = set()

    def __len__(self) -> int:
        return len(self.buffers)

    def __getitem__(self, at: Any) -> Any:
        """One of them, as indexing and unpacking ask for it."""
        found = self.buffers[at]
        self.read.add(at)
        return found


@dataclass(kw_only=True)
class _Call:
    """An op between two pieces."""

    op: Callable[..., Any]
    arguments: list[Any]
    buffers_at: list[int]
    """Of which arguments are of the step's tokens: buffers that every size shares."""
    inputs_at: int
    results: _Results

    def run(self, inputs: PackedInputs, views: "_Views") -> None:
        """Runs the op on the step's tokens."""
        arguments = list(self.arguments)
        for at in self.buffers_at:
            arguments[at] = views[arguments[at]]
        arguments[self.inputs_at] = inputs
        inputs.results = tuple(views[each] for each in self.results.buffers)
        found = _listed(self.op(*arguments))
        for at in self.results.read:
            if found[at] is not inputs.results[at]:
                inputs.results[at].copy_(found[at])


class _Views(dict[Tensor, Tensor]):
    """Of each buffer what a step's tokens take; all layers of a step share the few that there are.

    Tensors are equal by identity, as keys.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens

    def __missing__(self, buffer: Tensor) -> Tensor:
        """The first tokens of a buffer."""
        self[buffer] = view = buffer[: self._tokens]
        return view


@dataclass(kw_only=True)
class _Recorded:
    """The program for one number of tokens."""

    pieces: list[Replay] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)
    """One behind each piece but the last."""


class StepPieces:
    """The pieces of one rank's steps."""

    def __init__(
        self,
        program: StageProgram,
        forward: Callable[[PackedInputs], Tensor],
        residents: Residents,
        sampled: Sampled,
        recorder: Recorder,
        *,
        persistent: Sequence[Tensor],
        device: torch.device,
        most_tokens: int,
    ) -> None:
        """Records nothing yet.

        persistent   tensors that outlive steps, besides weights: the pages
        most_tokens  of a step
        """
        self._program = program
        self._forward = forward
        self._residents = residents
        self._sampled = sampled
        self._recorder = recorder
        self._persistent = {each.data_ptr() for each in persistent}
        self._device = device
        self._page_tokens = residents.page_tokens
        self._sizes = [size for size in SIZES if size <= most_tokens]
        self._tail_sizes = [*(size for size in TAIL_SIZES if size < sampled.most), sampled.most]
        self._numbers = torch.zeros(
            2 * sampled.most + 3 * max(self._sizes, default=0), dtype=torch.int64, device=device
        )
        """Sampled rows and their places, then known tokens, positions and places of the tokens."""
        self._buffers: dict[tuple[str, str, int], Tensor] = {}
        self._parts: dict[tuple[str, str, int, int], Tensor] = {}
        """Of them, by number of tokens."""
        self._recorded: dict[int, _Recorded] = {}
        self._tails: dict[int, Replay] = {}

    def record(self) -> None:
        """Records all sizes, the largest first; with one that fails, none is used.

        Call while nothing is in flight. It writes no page and no request's token.
        """
        if not self._sizes or self._program.selects is None:
            return
        try:
            with self._recorder.session():
                for size in reversed(self._sizes):
                    self._record(size, self._tail_sizes[0])
                for rows in self._tail_sizes[1:]:  # the same pieces again; only the tail is new
                    self._record(self._sizes[0], rows)
        except Exception as error:  # noqa: BLE001 - of torch, of Triton, of a library
            # they hold memory
            for made in (self._recorded, self._tails, self._buffers, self._parts):
                made.clear()
            warn_unrecorded("steps with chunks", error)

    def takes(self, tokens: int, sampled: int) -> bool:
        """Whether a step of so many tokens and sampled rows has graphs."""
        return bool(self._recorded) and tokens <= self._sizes[-1] and sampled <= self._sampled.most

    def count(self) -> int:
        """Sizes that have graphs."""
        return len(self._recorded)

    def run(self, rows: Sequence[Row], places: Ints) -> tuple[Tensor, Tensor, Tensor]:
        """Starts a step: (place_R, logits_RV, drawn_2R of sampling.draw), valid until the next.

        The greedy tokens are kept in their requests' places already.
        """
        step = self._residents.packed(rows, places)
        tokens, count = len(step.known_T), len(step.rows_R)
        size = next(size for size in self._sizes if size >= tokens)
        numbers = self._padded(size)
        numbers[:count] = step.rows_R
        most = self._sampled.most
        numbers[most : most + count] = step.place_R
        for at, values in enumerate((step.known_T, step.positions_T, step.place_T)):
            first = 2 * most + at * size
            numbers[first : first + tokens] = values
        overwrite(self._numbers, numbers)
        inputs = self._inputs(size, step, places)
        recorded, views = self._recorded[size], _Views(tokens)
        for piece, call in zip(recorded.pieces, recorded.calls, strict=False):
            piece()
            call.run(inputs, views)
        recorded.pieces[-1]()
        if count:
            self._tails[next(each for each in self._tail_sizes if each >= count)]()
        return self._numbers[most : most + count], *self._sampled.of(count)

    def _padded(self, size: int) -> Ints:
        """Numbers of a step without tokens."""
        most = self._sampled.most
        numbers = np.zeros(2 * most + 3 * size, dtype=np.int64)
        numbers[most : 2 * most] = self._residents.nobody
        numbers[2 * most + size : 2 * most + 2 * size] = -1
        numbers[2 * most + 2 * size :] = self._residents.nobody
        return numbers

    def _inputs(self, size: int, step: PackedStep, places: Ints) -> PackedInputs:
        """What an op between two pieces may read of a step."""
        starts_B1, kv_lens_B, place_B = to_device(
            [step.starts_B1.astype(np.int32), step.kv_lens_B.astype(np.int32), places],
            self._device,
        )
        tokens, pages = len(step.known_T), -(-max(step.host.kv_lens) // self._page_tokens)
        known_T, positions_T, _ = self._token_numbers(size)
        return PackedInputs(
            token_ids_T=known_T[:tokens],
            hidden_TD=None,
            positions_T=positions_T[:tokens],
            slots_T=positions_T[:tokens],  # none is -1, which is all that attention asks of them
            query_starts_B1=starts_B1,
            kv_lens_B=kv_lens_B,
            page_table_BP=self._residents.table_UP.index_select(0, place_B)[:, :pages],
            sample_rows_R=self._numbers[: self._sampled.most],
            host=step.host,
        )

    def _token_numbers(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        first = 2 * self._sampled.most
        known_T, positions_T, place_T = self._numbers[first : first + 3 * size].view(3, size)
        return known_T, positions_T, place_T

    # --- recording ------------------------------------------------------------------------------

    def _record(self, size: int, rows: int) -> None:
        """Records the pieces of a size and the tail of so many rows, where they are missing."""
        overwrite(self._numbers, self._padded(size))
        nothing = np.zeros(0, dtype=np.int64)
        # in sequences that a row of the page table can hold
        starts = np.append(np.arange(0, size, self._residents.most_tokens), size)
        kv_lens = np.diff(starts)
        nobody = np.full(len(kv_lens), self._residents.nobody)
        step = PackedStep(
            known_T=np.zeros(size, dtype=np.int64),
            positions_T=np.arange(size),
            place_T=np.full(size, self._residents.nobody),
            starts_B1=starts,
            kv_lens_B=kv_lens,
            rows_R=nothing,
            place_R=nothing,
            host=HostInputs(
                query_starts=tuple(starts.tolist()),
                kv_lens=tuple(kv_lens.tolist()),
                causal=(True,) * len(kv_lens),
            ),
        )
        inputs = self._inputs(size, step, nobody)
        recording = _Recording(self, inputs, size=size, rows=rows)
        program, recorder = self._program, self._recorder
        ops = {name: recording.apart(name, program.namespace[name]) for name in program.apart}
        assert program.selects is not None, "a stage without logits is not recorded"
        ops[program.selects] = recording.selection(program.namespace[program.selects])
        place_R = self._numbers[self._sampled.most :][:rows]
        for launch in (False, True):  # first as it is: kernels are compiled and loaded
            recording.begin(recorder if launch else None)
            with program.replacing(ops):
                inputs.token_ids_T, inputs.positions_T, inputs.slots_T = (
                    self._residents.token_inputs(*self._token_numbers(size))
                )
                self._sampled.take(self._forward(inputs), place_R)
            recording.end()
        self._recorded.setdefault(size, recording.recorded)
        self._tails.setdefault(rows, recording.tail)

    def buffer(self, op: str, kind: str, at: int, like: Tensor | None = None) -> Tensor:
        """A tensor of the step's tokens that every size shares: as much of it as `like` has."""
        key = (op, kind, at)
        if like is None:
            return self._buffers[key]
        if key not in self._buffers:  # the largest size comes first
            self._buffers[key] = torch.zeros_like(like, memory_format=torch.contiguous_format)
        part = (*key, len(like))
        if part not in self._parts:  # one object, by which layers know that they share it
            self._parts[part] = self._buffers[key][: len(like)]
        return self._parts[part]

    def outlives_steps(self, tensor: Tensor) -> bool:
        """Whether a tensor needs no buffer."""
        return tensor.data_ptr() in self._persistent


class _Recording:
    """One run of the program, cut where ops stand apart and where rows are selected."""

    def __init__(self, owner: StepPieces, inputs: PackedInputs, *, size: int, rows: int) -> None:
        self.recorded = _Recorded()
        self.tail: Replay = _nothing
        self._owner = owner
        self._inputs = inputs
        self._size = size
        self._rows = rows
        self._recorder: Recorder | None = None

    def begin(self, recorder: Recorder | None) -> None:
        """Starts a run, which only records with a recorder."""
        self.recorded = _Recorded()
        self._recorder = recorder
        if recorder is not None:
            recorder.begin()

    def end(self) -> None:
        """Ends the tail, and so the run."""
        if self._recorder is not None:
            self.tail = self._recorder.end()

    def apart(self, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        """In place of an op: the end of a piece, the op itself, and the next piece."""

        def call(*given: Any) -> Any:
            arguments = [self._kept(name, at, each) for at, each in enumerate(given)]
            self._cut()
            found = op(*arguments)
            results = _Results(
                [
                    self._owner.buffer(name, "result", at, each)
                    for at, each in enumerate(_listed(found))
                ]
            )
            for result, value in zip(results.buffers, _listed(found), strict=True):
                result.copy_(value)
            self.recorded.calls.append(
                _Call(
                    op=op,
                    arguments=arguments,
                    buffers_at=[at for at, each in enumerate(arguments) if each is not given[at]],
                    inputs_at=next(at for at, each in enumerate(given) if each is self._inputs),
                    results=results,
                )
            )
            if self._recorder is not None:
                self._recorder.begin()
            return results if isinstance(found, tuple) else results[0]

        return call

    def selection(self, op: Callable[..., Any]) -> Callable[..., Any]:
        """In place of the op that selects rows: the end of the pieces, and the tail."""

        def call(x_TD: Tensor, rows_R: Tensor) -> Any:
            self._kept("selection", 0, x_TD)
            self._cut()
            if self._recorder is not None:
                self._recorder.begin()
            # all of the buffer: the tail serves every size
            return op(self._owner.buffer("selection", "argument", 0), rows_R[: self._rows])

        return call

    def _kept(self, name: str, at: int, value: Any) -> Any:
        """An argument as it can be read when this piece has run."""
        if not isinstance(value, Tensor) or self._owner.outlives_steps(value):
            return value
        assert len(value) == self._size, f"argument {at} of {name} is not of the step's tokens"
        kept = self._owner.buffer(name, "argument", at, value)
        kept.copy_(value)
        return kept

    def _cut(self) -> None:
        if self._recorder is not None:
            self.recorded.pieces.append(self._recorder.end())


def _nothing() -> None:
    """What runs before anything is recorded."""


def _listed(results: Any) -> Sequence[Tensor]:
    """An op's result or results."""
    return results if isinstance(results, tuple) else (results,)


class StepGraphs:
    """All graphs of a lone rank."""

    def __init__(
        self,
        plan: Plan,
        program: StageProgram,
        forward: Callable[[PackedInputs], Tensor],
        residents: Residents,
        recorder: Recorder,
        *,
        persistent: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        """Records nothing yet; persistent tensors outlive steps: weights and pages."""
        sampled = Sampled(residents, vocab=plan.model.vocab, device=device)
        self._decodes = DecodeGraphs(forward, residents, sampled, recorder, device=device)
        self._pieces = StepPieces(
            program,
            forward,
            residents,
            sampled,
            recorder,
            persistent=persistent,
            device=device,
            most_tokens=plan.scheduler.max_step_tokens,
        )

    def record(self) -> None:
        """Records all of them; call while nothing is in flight."""
        self._pieces.record()
        self._decodes.record()

    def count(self) -> tuple[int, int]:
        """Sizes of decode steps, and of steps with chunks, that have graphs."""
        return self._decodes.count(), self._pieces.count()

    def takes(self, rows: Sequence[Row]) -> bool:
        """Whether a step of these rows has graphs."""
        if self._alone(rows):
            return self._decodes.takes(len(rows))
        tokens, sampled = sum(row.tokens for row in rows), sum(row.samples for row in rows)
        return self._pieces.takes(tokens, sampled)

    def run(self, rows: Sequence[Row], places: Ints) -> tuple[Tensor, Tensor, Tensor]:
        """Starts a step: (place_R, logits_RV, drawn_2R of sampling.draw), valid until the next.

        Decodes read their tokens on the device. The greedy tokens are kept there already.
        """
        if not self._alone(rows):
            return self._pieces.run(rows, places)
        return self._decodes.run(places, np.array([row.prefix + 1 for row in rows]))

    @staticmethod
    def _alone(rows: Sequence[Row]) -> bool:
        """Whether a step is of decodes alone, or looks like it."""
        return all(row.tokens == 1 and row.samples for row in rows)

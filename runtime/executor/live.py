"""Runs steps on this machine: one process, one device, the program of a bundle.

Keeps by request number what a step does not carry: the page table and the tokens, prompt and answer
so far. An eviction drops the pages and keeps the tokens, so a recomputation is nothing but chunks
over known tokens; the position in the random stream is the length of the answer, so it continues
where it was.

A step runs when it is submitted and is collected by the next wait: one in flight at most.

Letters as in plans/ops.py: T tokens, B sequences, P pages of a sequence, R sampled rows, V vocab.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from plans.errors import BundleMismatch, MedhaError
from plans.model import DTYPE_BYTES
from plans.plan import Plan
from runtime.clock import Clock
from runtime.executor.base import Ints, Step, StepResult
from runtime.program import StageProgram
from runtime.sampling import sample
from runtime.sampling_params import SamplingParams
from runtime.weights import TORCH_DTYPE

WARM_UP_TOKENS = 32

OnLogits = Callable[[int, int, Tensor], None]
"""Called with (request, tokens generated before, logits_V) for each sampled row."""


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


@dataclass(kw_only=True)
class PagedCache:
    """KvCache of plans/ops.py: the pages of the layers of one stage."""

    page_tokens: int
    k_pages: list[Tensor]
    v_pages: list[Tensor]


class Alone:
    """Comm of plans/ops.py for the only rank: every collective is the identity."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over one rank."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """The join of one share."""
        return x

    def vocab_offset(self, share: int) -> int:
        """One rank holds the vocabulary from its first row."""
        return 0

    def merge(self, out_TNH: Tensor, lse_TN: Tensor) -> Tensor:
        """The merge of one group's attention."""
        return out_TNH


@dataclass(kw_only=True)
class _State:
    """What is kept of one request."""

    tokens: list[int]
    """Prompt and answer so far."""
    prompt_tokens: int
    sampling: SamplingParams
    pages: Ints = field(default_factory=lambda: np.zeros(8, dtype=np.int64))
    """Page numbers in the order of the tokens, with spare room at the end."""
    held: int = 0
    """Pages of it that count."""

    def grow(self, pages: tuple[int, ...]) -> None:
        """Appends pages: shards are whole pages and grow in order, so those of one group join."""
        end = self.held + len(pages)
        if end > len(self.pages):
            self.pages = np.resize(self.pages, 2 * end)
        self.pages[self.held : end] = pages
        self.held = end


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One request's share of a step."""

    number: int
    state: _State
    prefix: int
    tokens: int
    samples: bool


def device_for(plan: Plan) -> torch.device:
    """The device that runs the plan here; raises BundleMismatch where this process cannot run it.

    Device names of the plan that start with "cpu" are CPUs; everything else is a CUDA GPU.
    """
    ranks = plan.parallelism.ranks
    if ranks > 1:
        degrees = plan.parallelism
        raise BundleMismatch(
            f"the plan spreads over {ranks} ranks (tp {degrees.tp}, spp {degrees.spp}, "
            f"kvp {degrees.kvp}, replicas {degrees.replicas}); this command runs one; "
            "nearest: plan with --gpus 1"
        )
    if plan.topology.device.startswith("cpu"):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BundleMismatch(
            f"the plan is for {plan.topology.device}, and no CUDA device is visible here; "
            "nearest: plan with --hardware cpu"
        )
    return torch.device("cuda", 0)


class LiveExecutor:
    """Executor of runtime/executor/base.py for one rank."""

    def __init__(
        self,
        plan: Plan,
        program: StageProgram,
        weights: dict[str, Tensor],
        *,
        clock: Clock,
        on_logits: OnLogits | None = None,
    ) -> None:
        """Allocates the whole page pool at once; raises MedhaError where it does not fit."""
        self._plan = plan
        self._program = program
        self._weights = weights
        self._clock = clock
        self._on_logits = on_logits
        self._device = device_for(plan)
        self._cache = _page_pool(plan, self._device)
        self._comm = Alone()
        self._states: dict[int, _State] = {}
        self._done: list[StepResult] = []

    def add_request(self, number: int, prompt: Sequence[int], sampling: SamplingParams) -> None:
        """Makes a request known, before the first step that holds a piece of it."""
        self._states[number] = _State(
            tokens=list(prompt), prompt_tokens=len(prompt), sampling=sampling
        )

    def known_requests(self) -> int:
        """Requests added and not ended."""
        return len(self._states)

    def warm_up(self) -> None:
        """Runs a chunk and a decode for nobody: kernels compile before time counts.

        Call before the first step: it writes pages that no request holds yet.
        """
        tokens = min(WARM_UP_TOKENS, self._plan.kv.page_tokens)
        state = _State(tokens=[0] * (tokens + 1), prompt_tokens=1, sampling=SamplingParams())
        state.grow((0, self._plan.kv.pages_per_rank - 1))
        for prefix, count in ((0, tokens), (tokens, 1)):
            row = _Row(number=-1, state=state, prefix=prefix, tokens=count, samples=True)
            with torch.inference_mode(), self._explained(f"a first step of {count} tokens"):
                self._forward([row])
                self._synchronise()

    def can_submit(self) -> bool:
        """Whether nothing is in flight."""
        return not self._done

    def in_flight(self) -> int:
        """Steps run and not yet collected."""
        return len(self._done)

    def submit(self, step: Step) -> None:
        """Runs a step to its end."""
        started_s = self._clock.now_s()
        self._apply(step)
        rows = self._rows(step)
        tokens = self._run(step.step_id, rows) if rows else {}
        finished_s = self._clock.now_s()
        self._done.append(
            StepResult(
                step=step, tokens=tokens, stage_s=(finished_s - started_s,), finished_s=finished_s
            )
        )

    def wait(self, *, until_s: float | None) -> list[StepResult]:
        """The step that was submitted; with none, sleeps until until_s."""
        if not self._done and until_s is not None:
            self._clock.sleep_until(until_s)
        done, self._done = self._done, []
        return done

    def _apply(self, step: Step) -> None:
        for number in step.ended:
            self._states.pop(number, None)  # a request may end before it was ever scheduled
        for number in step.evicted:
            if number in self._states:
                self._states[number].held = 0
        for new in step.pages:
            self._states[new.request].grow(new.pages)

    def _rows(self, step: Step) -> list[_Row]:
        decodes = zip(step.decodes.tolist(), step.decode_prefix.tolist(), strict=True)
        rows = [
            _Row(number=number, state=self._states[number], prefix=prefix, tokens=1, samples=True)
            for number, prefix in decodes
        ]
        rows += [
            _Row(
                number=chunk.request,
                state=self._states[chunk.request],
                prefix=chunk.prefix,
                tokens=chunk.tokens,
                samples=chunk.samples,
            )
            for chunk in step.chunks
        ]
        for row in rows:
            known, end = len(row.state.tokens), row.prefix + row.tokens
            assert end == known if row.samples else end < known, (row.number, end, known)
        return rows

    def _run(self, step_id: int, rows: list[_Row]) -> dict[int, int]:
        """Runs the program and draws the tokens, which join their requests."""
        sampled = [row for row in rows if row.samples]
        what = f"step {step_id} of {sum(row.tokens for row in rows)} tokens"
        with torch.inference_mode(), self._explained(what):
            drawn = self._sample(self._forward(rows), sampled)
        for row, token in zip(sampled, drawn, strict=True):
            row.state.tokens.append(token)
        return {row.number: token for row, token in zip(sampled, drawn, strict=True)}

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turns what torch and Triton raise into an error that says what ran where."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise MedhaError(
                f"{what} ran out of memory on {self._device}: {error}; free the device, or plan "
                "with fewer pages or a smaller scheduler.max_step_tokens"
            ) from error
        except RuntimeError as error:
            raise MedhaError(f"{what} failed on {self._device}: {error}") from error

    def _forward(self, rows: list[_Row]) -> Tensor:
        inputs = self._packed(rows)
        out: Tensor = self._program.forward(self._weights, inputs, self._cache, self._comm)
        return out

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _sample(self, logits_RV: Tensor, sampled: list[_Row]) -> list[int]:
        if not sampled:
            self._synchronise()  # else the step's time would be that of its launch
            return []
        positions = [len(row.state.tokens) - row.state.prompt_tokens for row in sampled]
        if self._on_logits is not None:
            for row, position, logits_V in zip(sampled, positions, logits_RV, strict=True):
                self._on_logits(row.number, position, logits_V)
        return sample(logits_RV, [row.state.sampling for row in sampled], positions)

    def _packed(self, rows: list[_Row]) -> PackedInputs:
        """Packs the rows, in their order; built in numpy and copied once a tensor."""
        page_tokens = self._plan.kv.page_tokens
        lengths = np.array([row.tokens for row in rows], dtype=np.int64)
        prefixes = np.array([row.prefix for row in rows], dtype=np.int64)
        kv_lens = prefixes + lengths
        starts = np.concatenate(([0], lengths.cumsum()))
        counts = -(-kv_lens // page_tokens)
        table = np.zeros((len(rows), counts.max()), dtype=np.int64)
        ids: list[int] = []
        for row, count, entries in zip(rows, counts.tolist(), table, strict=True):
            assert row.state.held >= count, f"request {row.number} has KV without a page"
            entries[:count] = row.state.pages[:count]
            ids += row.state.tokens[row.prefix : row.prefix + row.tokens]
        sequence = np.repeat(np.arange(len(rows)), lengths)
        positions = np.arange(len(ids)) + (prefixes - starts[:-1])[sequence]
        pages = table[sequence, positions // page_tokens]
        slots = pages * page_tokens + positions % page_tokens
        last_rows = starts[1:][[row.samples for row in rows]] - 1
        return PackedInputs(
            token_ids_T=self._tensor(np.array(ids, dtype=np.int64), torch.int64),
            hidden_TD=None,
            positions_T=self._tensor(positions, torch.int64),
            slots_T=self._tensor(slots, torch.int64),
            query_starts_B1=self._tensor(starts, torch.int32),
            kv_lens_B=self._tensor(kv_lens, torch.int32),
            page_table_BP=self._tensor(table, torch.int32),
            sample_rows_R=self._tensor(last_rows, torch.int64),
        )

    def _tensor(self, values: Ints, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(values).to(self._device, dtype)


def _page_pool(plan: Plan, device: torch.device) -> PagedCache:
    """The zeroed pages of all layers: what an unwritten slot holds must be finite."""
    model, kv = plan.model, plan.kv
    shape = (kv.pages_per_rank, kv.page_tokens, model.kv_heads, model.head_dim)
    dtype = TORCH_DTYPE[kv.dtype]
    try:
        pairs = [
            (_zeros(shape, dtype, device), _zeros(shape, dtype, device))
            for _ in range(model.layers)
        ]
    except (MemoryError, RuntimeError) as error:  # of numpy and of torch
        need = math.prod(shape) * 2 * model.layers * DTYPE_BYTES[kv.dtype]
        raise MedhaError(
            f"KV of {kv.pages_per_rank} pages needs {need / 1e9:.1f} GB on {device}, which has not "
            "as much free; free the device, or plan with a smaller --max-context"
        ) from error
    return PagedCache(
        page_tokens=kv.page_tokens,
        k_pages=[k for k, _ in pairs],
        v_pages=[v for _, v in pairs],
    )


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

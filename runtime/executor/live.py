"""Runs steps on this machine: one process, one device, the program of a bundle.

Keeps by request number what a step does not carry: the page table and the tokens, prompt and answer
so far. An eviction drops the pages and keeps the tokens, so a recomputation is nothing but chunks
over known tokens; the position in the random stream is the length of the answer, so it continues
where it was.

On a GPU a step is launched and not waited for. Tokens stay on the device for the step behind it
(runtime/parallel/resident.py), which is therefore launched before they are here; decode steps are
CUDA graphs (runtime/parallel/graphs.py), and so are most of the launches of smaller steps with
chunks (runtime/parallel/pieces.py). At most two steps are under way, the one that runs and the
next; behind a long one the next is taken late, so that a request which arrives meanwhile is in it.

On a CPU a step runs when it is submitted and is collected by the next wait. Plans of several ranks
run in runtime/parallel.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from plans.errors import BundleMismatch
from plans.mesh import coordinates
from plans.plan import Plan
from runtime.clock import Clock
from runtime.executor.ahead import Ahead
from runtime.executor.base import Chunk, Ints, NewPages, Step, StepResult
from runtime.parallel.pieces import StepGraphs
from runtime.parallel.rank import (
    NOTHING_DRAWN,
    WARM_UP_SAMPLING,
    Alone,
    Drawn,
    OnLogits,
    Rank,
    warm_up_sizes,
)
from runtime.parallel.recorder import CudaRecorder, Recorder
from runtime.parallel.resident import Residents
from runtime.parallel.stopwatch import Mark, Stopwatch
from runtime.parallel.table import Row
from runtime.program import StageProgram
from runtime.sampling_params import SamplingParams

WARM_UP_CHUNKS = (32, 8)
"""Chunks that run before time counts; on a GPU those of warm_up_sizes."""
BESIDE_TOKENS = 64
"""Of a chunk beside a decode, then."""
POLL_S = 5e-5
"""Between two looks at what the device is at."""


def device_for(plan: Plan) -> torch.device:
    """The device that runs the plan here; raises BundleMismatch where this process cannot run it.

    Device names of the plan that start with "cpu" are CPUs; everything else is a CUDA GPU.
    """
    ranks = plan.parallelism.ranks
    if ranks > 1:
        degrees = plan.parallelism
        raise BundleMismatch(
            f"the plan spreads over {ranks} ranks (tp {degrees.tp}, spp {degrees.spp}, "
            f"kvp {degrees.kvp}, replicas {degrees.replicas}); this process is one; "
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


@dataclass(kw_only=True)
class _Flying:
    """A step that was launched and not yet collected."""

    step: Step
    drawn: Drawn
    started: Mark
    ended: Mark


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
        graphs: bool = True,
        ahead: bool | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """Allocates the whole page pool at once; raises MedhaError where it does not fit.

        graphs    record decode steps where the program allows it; `warm_up` does
        ahead     take a step while one runs; None for a GPU, whose launches do not wait
        recorder  None for CUDA graphs on a GPU, and for none on a CPU
        """
        device = device_for(plan)
        on_gpu = device.type == "cuda"
        self.feeds_back = on_gpu if ahead is None else ahead
        self._clock = clock
        self._on_logits = on_logits
        self._plan = plan
        place = coordinates(plan.parallelism, 0)
        self._rank = Rank(
            plan, place, program=program, weights=weights, comm=Alone(), device=device
        )
        self._watch = Stopwatch(device)
        self._flying: deque[_Flying] = deque()
        recorder = CudaRecorder(device) if recorder is None and on_gpu else recorder
        self._graphs: StepGraphs | None = None
        with self._rank.explained("what stands beside the pages"):
            self._residents = Residents(plan, device)
            if graphs and program.recordable and recorder is not None:
                self._graphs = StepGraphs(
                    plan,
                    program,
                    self._rank.forward,
                    self._residents,
                    recorder,
                    persistent=[*weights.values(), *self._rank.cache.tensors()],
                    device=device,
                )
        self._random: set[int] = set()
        """Requests that are not greedy."""
        self._ahead = Ahead(plan)

    def add_request(self, number: int, prompt: Sequence[int], sampling: SamplingParams) -> None:
        """Makes a request known, before the first step that holds a piece of it."""
        self._rank.table.add(number, prompt, sampling)
        if not sampling.greedy:
            self._random.add(number)

    def known_requests(self) -> int:
        """Requests added and not ended."""
        return len(self._rank.table)

    def warm_up(self) -> None:
        """Runs chunks and decodes for nobody, and records the graphs, before time counts.

        Call before the first step: it writes pages that no request holds yet.
        """
        on_gpu = self._rank.device.type == "cuda"
        for size in warm_up_sizes(self._most_warm()) if on_gpu else WARM_UP_CHUNKS:
            tokens = self._warm_chunk(-1, size, first_page=0)
            if tokens:
                self._run_now(_step(decodes={-1: tokens}))
            if tokens and self._plan.limits.sequences > 1:
                pages = (tokens + 1) // self._plan.kv.page_tokens + 1
                self._warm_chunk(-2, BESIDE_TOKENS, first_page=pages, decodes={-1: tokens + 1})
            self._run_now(_step(ended=(-1, -2)))
        if self._graphs is not None:
            with torch.inference_mode():
                self._graphs.record()
            self._rank.synchronise()

    def _warm_chunk(
        self, number: int, tokens: int, *, first_page: int, decodes: dict[int, int] | None = None
    ) -> int:
        """Runs a prompt of nobody on its pages, beside decodes; its tokens, fewer if need be."""
        kv = self._plan.kv
        tokens = min(tokens, self._most_warm(first_page))
        if tokens < 1:
            return 0
        self.add_request(number, [0] * tokens, WARM_UP_SAMPLING)
        pages = range(first_page, first_page + (tokens + 1) // kv.page_tokens + 1)
        self._run_now(
            _step(
                chunks=(Chunk(request=number, tokens=tokens, prefix=0, home=0, samples=True),),
                pages=(NewPages(request=number, shard=0, pages=tuple(pages)),),
                decodes=decodes or {},
            )
        )
        return tokens

    def _most_warm(self, first_page: int = 0) -> int:
        """Tokens that a step for nobody may have on the pages from this one on."""
        kv = self._plan.kv
        room = min((kv.pages_per_rank - first_page) * kv.page_tokens, kv.tokens_per_kvp_shard)
        return min(self._plan.scheduler.max_step_tokens - 2, room - 3)

    def _run_now(self, step: Step) -> None:
        with self._rank.explained("a first step"):
            self._launch(step)
        self._rank.synchronise()
        self._collect()
        self._ahead.forget()

    def can_submit(self) -> bool:
        """Whether nothing is under way, or one step that may soon end."""
        if not self._flying or not self.feeds_back:
            return not self._flying
        return self._clock.now_s() >= self._ahead.takes_at_s()

    def in_flight(self) -> int:
        """Steps launched and not yet collected."""
        return len(self._flying)

    def submit(self, step: Step) -> None:
        """Launches a step; on a CPU, runs it to its end."""
        with self._rank.explained(f"step {step.step_id} of {step.tokens} tokens"):
            self._launch(step)

    def wait(self, *, until_s: float | None) -> list[StepResult]:
        """Waits until a step has ended, another is taken, or until_s; results in order."""
        if not self._flying:
            if until_s is not None:
                self._clock.sleep_until(until_s)
            return []
        could_submit = self.can_submit()
        while not self._watch.reached(self._flying[0].ended):
            if until_s is not None and self._clock.now_s() >= until_s:
                return []
            if self.can_submit() and not could_submit:
                return []
            time.sleep(POLL_S)
        step_id = self._flying[0].step.step_id
        with self._rank.explained(f"step {step_id}"):
            return [self._collect()]

    # --- one step -------------------------------------------------------------------------------

    def _launch(self, step: Step) -> None:
        began_s = self._clock.now_s()
        table = self._rank.table
        table.apply(step)
        self._random.difference_update(step.ended)
        started = self._watch.mark()
        with torch.inference_mode():
            self._residents.apply(step)
            self._residents.write()
            drawn = self._drawn(step)
        table.expect(drawn.numbers)
        self._flying.append(
            _Flying(step=step, drawn=drawn, started=started, ended=self._watch.mark())
        )
        self._ahead.launched(step, began_s=began_s, now_s=self._clock.now_s())

    def _drawn(self, step: Step) -> Drawn:
        """Launches the program and what follows it."""
        if not step.tokens:
            return NOTHING_DRAWN
        rows = self._rank.table.rows(step)
        numbers = [row.number for row in rows]
        residents = self._residents
        places = residents.places(numbers)
        unfed = residents.unfed([row.number for row in rows if row.tokens == 1 and row.samples])
        if unfed:
            last = {row.number: row.state.tokens[-1] for row in rows}
            residents.feed(unfed, [last[number] for number in unfed])
        if self._graphs is not None and self._graphs.takes(rows):
            return self._replayed(rows, places)
        inputs, place_R = residents.inputs(rows, places)
        drawn = self._rank.draw(self._rank.forward(inputs), rows, self._on_logits)
        if drawn.drawn_2R is not None:
            residents.keep(place_R, drawn.drawn_2R[0])
            residents.kept(drawn.numbers)
        return drawn

    def _replayed(self, rows: Sequence[Row], places: Ints) -> Drawn:
        """The same by graphs."""
        assert self._graphs is not None, "asked for only with graphs"
        place_R, logits_RV, drawn_2R = self._graphs.run(rows, places)
        sampled = [row.number for row in rows if row.samples]
        self._residents.kept(sampled)
        if self._on_logits is None and self._random.isdisjoint(sampled):
            return Drawn(sampled, drawn_2R) if sampled else NOTHING_DRAWN
        drawn = self._rank.draw(logits_RV, rows, self._on_logits)
        if drawn.drawn_2R is not None:
            self._residents.keep(place_R, drawn.drawn_2R[0])
        return drawn

    def _collect(self) -> StepResult:
        """What came of the oldest step, whose end the device has reached."""
        flying = self._flying.popleft()
        seconds = self._watch.seconds(flying.started, flying.ended)
        tokens = flying.drawn.tokens()
        self._rank.table.append(tokens.items())
        now_s = self._clock.now_s()
        self._ahead.collected(seconds, now_s)
        return StepResult(step=flying.step, tokens=tokens, stage_s=(seconds,), finished_s=now_s)


def _step(
    *,
    chunks: tuple[Chunk, ...] = (),
    pages: tuple[NewPages, ...] = (),
    ended: tuple[int, ...] = (),
    decodes: Mapping[int, int] = MappingProxyType({}),
) -> Step:
    """A step for nobody; decodes are prefixes by request."""
    return Step(
        step_id=-1,
        decodes=np.array(list(decodes), dtype=np.int64),
        decode_prefix=np.array(list(decodes.values()), dtype=np.int64),
        decode_home=np.zeros(len(decodes), dtype=np.int64),
        chunks=chunks,
        pages=pages,
        ended=ended,
    )

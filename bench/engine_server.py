"""One engine over one live executor, for many runs one after the other, with what it took."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.engine_load import (
    NEW_TOKENS,
    SHORT,
    Ask,
    Outcome,
    Row,
    StepLog,
    burst_load,
    burst_row,
    host_of,
    median,
    mixed_load,
    mixed_row,
    predictions,
    with_budget,
)
from plans.plan import Plan
from runtime.clock import WallClock
from runtime.engine import Engine
from runtime.executor.base import Step, StepResult
from runtime.executor.live import LiveExecutor
from runtime.request import Request
from runtime.sampling_params import SamplingParams
from runtime.scheduler import load_policy

GREEDY = SamplingParams()
BLOCK = 1_000_000
"""Request numbers of one engine."""
LEAD_S = 0.5
"""Between asking for a load and its start."""


@dataclass
class Timed:
    """The executor, with the host's seconds in each call."""

    inner: LiveExecutor
    submit_s: list[tuple[bool, float]] = field(default_factory=list)
    """(has chunks, seconds) by step."""
    decided_s: float = math.nan
    """What the step that comes next took to be decided."""
    host: dict[int, tuple[float, float]] = field(default_factory=dict)
    """(deciding, launching) seconds of a step, by its number; shared with the log."""

    @property
    def feeds_back(self) -> bool:
        return self.inner.feeds_back

    def can_submit(self) -> bool:
        return self.inner.can_submit()

    def submit(self, step: Step) -> None:
        began_s = time.perf_counter()
        self.inner.submit(step)
        seconds = time.perf_counter() - began_s
        self.submit_s.append((bool(step.chunks), seconds))
        self.host[step.step_id] = self.decided_s, seconds

    def in_flight(self) -> int:
        return self.inner.in_flight()

    def wait(self, *, until_s: float | None) -> list[StepResult]:
        return self.inner.wait(until_s=until_s)


class Server:
    """One engine over one executor, for many runs one after the other."""

    def __init__(
        self, plan: Plan, executor: LiveExecutor, clock: WallClock, *, first: int = 0
    ) -> None:
        """first is the number of its first request: other engines used others."""
        self._first = first
        self._others = itertools.count(first + BLOCK, BLOCK)
        self.plan = plan
        self.clock = clock
        self.log = StepLog(plan)
        self.executor = Timed(executor, host=self.log.host)
        self.times: dict[int, list[float]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.decide_s: list[float] = []
        self._now_s = 0.0
        self.engine = Engine(
            plan,
            self.executor,
            clock,
            load_policy(plan.scheduler.policy, plan.scheduler),
            on_token=self._take,
            observer=self,
            learn=True,
            ahead=executor.feeds_back,
        )
        decide = self.engine.decide

        def timed(now_s: float) -> Step | None:
            began_s = time.perf_counter()
            step = decide(now_s)
            self.decide_s.append(time.perf_counter() - began_s)
            if step is not None:
                self.executor.decided_s = self.decide_s[-1]
            return step

        self.engine.decide = timed  # type: ignore[method-assign]

    def _take(self, number: int, token: int) -> None:
        self.times[number].append(self._now_s)
        self.tokens[number].append(token)

    def arrived(self, sequence: Any, now_s: float) -> None:
        """Nothing to note."""

    def submitted(self, step: Step, now_s: float) -> None:
        """Notes the step."""
        self.log.submitted(step, now_s)

    def collected(self, result: StepResult) -> None:
        """Notes the step, and the time of the tokens that follow."""
        self.log.collected(result)
        self._now_s = result.finished_s

    def ended(self, record: Any, now_s: float) -> None:
        """Nothing to note."""

    def ask(
        self,
        prompt: list[int],
        new_tokens: int,
        *,
        at_s: float | None = None,
        sampling: SamplingParams = GREEDY,
    ) -> int:
        """A request that arrives then, or now; its number."""
        number = self._first + len(self.times)
        self.times[number], self.tokens[number] = [], []
        self.executor.inner.add_request(number, prompt, sampling)
        self.engine.add(
            Request(
                number=number,
                arrival_s=self.clock.now_s() if at_s is None else at_s,
                prompt_tokens=len(prompt),
                max_tokens=new_tokens,
            )
        )
        return number

    def run(self) -> float:
        """Serves until nothing is left; the seconds it took."""
        began_s = self.clock.now_s()
        self.engine.run()
        return self.clock.now_s() - began_s

    def serve(self, load: Sequence[Ask]) -> Outcome:
        """A load, from its start to its end."""
        vocab, before = self.plan.model.vocab, len(self.log.steps)
        prompts = [prompt_of(ask.tokens, vocab, ask.seed) for ask in load]
        start_s = self.clock.now_s() + LEAD_S
        numbers = [
            self.ask(prompt, NEW_TOKENS, at_s=start_s + ask.at_s)
            for ask, prompt in zip(load, prompts, strict=True)
        ]
        self.run()
        steps = [
            each | {name: each[name] - start_s for name in ("packed_s", "ended_s")}
            for each in self.log.steps[before:]
        ]
        times = [[at_s - start_s for at_s in self.times[number]] for number in numbers]
        return Outcome(load=load, times=times, steps=steps)

    def with_budget(self, budget_s: float) -> "Server":
        """Another engine over the executor, whose steps may take as long while others decode."""
        plan = with_budget(self.plan, budget_s)
        return Server(plan, self.executor.inner, self.clock, first=next(self._others))

    def host_ms(self, since: tuple[int, int]) -> dict[str, float]:
        """Median host time of launching a step and of deciding one, since `marks()`."""
        submits = self.executor.submit_s[since[0] :]
        return {
            "submit_chunk_ms": 1e3 * median([each for chunks, each in submits if chunks]),
            "submit_decode_ms": 1e3 * median([each for chunks, each in submits if not chunks]),
            "decide_ms": 1e3 * median(self.decide_s[since[1] :]),
        }

    def marks(self) -> tuple[int, int]:
        """Where `host_ms` is to begin."""
        return len(self.executor.submit_s), len(self.decide_s)

    def ttft_s(self, number: int) -> float:
        """Of a request that has ended."""
        record = next(each for each in self.engine.records if each.request.number == number)
        return record.first_token_s - record.request.arrival_s

    def gaps_s(self, number: int) -> list[float]:
        """Between its tokens."""
        return np.diff(np.array(self.times[number])).tolist()

    @contextmanager
    def watching(self) -> Iterator[dict[tuple[int, int], Any]]:
        """Runs inside leave the logits of each token, by (request, tokens before)."""
        seen: dict[tuple[int, int], Any] = {}
        inner = self.executor.inner
        inner._on_logits = lambda number, at, each_V: seen.__setitem__(  # noqa: SLF001
            (number, at), each_V.cpu()
        )
        try:
            yield seen
        finally:
            inner._on_logits = None  # noqa: SLF001

    @contextmanager
    def mode(self, *, graphs: bool, ahead: bool) -> Iterator[None]:
        """Runs inside differ in how steps are launched."""
        inner = self.executor.inner
        kept = inner._graphs, inner.feeds_back  # noqa: SLF001 - one pool, so one executor
        if not graphs:
            inner._graphs = None  # noqa: SLF001
        inner.feeds_back = self.engine.book.ahead = ahead and kept[1]
        try:
            yield
        finally:
            inner._graphs, inner.feeds_back = kept  # noqa: SLF001
            self.engine.book.ahead = kept[1]


Figures = Callable[[Outcome], Row]


@dataclass(frozen=True)
class Loads:
    """The loads that are served, and where their steps are kept."""

    steps: list[Row]
    long_tokens: int
    burst: int
    duration_s: float

    def at_once(self, server: Server, budget_s: float) -> Iterator[Row]:
        """A burst, with steps of such a length."""
        about = {"part": "burst"}
        yield from self._rows(about, server, budget_s, load=burst_load(self.burst), of=burst_row)

    def mixed(self, server: Server, budget_s: float, seed: int) -> Iterator[Row]:
        """Short prompts at random times, and a long one."""
        load = mixed_load(seed, self.long_tokens, self.duration_s)
        about = {"part": "mixed", "seed": seed, "load_s": self.duration_s}
        yield from self._rows(about, server, budget_s, load=load, of=mixed_row)

    def _rows(
        self, about: Row, server: Server, budget_s: float, *, load: Sequence[Ask], of: Figures
    ) -> Iterator[Row]:
        """Figures of a load as it was measured, and as it is predicted.

        server  has served prompts alone, by which the host's times are known
        """
        chosen = server.with_budget(budget_s)
        since, plan = chosen.marks(), chosen.plan
        policy = plan.scheduler.policy
        measured = chosen.serve(load)
        row = about | {"kind": "measured", "policy": policy, "step_budget_s": budget_s}
        yield row | of(measured) | chosen.host_ms(since)
        place = {"part": row["part"], "step_budget_s": budget_s, "seed": row.get("seed", "")}
        self.steps.extend(place | step for step in measured.steps)
        lone = host_of(server.log.steps, SHORT)
        for kind, outcome in predictions(plan, load, measured, policy, lone):
            yield row | {"kind": kind} | of(outcome)


def prompt_of(tokens: int, vocab: int, seed: int) -> list[int]:
    """Random token ids."""
    ids: list[int] = np.random.default_rng((seed, tokens)).integers(0, vocab, tokens).tolist()
    return ids

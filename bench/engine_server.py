"""One engine over one live executor, for many runs one after the other, with what it took."""

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

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


@dataclass
class Timed:
    """The executor, with the host's seconds in each call."""

    inner: LiveExecutor
    submit_s: list[tuple[bool, float]] = field(default_factory=list)
    """(has chunks, seconds) by step."""

    @property
    def feeds_back(self) -> bool:
        return self.inner.feeds_back

    def can_submit(self) -> bool:
        return self.inner.can_submit()

    def submit(self, step: Step) -> None:
        began_s = time.perf_counter()
        self.inner.submit(step)
        self.submit_s.append((bool(step.chunks), time.perf_counter() - began_s))

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
        self.executor = Timed(executor)
        self.times: dict[int, list[float]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.decide_s: list[float] = []
        self._now_s = 0.0
        self.steps: list[tuple[int, int, float]] = []
        """(decodes, chunk tokens, seconds on the device)."""
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
            return step

        self.engine.decide = timed  # type: ignore[method-assign]

    def _take(self, number: int, token: int) -> None:
        self.times[number].append(self._now_s)
        self.tokens[number].append(token)

    def arrived(self, sequence: Any, now_s: float) -> None:
        """Nothing to note."""

    def submitted(self, step: Step, now_s: float) -> None:
        """Nothing to note."""

    def collected(self, result: StepResult) -> None:
        step = result.step
        chunked = sum(chunk.tokens for chunk in step.chunks)
        self.steps.append((len(step.decodes), chunked, sum(result.stage_s)))
        self._now_s = result.finished_s

    def ended(self, record: Any, now_s: float) -> None:
        """Nothing to note."""

    def ask(
        self,
        prompt: list[int],
        new_tokens: int,
        *,
        in_s: float = 0.0,
        sampling: SamplingParams = GREEDY,
    ) -> int:
        """A request that arrives so many seconds from now; its number."""
        number = self._first + len(self.times)
        self.times[number], self.tokens[number] = [], []
        self.executor.inner.add_request(number, prompt, sampling)
        self.engine.add(
            Request(
                number=number,
                arrival_s=self.clock.now_s() + in_s,
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

    def with_budget(self, budget_s: float) -> "Server":
        """Another engine over the executor, whose steps may take as long while others decode."""
        scheduler = msgspec.structs.replace(self.plan.scheduler, step_budget_s=budget_s)
        plan = msgspec.structs.replace(self.plan, scheduler=scheduler)
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


def prompt_of(tokens: int, vocab: int, seed: int) -> list[int]:
    """Random token ids."""
    ids: list[int] = np.random.default_rng((seed, tokens)).integers(0, vocab, tokens).tolist()
    return ids


def median(values: list[float]) -> float:
    """Or NaN for none."""
    return float(np.median(values)) if values else math.nan


def percentile(values: list[float], share: float) -> float:
    """Nearest rank."""
    return float(np.quantile(values, share, method="inverted_cdf")) if values else math.nan

"""Replicas: independent engines side by side, each over an executor of its own, in a thread each.

A failure of one ends what it had to do and leaves the others at work.
"""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from plans.errors import MedhaError
from plans.plan import Plan
from runtime.clock import Clock
from runtime.engine import Engine
from runtime.executor.base import Executor, Step, StepResult
from runtime.request import Record, Request
from runtime.request import Sequence as Live
from runtime.sampling_params import SamplingParams
from runtime.scheduler import Scheduling

_LOG = logging.getLogger(__name__)


class TokenExecutor(Executor, Protocol):
    """An executor that computes tokens, on one rank or many."""

    @property
    def feeds_back(self) -> bool:
        """Whether a step may name a decode whose last token is still in flight."""
        ...

    def add_request(self, number: int, prompt: Sequence[int], sampling: SamplingParams) -> None:
        """Makes a request known, before the first step that holds a piece of it."""
        ...


class Sink(Protocol):
    """Where tokens go; called from the threads of all replicas."""

    def take(self, number: int, token: int, now_s: float) -> str | None:
        """A request's next token; the reason to stop, if it is one."""
        ...

    def collected(self, result: StepResult) -> None:
        """A step has left the last stage; its tokens follow."""
        ...

    def ended(self) -> None:
        """A request has ended."""
        ...


class Replica:
    """One engine, its observer and its token sink."""

    def __init__(
        self,
        plan: Plan,
        executor: TokenExecutor,
        clock: Clock,
        scheduling: Scheduling,
        *,
        sink: Sink,
    ) -> None:
        """Starts empty."""
        self.engine = Engine(
            plan,
            executor,
            clock,
            scheduling,
            on_token=self._take,
            observer=self,
            learn=True,
            ahead=executor.feeds_back,
        )
        self.error: MedhaError | None = None
        """Why it broke off, if it did."""
        self._executor = executor
        self._sink = sink
        self._now_s = 0.0
        self._stopped = threading.Event()

    def work_s(self, prompt_tokens: int) -> float:
        """Predicted seconds of a lone prefill."""
        return self.engine.book.work.solo_s(prompt_tokens)

    def add(self, request: Request, prompt: Sequence[int], sampling: SamplingParams) -> None:
        """Takes a request; raises Refused as the engine does."""
        self.engine.add(request)
        self._executor.add_request(request.number, prompt, sampling)

    def serve(self) -> None:
        """Runs the engine to its end, or until its executor fails or it is told to stop."""
        try:
            while not self._stopped.is_set() and self.engine.tick():
                pass
        except MedhaError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001 - whatever it is, each request gets its line
            self.error = MedhaError(f"the engine failed: {type(error).__name__}: {error}")
            self.error.__cause__ = error
            _LOG.debug("the engine failed", exc_info=error)
        self.engine.close("failed")  # nothing is left of a run that came to its end

    def stop(self) -> None:
        """Ends `serve` after its next event."""
        self._stopped.set()

    def _take(self, number: int, token: int) -> str | None:
        return self._sink.take(number, token, self._now_s)

    def arrived(self, sequence: Live, now_s: float) -> None:
        """Nothing to note."""

    def submitted(self, step: Step, now_s: float) -> None:
        """Nothing to note."""

    def collected(self, result: StepResult) -> None:
        """Keeps the time of the tokens that follow."""
        self._now_s = result.finished_s
        self._sink.collected(result)

    def ended(self, record: Record, now_s: float) -> None:
        """Counts the request."""
        self._sink.ended()


def serve_all(replicas: Sequence[Replica]) -> MedhaError | None:
    """Lets every engine come to its end; the first error of one, if any."""
    stopped: MedhaError | None = None
    if len(replicas) == 1:
        replicas[0].serve()
    else:
        with ThreadPoolExecutor(len(replicas)) as threads:
            ends = [threads.submit(replica.serve) for replica in replicas]
            try:
                for end in ends:
                    end.result()
            except BaseException as error:  # told to end, interrupted, or a bug in one of them
                for replica in replicas:
                    replica.stop()
                if not isinstance(error, MedhaError):
                    raise
                stopped = error
    return next((each.error for each in replicas if each.error is not None), stopped)

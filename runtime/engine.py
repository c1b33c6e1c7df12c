"""The engine loop: admit, pack, submit, collect, retire. One loop for simulation and live runs.

Time comes from the clock, work goes to the executor, decisions come from the packer. The first
stage is never left waiting for a result that the next step does not need: with several stages,
steps follow each other as soon as the first stage is free.
"""

import heapq
import math
from array import array
from collections import deque
from collections.abc import Callable, MutableSequence
from typing import Protocol

from plans.errors import Refused
from plans.plan import Plan
from runtime.book import Book
from runtime.clock import Clock
from runtime.executor.base import Chunk, Executor, Step, StepResult
from runtime.request import NEVER, Record, Request, Sequence
from runtime.scheduler import Scheduling
from runtime.scheduler.compose import composer_of

OnToken = Callable[[int, int], str | None]
"""(request number, token) -> why the request stops here ("stop"), or None to go on."""


LEARNING_RATE = 0.1
"""Weight of the newest step in the overrun: about ten steps of memory."""


class Observer(Protocol):
    """Hears of everything that happens, for progress, timelines and logs; changes nothing."""

    def arrived(self, sequence: Sequence, now_s: float) -> None:
        """A request was admitted."""
        ...

    def submitted(self, step: Step, now_s: float) -> None:
        """A step entered the first stage."""
        ...

    def collected(self, result: StepResult) -> None:
        """A step left the last stage."""
        ...

    def ended(self, record: Record, now_s: float) -> None:
        """A request finished, was cancelled or was refused."""
        ...


class Log(Protocol):
    """Keeps every input of the decisions, in order (decisions.py)."""

    def arrived(self, request: Request, now_s: float) -> None:
        """A request was admitted."""
        ...

    def cancelled(self, number: int, now_s: float) -> None:
        """A request was cancelled from outside."""
        ...

    def packed(self, step: Step | None, now_s: float) -> None:
        """The composer was asked for a step."""
        ...

    def collected(self, result: StepResult, stops: dict[int, str]) -> None:
        """A step ended; stops are the requests that ended by their text."""
        ...

    def closed(self, reason: str, now_s: float) -> None:
        """The run is over: whoever had not ended was recorded with the reason."""
        ...


def _kept_gaps(keep: int | None) -> MutableSequence[float]:
    return array("d") if keep is None else deque(maxlen=keep)


class Engine:
    """Serves requests on one replica of a plan."""

    def __init__(
        self,
        plan: Plan,
        executor: Executor,
        clock: Clock,
        scheduling: Scheduling,
        *,
        on_token: OnToken | None = None,
        observer: Observer | None = None,
        log: Log | None = None,
        learn: bool = False,
        ahead: bool = False,
        keep: int | None = None,
    ) -> None:
        """Starts empty.

        on_token  called for each token of a live run, in order
        learn     correct the step-time formula by measured steps (live runs)
        ahead     the executor feeds tokens back on the device, so that a request's next token is
                  packed before its last one is here; what it computes beyond a stop is dropped
        keep      the newest records, and gaps of each class, that stay in memory; None keeps all,
                  as a simulation of known length needs. The observer has every record in any case
        """
        self.book = Book(plan, ahead=ahead)
        self.records: deque[Record] = deque(maxlen=keep)
        """Of requests that ended, in the order of their ends."""
        self.gaps = {"short": _kept_gaps(keep), "long": _kept_gaps(keep)}
        """Seconds between tokens, by class of the request."""
        self._plan = plan
        self._executor = executor
        self._clock = clock
        self._packer = composer_of(self.book, scheduling)
        self._on_token = on_token
        self._observer = observer
        self._log = log
        self._stops: dict[int, str] = {}
        self._retiring = False
        self._cancels: list[int] = []
        """Requests cancelled while a step is retired."""
        self._learn = learn
        self._arrivals: list[tuple[float, int, Request]] = []
        self._coming: set[int] = set()
        """Numbers of those."""

    def add(self, request: Request) -> None:
        """Takes a request that arrives at its arrival_s, now or later; its number is new.

        A target may be infinite: then any time will do. Raises Refused where it can never be
        served: it is longer than the context limit, has no tokens, or a time that is no number.
        """
        targets = (request.ttft_target_s, request.tbt_target_s)
        known = all(each is None or each > -math.inf for each in targets)
        if not math.isfinite(request.arrival_s) or not known:
            raise Refused(
                f"request {request.number}: arrival {request.arrival_s} s, targets {targets[0]} "
                f"and {targets[1]} s; an arrival must be finite, a target a number or infinite"
            )
        limit = self._plan.limits.context_tokens
        if request.prompt_tokens < 1 or request.max_tokens < 1:
            raise Refused(
                f"request {request.number}: {request.prompt_tokens} prompt tokens and "
                f"{request.max_tokens} new ones; both must be at least 1"
            )
        if request.prompt_tokens + request.max_tokens > limit:
            raise Refused(
                f"request {request.number}: {request.prompt_tokens} prompt tokens and up to "
                f"{request.max_tokens} new ones exceed the context limit of {limit} tokens; "
                f"nearest: max_tokens {max(limit - request.prompt_tokens, 0)}"
            )
        if request.number in self._coming or request.number in self.book.sequences:
            raise Refused(
                f"request {request.number}: another request has this number; take a new one"
            )
        self._coming.add(request.number)
        heapq.heappush(self._arrivals, (request.arrival_s, request.number, request))

    def cancel(self, number: int) -> None:
        """Ends a request in whatever state it is; does nothing where it has ended already.

        Called while a step is retired (from on_token, or by an observer), it acts as soon as that
        is done: half of a step's results are no state that a log could hold.
        """
        if self._retiring:
            self._cancels.append(number)
            return
        early = [entry for entry in self._arrivals if entry[1] == number]
        if not early and number not in self.book.sequences:
            return
        now_s = self._clock.now_s()
        if self._log is not None:
            self._log.cancelled(number, now_s)
        for entry in early:
            self._arrivals.remove(entry)
            self._coming.discard(number)
            heapq.heapify(self._arrivals)
        self.forget(number, now_s)

    def forget(self, number: int, now_s: float) -> None:
        """Ends a request that was cancelled, whether it has arrived or not."""
        if number in self.book.sequences:
            self._end(self.book.sequences[number], "cancelled", now_s)
        else:
            self.book.ended.append(number)  # an executor may hold its prompt already

    def run(self, until_s: float | None = None) -> None:
        """Serves until nothing is left, or the clock passes until_s.

        Requests that have not ended by then stay in the book; `close` records them.
        """
        while self.tick(until_s):
            pass

    def close(self, reason: str = "unfinished") -> None:
        """Records every request that has arrived and not ended, as unfinished or as failed."""
        now_s = self._clock.now_s()
        self._retiring = True  # nobody is left to cancel when this is done
        for sequence in list(self.book.sequences.values()):
            self._end(sequence, reason, now_s)
        self._retiring, self._cancels = False, []
        if self._log is not None:
            self._log.closed(reason, now_s)

    def tick(self, until_s: float | None = None) -> bool:
        """One turn of the loop; False when there is nothing more to do."""
        executor = self._executor
        self._admit()
        while executor.can_submit():
            step = self.decide(self._clock.now_s())
            if step is None:
                break
            executor.submit(step)
        wake_s = self._arrivals[0][0] if self._arrivals else None
        if until_s is not None:
            wake_s = until_s if wake_s is None else min(wake_s, until_s)
        if not executor.in_flight():
            if not self._arrivals:
                assert not self.book.sequences, "requests wait and nothing runs"
                return False
            # not the clock: an executor of many processes looks after them while it waits
            executor.wait(until_s=wake_s)
        else:
            for result in executor.wait(until_s=wake_s):
                self.collect(result)
        return until_s is None or self._clock.now_s() < until_s

    def _admit(self) -> None:
        if not self._arrivals:
            return
        now_s = self._clock.now_s()
        while self._arrivals and self._arrivals[0][0] <= now_s:
            _, number, request = heapq.heappop(self._arrivals)
            self._coming.discard(number)
            self.admit(request, now_s)

    def admit(self, request: Request, now_s: float) -> None:
        """Lets a request wait from now on; the loop does this when its arrival is over."""
        sequence = self.book.arrive(request)
        if self._log is not None:
            self._log.arrived(request, now_s)
        if self._observer is not None:
            self._observer.arrived(sequence, now_s)

    def decide(self, now_s: float) -> Step | None:
        """The next step by one reading of the clock, or None where nothing can run now."""
        step = self._packer.pack(now_s)
        if self._log is not None:
            self._log.packed(step, now_s)
        if step is not None and self._observer is not None:
            self._observer.submitted(step, now_s)
        return step

    def collect(self, result: StepResult) -> None:
        """Retires a step: cursors, first tokens, decodes, ends."""
        self._retiring = True
        try:
            self._retire(result)
        finally:
            self._retiring = False
        cancels, self._cancels = self._cancels, []
        for number in cancels:
            self.cancel(number)

    def _retire(self, result: StepResult) -> None:
        if self._observer is not None:
            self._observer.collected(result)
        if self._learn:
            self._learn_from(result)
        now_s = result.finished_s
        for chunk in result.step.chunks:
            sequence = self.book.sequences.get(chunk.request)
            if sequence is not None:
                self._collect_chunk(sequence, chunk, result)
        self._collect_decodes(result, now_s)
        if self._log is not None:
            self._log.collected(result, self._stops)
        self._stops = {}

    def _collect_chunk(self, sequence: Sequence, chunk: Chunk, result: StepResult) -> None:
        now_s = result.finished_s
        sequence.computed += chunk.tokens
        sequence.in_flight -= 1
        if sequence.first_chunk_s != sequence.first_chunk_s:  # NaN: the first one
            sequence.first_chunk_s = now_s
        if not chunk.samples:
            return
        sequence.generated += 1
        if sequence.first_token_s != sequence.first_token_s:
            sequence.first_token_s = now_s
        else:  # a recomputed request goes on where it was
            self.gaps["long" if sequence.long else "short"].append(now_s - sequence.last_token_s)
        sequence.last_token_s = now_s
        reason = self._stop_reason(sequence.number, result)
        if reason is None and sequence.generated >= sequence.request.max_tokens:
            reason = "length"
        if reason is not None:
            self._end(sequence, reason, now_s)
        else:
            self.book.decode(sequence, now_s)

    def _collect_decodes(self, result: StepResult, now_s: float) -> None:
        short, long, on_token = self.gaps["short"], self.gaps["long"], self._on_token
        ending: list[tuple[Sequence, str]] = []
        for sequence in self.book.running.among(result.step.decodes.tolist()):
            (long if sequence.long else short).append(now_s - sequence.last_token_s)
            sequence.last_token_s = now_s
            sequence.computed += 1
            sequence.generated += 1
            sequence.in_flight -= 1
            reason = None if on_token is None else self._stop_reason(sequence.number, result)
            if reason is None and sequence.generated >= sequence.request.max_tokens:
                reason = "length"
            if reason is not None:
                ending.append((sequence, reason))
        for sequence, reason in ending:
            self._end(sequence, reason, now_s)

    def _stop_reason(self, number: int, result: StepResult) -> str | None:
        if self._on_token is None:
            return None
        reason = self._on_token(number, result.tokens[number])
        if reason is not None:
            self._stops[number] = reason
        return reason

    def _end(self, sequence: Sequence, reason: str, now_s: float) -> None:
        self.book.end(sequence)
        record = Record(
            request=sequence.request,
            deadline_s=sequence.deadline_s,
            work_s=sequence.work_s,
            first_chunk_s=sequence.first_chunk_s,
            first_token_s=sequence.first_token_s,
            finished_s=now_s if reason in {"length", "stop"} else NEVER,
            generated=sequence.generated,
            evictions=sequence.evictions,
            recomputed_tokens=sequence.prefix_lost,
            reason=reason,
        )
        self.records.append(record)
        if self._observer is not None:
            self._observer.ended(record, now_s)

    def _learn_from(self, result: StepResult) -> None:
        """Moves the overrun a little towards what the step took beyond the formula.

        It is a sum and not a factor: what a real step has and the formula lacks is host time, much
        the same for one decode as for a large chunk. A factor learnt from short decode steps would
        shrink every chunk after them, and each of those would take as long all the same.
        """
        beyond_s = sum(result.stage_s) - self._packer.predicted_s(result.step)
        self._packer.overrun_s += LEARNING_RATE * (beyond_s - self._packer.overrun_s)

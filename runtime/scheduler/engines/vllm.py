"""vLLM's steps: one token budget, requests in order of admission, no distinction of phases.

Running requests first, decodes and unfinished prefills alike, each as many tokens as it lacks and
the budget has left. Then waiting ones, until budget, sequences or pages end; one is admitted only
if its whole prompt fits, and the first that does not stops the scan. On shortage of pages the last
admitted loses its own and returns to the head of the queue (it arrived before all that wait); no
one is admitted in such a step. `threshold` caps the tokens of one request a step.

    adaptive  the cap rises to budget / (running + waiting)
    ahead     a step is decided while the one before it runs, as in asynchronous scheduling
    always    the cap holds for a lone request too, as up to version 0.25
"""

from runtime.book import Book
from runtime.executor.base import Step
from runtime.request import Sequence
from runtime.scheduler import Scheduling
from runtime.scheduler.engines.base import Draft, EngineSteps
from runtime.scheduler.memory import Room


class VllmSteps(EngineSteps):
    """vllm/v1/core/sched/scheduler.py without speculation, prefix cache and connectors."""

    def __init__(self, book: Book, scheduling: Scheduling) -> None:
        """Budget, cap and switches of the scheduling."""
        super().__init__(book, scheduling)
        self._cap = scheduling.request_tokens
        self._switches = frozenset(scheduling.options)
        self._before_s = float("inf")
        """Start of the step before, when `ahead` decides the next one."""

    def pack(self, now_s: float) -> Step | None:
        """The next step; None where nothing can run now."""
        step = super().pack(now_s)
        if step is not None and "ahead" in self._switches:
            self._before_s = now_s
        return step

    def compose(self, now_s: float) -> Draft:
        """Running requests, then waiting ones."""
        draft = Draft(left=self.budget_tokens)
        cap = self._most_of_one()
        enough = self._running(draft, cap)
        if enough:
            self._waiting(draft, cap, now_s, seen_s=self._before_s)
            if draft.empty and self._before_s < now_s:
                # nothing was left to decide ahead, so this step is decided now
                self._waiting(draft, cap, now_s, seen_s=now_s)
        return draft

    def victim(self, draft: Draft, taker: Sequence) -> Sequence | None:
        """The last admitted."""
        return self.book.sequences[self.admitted[-1]]

    def _most_of_one(self) -> int:
        live = len(self.book.sequences)
        if self._cap is None or (live == 1 and "always" not in self._switches):
            return self.budget_tokens
        if "adaptive" in self._switches:
            return max(self._cap, self.budget_tokens // max(live, 1))
        return self._cap

    def _running(self, draft: Draft, cap: int) -> bool:
        """Whether there were pages enough: nobody lost its own or went without."""
        book = self.book
        before = len(self.admitted)
        index = 0
        while index < len(self.admitted) and draft.left > 0:
            sequence = book.sequences[self.admitted[index]]
            index += 1
            if sequence.number in book.waiting:
                tokens = self.piece(sequence, min(draft.left, cap))
            elif sequence.number in book.running:
                tokens = 0 if sequence.in_flight else 1
            else:
                tokens = 0  # its last chunk is in flight
            if not tokens:
                continue
            if self.room(draft, sequence, tokens) is not Room.YES:
                return False
            if sequence.number in book.running:
                draft.decodes.append(sequence.number)
                draft.left -= 1
            else:
                self.place(draft, sequence, tokens)
        return len(self.admitted) == before

    def _waiting(self, draft: Draft, cap: int, now_s: float, *, seen_s: float) -> None:
        for sequence in self.waiting(now_s, seen_s=seen_s):
            if draft.left <= 0 or self.full or not self.whole_fits(sequence):
                return
            self.admit(draft, sequence, self.piece(sequence, min(draft.left, cap)))

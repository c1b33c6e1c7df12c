"""LMDeploy's steps (PyTorch engine): prefill and decode take turns, and so do short and long.

Prefill is due when 16 decode steps have passed, or a budget of tokens waits, or fewer than half the
sequences run. A prefill step is either one chunk of the active long prompt or whole short prompts,
fewest tokens first, up to the budget; after up to three short turns comes the long one, and after
that decode goes first. Long means more than a budget of tokens to do: the last piece of a long
prompt counts as short. On shortage of pages the request that was admitted last is recomputed; a
prefill takes pages from prefills admitted after it alone.
"""

from collections.abc import Callable

from runtime.book import Book
from runtime.request import Sequence
from runtime.scheduler import Scheduling
from runtime.scheduler.engines.base import Draft, EngineSteps
from runtime.scheduler.memory import Room

DECODE_STEPS = 16
SHORT_TURNS = 3


class LmdeploySteps(EngineSteps):
    """lmdeploy/pytorch/paging/scheduler.py and engine/inputs_maker.py without its caches."""

    def __init__(self, book: Book, scheduling: Scheduling) -> None:
        """Budget of the scheduling; its policy picks the next long prompt."""
        super().__init__(book, scheduling)
        self._decode_steps = 0
        """Since the last prefill."""
        self._short_turns = 0
        """Since the last chunk of a long prompt, while one waits."""
        self._after_long = False

    def compose(self, now_s: float) -> Draft:
        """The kind of step that is due, else the other."""
        decode_first = self._after_long or not self._due()
        kinds: list[Callable[[Draft, float], None]] = [self._prefill, self._decode]
        draft = Draft(left=self.budget_tokens)
        for kind in reversed(kinds) if decode_first else kinds:
            kind(draft, now_s)
            if not draft.empty:
                break
        return draft

    def victim(self, draft: Draft, taker: Sequence) -> Sequence | None:
        """The last admitted; for a prefill, among prefills that were admitted after it."""
        if taker.number in self.book.running:
            return self.book.sequences[self.admitted[-1]]
        placed = {sequence.number for sequence, _ in draft.chunks}
        later = self.admitted[self.admitted.index(taker.number) + 1 :]
        left = [each for each in later if each in self.book.waiting and each not in placed]
        return self.book.sequences[left[-1]] if left else None

    def _due(self) -> bool:
        waiting = self.book.waiting
        return (
            self._decode_steps >= DECODE_STEPS
            or int(waiting["missing_tokens"].sum()) >= self.budget_tokens
            or 2 * len(self.book.running) < self.most_sequences
        )

    def _decode(self, draft: Draft, now_s: float) -> None:
        self.place_decodes(draft)
        if draft.decodes:
            self._decode_steps += 1
            self._after_long = False

    def _prefill(self, draft: Draft, now_s: float) -> None:
        waiting = list(self.waiting(now_s))
        started = self.started()
        shorts = [each for each in started + waiting if each.missing <= self.budget_tokens]
        shorts.sort(key=lambda each: (each.missing, each.number))
        longs = [each for each in started + waiting if each.missing > self.budget_tokens]
        if longs and (not shorts or self._short_turns >= SHORT_TURNS):
            if not self._long_turn(draft, longs):
                self._short_turn(draft, shorts, longs)
        else:
            self._short_turn(draft, shorts, longs)
            if draft.empty and longs:
                self._long_turn(draft, longs)
        if not draft.empty:
            self._decode_steps = 0

    def _long_turn(self, draft: Draft, longs: list[Sequence]) -> bool:
        """One chunk of the active long prompt: the one that holds pages, else the policy's next."""
        sequence = longs[0]
        if not self._start_or_continue(draft, sequence):
            return False
        self._short_turns = 0
        self._after_long = True
        return True

    def _short_turn(self, draft: Draft, shorts: list[Sequence], longs: list[Sequence]) -> None:
        for sequence in shorts:
            if sequence.missing > draft.left:
                break
            self._start_or_continue(draft, sequence)
        if draft.chunks and longs:
            self._short_turns += 1

    def _start_or_continue(self, draft: Draft, sequence: Sequence) -> bool:
        tokens = self.piece(sequence, draft.left)
        if sequence.pages:
            if self.room(draft, sequence, tokens) is not Room.YES:
                return False
            self.place(draft, sequence, tokens)
            return True
        if self.full or not self.whole_fits(sequence):
            return False
        self.admit(draft, sequence, tokens)
        return True

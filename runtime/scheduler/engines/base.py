"""What the re-created engines share: a budget of tokens, whole prompts admitted, recomputation.

An engine keeps its own order of the requests that it has admitted: those that hold pages.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from runtime.book import Book
from runtime.executor.base import Step
from runtime.request import Sequence
from runtime.scheduler import Scheduling
from runtime.scheduler.commit import StepMaker
from runtime.scheduler.memory import Room
from runtime.scheduler.order import in_order


@dataclass(slots=True)
class Draft:
    """A step under construction."""

    left: int
    """Tokens of the budget that nobody has taken."""
    decodes: list[int] = field(default_factory=list)
    chunks: list[tuple[Sequence, int]] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is no work in it."""
        return not self.decodes and not self.chunks


class EngineSteps(ABC):
    """Base of the re-creations; each fills a Draft by its own rules and names its victims."""

    def __init__(self, book: Book, scheduling: Scheduling) -> None:
        """Composes for the book's plan; the policy of the scheduling orders who waits."""
        assert scheduling.chunk_tokens is not None
        self.book = book
        self.policy = scheduling.policy
        self.budget_tokens = scheduling.chunk_tokens
        self.most_sequences = book.plan.limits.sequences
        self.admitted: list[int] = []
        """Requests that hold pages, in the order of their admission."""
        self.overrun_s = 0.0
        self._maker = StepMaker(book)

    def pack(self, now_s: float) -> Step | None:
        """The next step; None where nothing can run now."""
        self.admitted = [number for number in self.admitted if number in self.book.sequences]
        held = len(self.admitted)
        draft = self.compose(now_s)
        if draft.empty and len(self.admitted) < held:
            draft = self.compose(now_s)  # a decode gave up its pages: others can use them now
        if draft.empty:
            return None
        decodes = [self.book.sequences[number] for number in sorted(draft.decodes)]
        return self._maker.make(decodes, draft.chunks)

    def predicted_s(self, step: Step) -> float:
        """The formula's seconds of a step, summed over stages, without overrun or margin."""
        return self._maker.predicted_s(step)

    @abstractmethod
    def compose(self, now_s: float) -> Draft:
        """Decides a step and takes its pages."""

    @abstractmethod
    def victim(self, draft: Draft, taker: Sequence) -> Sequence | None:
        """Who loses its pages for the taker; one in flight makes the taker do without for now."""

    # --- who ------------------------------------------------------------------------------------

    def waiting(self, now_s: float, *, seen_s: float = float("inf")) -> Iterator[Sequence]:
        """Requests without pages that arrived until seen_s, in the order of the policy."""
        prefills = self.book.prefills()
        rows = np.flatnonzero(~prefills.started & (prefills.arrival_s <= seen_s))
        if not len(rows) or self.full:
            return
        keys = self.policy.rank(prefills, now_s=now_s).keys
        order = in_order(keys[rows], prefills.number[rows])
        numbers = prefills.number[rows]
        for row in order:
            yield self.book.sequences[int(numbers[row])]

    @property
    def full(self) -> bool:
        """Whether no further request may be admitted."""
        return len(self.admitted) >= self.most_sequences

    def started(self) -> list[Sequence]:
        """Prefills that hold pages and have tokens to submit, in the order of admission."""
        waiting = self.book.waiting
        return [self.book.sequences[each] for each in self.admitted if each in waiting]

    def idle_decodes(self) -> list[int]:
        """Running requests with nothing in flight, in order of arrival."""
        return sorted(each.number for each in self.book.running.rows if not each.in_flight)

    # --- what -----------------------------------------------------------------------------------

    def piece(self, sequence: Sequence, most: int) -> int:
        """Tokens of the next chunk: up to `most`, inside one shard."""
        shard = self.book.pools.shard_tokens
        return min(sequence.missing, most, shard - sequence.scheduled % shard)

    def whole_fits(self, sequence: Sequence) -> bool:
        """Whether free pages hold all tokens of a request without any; picks its home."""
        pools = self.book.pools
        sequence.home = max(range(pools.groups), key=lambda each: (pools.free_pages(each), -each))
        for shard in range(-(-sequence.length // pools.shard_tokens)):
            inside = min(sequence.length - shard * pools.shard_tokens, pools.shard_tokens)
            group = pools.group_of(sequence.home, shard)
            if -(-inside // pools.page_tokens) > pools.free_pages(group):
                return False
        return True

    def room(self, draft: Draft, sequence: Sequence, tokens: int) -> Room:
        """Takes the pages of the next `tokens`, from victims where needed."""
        book, pools = self.book, self.book.pools
        end = sequence.scheduled + tokens
        group = pools.newest_group(sequence.home, end - 1)
        while pools.missing_pages(sequence, end) > pools.free_pages(group):
            victim = self.victim(draft, sequence)
            if victim is None:
                return Room.NO
            if victim.in_flight:
                return Room.LATER
            self.admitted.remove(victim.number)
            if victim.number in draft.decodes:
                draft.decodes.remove(victim.number)
                draft.left += 1
            book.evict(victim)
            if victim is sequence:
                return Room.NO
        book.grow(sequence, end)
        return Room.YES

    def admit(self, draft: Draft, sequence: Sequence, tokens: int) -> None:
        """Starts a request whose whole prompt fits."""
        self.book.grow(sequence, tokens)
        self.admitted.append(sequence.number)
        self.place(draft, sequence, tokens)

    def place(self, draft: Draft, sequence: Sequence, tokens: int) -> None:
        """Puts a chunk that has its pages into the step."""
        draft.chunks.append((sequence, tokens))
        draft.left -= tokens

    def place_decodes(self, draft: Draft) -> None:
        """Puts every decode that gets a page into the step, oldest first."""
        for number in self.idle_decodes():
            if draft.left <= 0:
                return
            if number not in self.book.running:
                continue  # lost its pages to another one just now
            if self.room(draft, self.book.sequences[number], 1) is Room.YES:
                draft.decodes.append(number)
                draft.left -= 1

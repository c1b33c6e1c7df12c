"""Pages for prefills: who may start, in which KVP group, and how much of a chunk has memory."""

from dataclasses import dataclass

import numpy as np

from runtime.book import Book
from runtime.request import Sequence
from runtime.scheduler.loads import GroupLoads
from runtime.scheduler.memory import Displaceable, KeptPages

NOTHING_REFUSED = (1 << 62, 0)
"""More tokens than any prompt has."""


@dataclass(slots=True, kw_only=True)
class StepPages:
    """What one step under construction knows of pages."""

    reserved: int
    """Pages of each group left to the decodes, which grow soon."""
    others: bool
    """Somebody else runs, so whoever finds too little can wait for more."""
    displaceable: Displaceable
    pending_s: list[float] | None = None
    """Predicted seconds of the started prefills, by group; read when a home is chosen."""
    refused: tuple[int, int] = NOTHING_REFUSED
    """(tokens, request): no prompt of so many tokens or more, younger than that one, can start."""

    def refuses(self, number: int, tokens: int) -> bool:
        """Whether a prompt without pages meets what is known to be refused."""
        return tokens >= self.refused[0] and number > self.refused[1]


class PageTaker:
    """Takes pages for the packer; keeps some for the oldest request that found none."""

    def __init__(self, book: Book) -> None:
        """For the book's plan."""
        self._book = book
        self._pools = book.pools
        self._long_tokens = book.plan.scheduler.long_tokens
        self._kept = KeptPages(book)

    def step(self, members: set[int]) -> StepPages:
        """The state of a step that has these members and will have more."""
        running = len(self._book.running)
        return StepPages(
            reserved=min(running, 1 + self._pools.pages // 50),
            others=running > 0,
            displaceable=Displaceable(self._book, members),
        )

    def waiting_for_pages(self) -> list[int]:
        """Requests that pages are kept for and that still have prefill to do."""
        return [number for number in self._kept.numbers() if number in self._book.waiting]

    def home(self, step: StepPages, loads: GroupLoads, sequence: Sequence) -> int:
        """Group of the first shard of a request without pages.

        The least predicted pending seconds, by live state, among the groups that have the pages
        for it to start: a home without room is none. Where no group has, the least of all.
        """
        groups = range(self._pools.groups)
        if len(groups) == 1:
            return 0
        kept = self._kept.group_of(sequence)
        if kept is not None:
            return kept
        if step.pending_s is None:
            waiting = self._book.waiting
            started = waiting["started"]
            newest, left_s = waiting["newest"][started], waiting["remaining_s"][started]
            sums = np.bincount(newest, weights=left_s, minlength=len(groups))
            step.pending_s = sums.tolist()
        pending_s = step.pending_s
        start = self._start_pages(sequence)
        roomy = [each for each in groups if self._free(step, each, sequence) >= start]
        return min(
            roomy or groups, key=lambda each: (pending_s[each] + loads.group_seconds(each), each)
        )

    def refuses(self, step: StepPages, sequence: Sequence) -> bool:
        """Whether a request that found its home cannot start, told without a look at its chunk.

        False says nothing: `take` decides. Only for whoever could not have pages kept anyway. Then
        no group has room, and what is true of one prompt is true of longer and younger ones until
        somebody takes or loses pages.
        """
        group = sequence.home
        if not self._kept.before(group, sequence):
            return False
        if self._free(step, group, sequence) >= self._start_pages(sequence):
            return False
        if not sequence.evictions:  # those need more than their length says
            step.refused = sequence.length, self._kept.newest_before(sequence)
        return True

    def take(self, step: StepPages, sequence: Sequence, tokens: int, floor: int) -> int:
        """Takes pages for up to `tokens`, at least `floor`; returns how many tokens have pages."""
        pools = self._pools
        prefix = sequence.scheduled
        group = pools.newest_group(sequence.home, prefix)
        first = self._kept.group_of(sequence) == group
        free = pools.free_pages(group) - (0 if first else step.reserved)
        if not sequence.pages:
            kept = self._kept.before(group, sequence)
            free -= kept
            chunk = pools.missing_pages(sequence, prefix + tokens)
            start = chunk if first else self._start_pages(sequence)
            if free < start and (kept or step.others):
                self._kept.keep(group, sequence, chunk)
                return 0
        room = pools.room_tokens(sequence, prefix, max(free, 0))
        if room < floor:
            needed = pools.missing_pages(sequence, prefix + floor)
            if not step.displaceable.make_room(sequence, group, needed):
                self._kept.keep(group, sequence, needed)
                return 0
            room = floor
        step.refused = NOTHING_REFUSED
        if first:
            self._kept.release(group)
        tokens = min(tokens, room)
        self._book.grow(sequence, prefix + tokens)
        step.others = True
        return tokens

    def _free(self, step: StepPages, group: int, sequence: Sequence) -> int:
        """Pages of a group that a request without any may start on."""
        free = self._pools.free_pages(group) - step.reserved
        return free - self._kept.before(group, sequence)

    def _start_pages(self, sequence: Sequence) -> int:
        """Free pages without which a prompt does not start: all of a short one, some of a long one.

        A request that was evicted before waits for all it had, so that it is not evicted again.
        """
        pools = self._pools
        enough = sequence.length if sequence.evictions else self._long_tokens
        tokens = min(sequence.length, enough, pools.shard_tokens)
        return min(-(-tokens // pools.page_tokens), pools.pages)

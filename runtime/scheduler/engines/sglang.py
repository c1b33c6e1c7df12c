"""SGLang's steps: prefill before decode, and one unfinished prompt that nothing displaces.

A step holds prefills while there are any that fit: the unfinished prompt first, with the whole
budget, then waiting ones in the order of the policy, of which the last may be cut (at a page) and
becomes the unfinished one. Only then decodes. With `mixed` (mixed chunk) the decodes ride along in
every prefill step. On shortage of pages the decode with the fewest tokens generated, among those
the longest prompt, is retracted. A whole prompt must fit when it is admitted; SGLang's reserve for
tokens to come, an estimate that its settings scale, is left out: retraction covers it.
"""

from runtime.book import Book
from runtime.request import Sequence
from runtime.scheduler import Scheduling
from runtime.scheduler.engines.base import Draft, EngineSteps


class SglangSteps(EngineSteps):
    """sglang/srt/managers/scheduler.py and schedule_policy.py without radix cache."""

    def __init__(self, book: Book, scheduling: Scheduling) -> None:
        """Budget and switches of the scheduling."""
        super().__init__(book, scheduling)
        self._mixed = "mixed" in scheduling.options

    def compose(self, now_s: float) -> Draft:
        """A prefill step, else a decode step."""
        draft = Draft(left=self.budget_tokens)
        if self._mixed:
            self.place_decodes(draft)
        self._prefills(draft, now_s)
        if draft.empty:
            self.place_decodes(draft)
        return draft

    def victim(self, draft: Draft, taker: Sequence) -> Sequence | None:
        """The decode that is retracted; None where all are in flight."""
        sequences = [self.book.sequences[each] for each in self.idle_decodes()]
        return min(
            sequences,
            key=lambda each: (each.generated, -each.request.prompt_tokens, each.number),
            default=None,
        )

    def _prefills(self, draft: Draft, now_s: float) -> None:
        unfinished = False
        for sequence in self.started():
            tokens = self._free_piece(sequence, draft.left)
            unfinished = unfinished or tokens < sequence.missing
            if tokens > 0:
                self.book.grow(sequence, sequence.scheduled + tokens)
                self.place(draft, sequence, tokens)
        for sequence in self.waiting(now_s):
            if draft.left <= 0 or self.full or not self.whole_fits(sequence):
                return
            tokens = self.piece(sequence, draft.left)
            if tokens < sequence.missing:
                page = self.book.pools.page_tokens
                if tokens >= page or not draft.empty:  # a budget below a page has to do
                    tokens = tokens // page * page
                if unfinished or tokens == 0:
                    return
                unfinished = True
            self.admit(draft, sequence, tokens)

    def _free_piece(self, sequence: Sequence, most: int) -> int:
        """The next chunk as far as free pages go: prefills retract nobody."""
        pools = self.book.pools
        free = pools.free_pages(pools.newest_group(sequence.home, sequence.scheduled))
        return min(
            self.piece(sequence, most), pools.room_tokens(sequence, sequence.scheduled, free)
        )

"""Makes the Step of what was decided: cursors move, pages and ends are announced, steps counted."""

from collections.abc import Iterable

from runtime.book import Book
from runtime.executor.base import Chunk, Step
from runtime.request import Sequence
from runtime.scheduler.loads import GroupLoads
from runtime.scheduler.policy import Ints


class StepMaker:
    """Shared by our packer and the re-creations of other engines, which only decide."""

    def __init__(self, book: Book) -> None:
        """For the book's plan."""
        self._book = book

    def empty(self) -> GroupLoads:
        """A load without work, all stages summed."""
        plan = self._book.plan
        return GroupLoads(
            plan.step_time, groups=plan.parallelism.kvp, shard_tokens=plan.kv.tokens_per_kvp_shard
        )

    def predicted_s(self, step: Step) -> float:
        """The formula's seconds of a step, summed over stages, without overrun or margin."""
        loads = self.empty()
        loads.add_step(step)
        return loads.seconds()

    def make(self, decodes: Ints, chunks: Iterable[tuple[Sequence, int]]) -> Step:
        """The next step.

        decodes  numbers of running requests with nothing in flight and a page for their token
        chunks   (request, tokens) of prefills that have their pages
        """
        book = self._book
        rows = book.running.rows(decodes)
        prefix, home = book.running["prefix"][rows], book.running["home"][rows]
        book.running["in_flight"][rows] = True
        book.waiting["recent"][:] = False
        made = []
        for sequence, tokens in chunks:
            before = sequence.scheduled
            ends = book.submit_chunk(sequence, tokens)
            made.append(
                Chunk(
                    request=sequence.number,
                    tokens=tokens,
                    prefix=before,
                    home=sequence.home,
                    samples=ends,
                )
            )
        step = Step(
            step_id=book.steps,
            decodes=decodes,
            decode_prefix=prefix,
            decode_home=home,
            chunks=tuple(made),
            pages=tuple(book.new_pages),
            evicted=tuple(book.evicted),
            ended=tuple(book.ended),
        )
        book.steps += 1
        book.new_pages, book.evicted, book.ended = [], [], []
        return step

"""Makes the Step of what was decided: cursors move, pages and ends are announced, steps counted."""

from collections.abc import Iterable

import numpy as np

from runtime.book import Book
from runtime.executor.base import Chunk, Step
from runtime.request import Sequence
from runtime.scheduler.loads import GroupLoads


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

    def make(self, decodes: list[Sequence], chunks: Iterable[tuple[Sequence, int]]) -> Step:
        """The next step.

        decodes  running requests that are ready and have a page for their token
        chunks   (request, tokens) of prefills that have their pages
        """
        book = self._book
        numbers, prefix, home = [], [], []
        for sequence in decodes:
            numbers.append(sequence.number)
            prefix.append(sequence.scheduled)
            home.append(sequence.home)
            sequence.scheduled += 1
            sequence.in_flight += 1
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
        rows = np.array([numbers, prefix, home], dtype=np.int64)
        step = Step(
            step_id=book.steps,
            decodes=rows[0],
            decode_prefix=rows[1],
            decode_home=rows[2],
            chunks=tuple(made),
            pages=tuple(book.new_pages),
            evicted=tuple(book.evicted),
            ended=tuple(book.ended),
        )
        book.steps += 1
        book.new_pages, book.evicted, book.ended = [], [], []
        return step

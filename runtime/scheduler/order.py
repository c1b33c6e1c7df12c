"""Candidates in rank order, sorted only as far as they are drawn."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from runtime.scheduler.policy import Ints, Prefills, Ranked

Array = np.ndarray[Any, np.dtype[Any]]
BLOCK = 64
"""Rows sorted at a time: a step rarely holds more prefills."""
DRAWN = 32
"""Rows made candidates at a time."""


def in_order(keys: Array, numbers: Array) -> Iterator[int]:
    """Indices by (key, number), smallest first, by partial selection."""
    for block in _blocks(keys, numbers):
        yield from block.tolist()


def _blocks(keys: Array, numbers: Array) -> Iterator[Array]:
    """The same, as arrays of rising length."""
    left = np.arange(len(keys))
    block = BLOCK
    while len(left):
        if len(left) > block:
            edge = np.partition(keys[left], block - 1)[block - 1]
            inside = keys[left] <= edge  # all ties of the edge too, so that the order is total
            chosen, left = left[inside], left[~inside]
        else:
            chosen, left = left, left[:0]
        yield chosen[np.lexsort((numbers[chosen], keys[chosen]))]
        block *= 4


class Candidate(NamedTuple):
    """A waiting request with what the policy says of it."""

    number: int
    prefix: int
    missing: int
    long: bool
    share: float
    """Yield."""


class Queue:
    """Candidates in rank order, drawn once and kept; iterating twice draws nothing twice."""

    def __init__(self, drawn: list[Candidate], rest: Iterator[Candidate], most: int) -> None:
        """drawn and rest are all candidates in order; at most `most` are drawn."""
        self._drawn = drawn
        self._rest = rest
        self._most = most

    def __len__(self) -> int:
        """Candidates that can be drawn."""
        return self._most

    def __iter__(self) -> Iterator[Candidate]:
        """From the first on."""
        return self.since(0)

    def since(self, first: int) -> Iterator[Candidate]:
        """From a place in the order on."""
        if len(self._drawn) >= self._most:
            return iter(self._drawn[first : self._most])
        return self._draw(first)

    def _draw(self, first: int) -> Iterator[Candidate]:
        for place in range(first, self._most):
            while len(self._drawn) <= place:
                self._drawn.append(next(self._rest))
            yield self._drawn[place]


def queues(
    waiting: Prefills, prefix: Ints, ranked: Ranked, *, started_only: bool, most: int
) -> tuple[Queue, Queue]:
    """Those that can be in time and the demoted, in rank order.

    prefix        tokens submitted of each
    started_only  leaves out requests without KV
    most          candidates drawn of each
    """
    columns = (waiting.number, prefix, waiting.missing_tokens, waiting.long, ranked.yields)
    if len(waiting) <= BLOCK:
        return _few(waiting, columns, ranked, started_only=started_only, most=most)
    made = []
    for lane in (~ranked.demoted, ranked.demoted):
        rows = np.flatnonzero(lane & waiting.started if started_only else lane)
        # copies: requests may come back to the waiting ones while candidates are drawn
        rest = _candidates(ranked.keys[rows], [column[rows] for column in columns])
        made.append(Queue([], rest, min(most, len(rows))))
    return made[0], made[1]


def _few(
    waiting: Prefills,
    columns: tuple[Array, ...],
    ranked: Ranked,
    *,
    started_only: bool,
    most: int,
) -> tuple[Queue, Queue]:
    """The same for a handful, which plain Python sorts faster than numpy is called."""
    demoted, started = ranked.demoted.tolist(), waiting.started.tolist()
    lists = [column.tolist() for column in columns]
    rows = zip(ranked.keys.tolist(), *lists, demoted, started, strict=True)
    lanes: tuple[list[Candidate], ...] = ([], [])
    for _, number, done, missing, long, share, late, begun in sorted(rows):
        if begun or not started_only:
            lanes[late].append(Candidate(number, done, missing, long, share))
    in_time, demoted_ones = (Queue(lane, iter(()), min(most, len(lane))) for lane in lanes)
    return in_time, demoted_ones


def _candidates(keys: Array, columns: list[Array]) -> Iterator[Candidate]:
    for block in _blocks(keys, columns[0]):
        for first in range(0, len(block), DRAWN):  # a block is long where many keys are equal
            drawn = block[first : first + DRAWN]
            lists = [column[drawn].tolist() for column in columns]
            yield from map(Candidate._make, zip(*lists, strict=True))

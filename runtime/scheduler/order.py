"""Candidates in rank order, sorted only as far as they are drawn."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

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

    def __init__(
        self,
        *,
        keys: Array,
        numbers: Array,
        prefix: Array,
        missing: Array,
        long: Array,
        yields: Array,
        most: int,
    ) -> None:
        """Columns of one length, not views; at most `most` candidates are drawn."""
        self._columns = numbers, prefix, missing, long, yields
        self._most = min(most, len(keys))
        self._order = _blocks(keys, numbers)
        self._pending: Array = np.zeros(0, dtype=np.int64)
        self._drawn: list[Candidate] = []

    def __len__(self) -> int:
        """Candidates that can be drawn."""
        return self._most

    def __iter__(self) -> Iterator[Candidate]:
        """From the first on."""
        return self.since(0)

    def since(self, first: int) -> Iterator[Candidate]:
        """From a place in the order on."""
        for place in range(first, self._most):
            while len(self._drawn) <= place:
                if not len(self._pending):
                    self._pending = next(self._order)  # long where many keys are equal
                rows, self._pending = self._pending[:DRAWN], self._pending[DRAWN:]
                columns = (column[rows].tolist() for column in self._columns)
                self._drawn.extend(map(Candidate._make, zip(*columns, strict=True)))
            yield self._drawn[place]

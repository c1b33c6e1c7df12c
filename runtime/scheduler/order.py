"""Candidates in rank order, sorted only as far as they are drawn."""

from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
BLOCK = 64
"""Rows sorted at a time: a step rarely holds more prefills."""


def in_order(keys: Array, numbers: Array) -> Iterator[int]:
    """Indices by (key, number), smallest first, by partial selection."""
    left = np.arange(len(keys))
    block = BLOCK
    while len(left):
        if len(left) > block:
            edge = np.partition(keys[left], block - 1)[block - 1]
            inside = keys[left] <= edge  # all ties of the edge too, so that the order is total
            chosen, left = left[inside], left[~inside]
        else:
            chosen, left = left, left[:0]
        yield from chosen[np.lexsort((numbers[chosen], keys[chosen]))].tolist()
        block *= 4

"""Whose pages give way: growth by seniority, victims by cost.

Order without deadlock: a request only ever displaces requests that arrived after it, so the oldest
one alive always gets its pages and the system drains. A decode that finds no page among its juniors
gives up its own (it has sampled at least one token since its last prefill, so this ends).
Prefills displace prefills only: a running decode is never displaced for a prefill. Cost is the KV
to be computed again, and nobody is displaced where all who may be would not be enough.
"""

from bisect import bisect_left
from collections.abc import Set as AbstractSet
from enum import Enum
from itertools import accumulate

import numpy as np

from runtime.book import Book
from runtime.request import Sequence


class Room(Enum):
    """Whether pages could be had."""

    YES = "yes"
    LATER = "later"
    """Victims exist but are in flight."""
    NO = "no"


class Displaceable:
    """Prefills that may lose their pages in the step under construction: idle and not part of it.

    Found once a group, and again only when one has been placed or displaced, so that asking for
    many candidates costs no more than for one.
    """

    def __init__(self, book: Book, members: AbstractSet[int]) -> None:
        """members are the requests that already have a part in the step; it may grow."""
        self._book = book
        self._members = members
        self._found: dict[int, tuple[tuple[int, int], list[int], list[int]]] = {}
        """By group: what it was found for, numbers negated and rising, their pages summed."""

    def make_room(self, taker: Sequence, group: int, pages: int) -> bool:
        """Displaces juniors of `taker`, cheapest first, until `pages` are free in the group."""
        book = self._book
        missing = pages - book.pools.free_pages(group)
        if missing <= 0:
            return True
        numbers, freed = self._by_age(group)
        count = bisect_left(numbers, -taker.number)
        if freed[count] < missing:
            return False
        juniors = [book.sequences[-number] for number in numbers[:count]]
        juniors.sort(key=lambda each: (each.computed, -each.number))
        for victim in juniors:
            if book.pools.free_pages(group) >= pages:
                break
            book.evict(victim)
        return True

    def _by_age(self, group: int) -> tuple[list[int], list[int]]:
        """Youngest first: numbers negated, and the pages of the first n for each n."""
        book = self._book
        state = len(self._members), len(book.evicted)
        found = self._found.get(group)
        if found is None or found[0] != state:
            waiting = book.waiting
            numbers = np.sort(-waiting["number"][waiting["started"]]).tolist()
            idle = []
            held = []
            for number in numbers:
                sequence = book.sequences[-number]
                pages = pages_in(book, sequence, group)
                if pages and not sequence.in_flight and -number not in self._members:
                    idle.append(number)
                    held.append(pages)
            found = state, idle, [0, *accumulate(held)]
            self._found[group] = found
        return found[1], found[2]


def pages_in(book: Book, sequence: Sequence, group: int) -> int:
    """Pages that a request holds in a group."""
    return sum(
        len(pages)
        for shard, pages in enumerate(sequence.pages)
        if book.pools.group_of(sequence.home, shard) == group
    )


def page_for_decode(book: Book, taker: Sequence, group: int, idle: Displaceable) -> Room:
    """Makes room for one page of a running request: a junior prefill's, else a junior decode's."""
    if idle.make_room(taker, group, 1):
        return Room.YES
    juniors = [
        each
        for each in book.running.rows
        if each.number > taker.number and _decodes_in(book, each, group)
    ]
    idle_juniors = [each for each in juniors if not each.in_flight]
    if idle_juniors:
        book.evict(min(idle_juniors, key=lambda each: (each.computed, -each.number)))
        return Room.YES
    if juniors:
        return Room.LATER
    in_flight = (
        sequence.in_flight and number > taker.number and number not in book.running
        for number, sequence in book.holders.items()
        if pages_in(book, sequence, group)
    )
    return Room.LATER if any(in_flight) else Room.NO


def _decodes_in(book: Book, sequence: Sequence, group: int) -> bool:
    """Whether a running request holds KV in a group."""
    pools = book.pools
    shards = -(-sequence.computed // pools.shard_tokens)
    return (group - sequence.home) % pools.groups < shards


class KeptPages:
    """Pages kept for the oldest request that found none: no younger one starts before it has them.

    Else a stream of short prompts takes every page that comes free, and a long one never starts or
    grows although it may rank first. It is one chunk's pages and no more, so that the stream does
    not wait long for it.
    """

    def __init__(self, book: Book) -> None:
        """Nothing is kept."""
        self._book = book
        self._by_group: dict[int, tuple[int, int]] = {}
        """(request, pages)."""

    def numbers(self) -> list[int]:
        """Requests that pages are kept for."""
        return [number for number, _ in self._by_group.values()]

    def group_of(self, sequence: Sequence) -> int | None:
        """Group where pages are kept for a request; None where there is none."""
        for group, (number, _) in self._by_group.items():
            if number == sequence.number:
                return group
        return None

    def keep(self, group: int, sequence: Sequence, pages: int) -> None:
        """Keeps pages for a request, unless an older one has that place."""
        number, _ = self._by_group.get(group, (sequence.number, 0))
        if sequence.number <= number:
            self._by_group[group] = sequence.number, pages

    def newest_before(self, sequence: Sequence) -> int:
        """The youngest older request that pages are kept for in any group.

        Whoever is younger than that one has as many pages kept from it in each group as `sequence`.
        """
        return max(number for number in self.numbers() if number < sequence.number)

    def before(self, group: int, sequence: Sequence) -> int:
        """Pages that are kept for a request older than this one."""
        number, pages = self._by_group.get(group, (sequence.number, 0))
        if number not in self._book.waiting:  # it ended, or its prefill did
            self._by_group.pop(group, None)
            return 0
        return pages if number < sequence.number else 0

    def release(self, group: int) -> None:
        """Keeps nothing in the group any more."""
        del self._by_group[group]

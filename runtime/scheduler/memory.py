"""Whose pages give way: growth by seniority, victims by cost.

Order without deadlock: a request only ever displaces requests that arrived after it, so the oldest
one alive always gets its pages and the system drains. A decode that finds no page among its juniors
gives up its own (it has sampled at least one token since its last prefill, so this ends).
Prefills displace prefills only: a running decode is never displaced for a prefill.
"""

from enum import Enum

from runtime.book import Book
from runtime.request import Sequence


class Room(Enum):
    """Whether pages could be had."""

    YES = "yes"
    LATER = "later"
    """Victims exist but are in flight."""
    NO = "no"


def make_room(
    book: Book, taker: Sequence, group: int, pages: int, *, keep: set[int], decodes: bool
) -> Room:
    """Evicts juniors of `taker` until `pages` are free in the group.

    keep     requests that already have a part in this step
    decodes  whether running decodes may be displaced too
    """
    later = False
    while book.pools.free_pages(group) < pages:
        victim, busy = _victim(book, taker, group, keep=keep, decodes=decodes)
        later = later or busy
        if victim is None:
            return Room.LATER if later else Room.NO
        book.evict(victim)
    return Room.YES


def _victim(
    book: Book, taker: Sequence, group: int, *, keep: set[int], decodes: bool
) -> tuple[Sequence | None, bool]:
    """The cheapest junior to recompute, prefills before decodes; and whether some are in flight."""
    best: tuple[bool, float, int] | None = None
    busy = False
    for sequence in book.holders.values():
        if sequence.number <= taker.number or not _holds(book, sequence, group):
            continue
        running = sequence.number in book.running
        if running and not decodes:
            continue
        book.sync(sequence)
        if sequence.in_flight or sequence.number in keep:
            busy = True
            continue
        cost = (running, book.work.solo_s(sequence.computed), -sequence.number)
        if best is None or cost < best:
            best = cost
    return (None if best is None else book.sequences[-best[2]]), busy


def _holds(book: Book, sequence: Sequence, group: int) -> bool:
    return any(
        pages and book.pools.group_of(sequence.home, shard) == group
        for shard, pages in enumerate(sequence.pages)
    )


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

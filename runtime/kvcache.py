"""Paged KV: one pool of page numbers for each KVP group, and who holds what.

A request's KV is cut in shards of `shard_tokens`; shard i lies in group (home + i) mod groups, so a
page number means something only together with its group. Only the engine takes and gives pages.
"""

from collections.abc import Iterable

from runtime.request import Sequence


class PagePools:
    """Free pages by group. A page is free or held by exactly one request: check_integrity()."""

    def __init__(self, *, groups: int, pages: int, page_tokens: int, shard_tokens: int) -> None:
        """All pages free; page 0 is handed out first."""
        self.groups = groups
        self.pages = pages
        self.page_tokens = page_tokens
        self.shard_tokens = shard_tokens
        self._free = [list(range(pages - 1, -1, -1)) for _ in range(groups)]
        self._held = [bytearray(pages) for _ in range(groups)]

    def free_pages(self, group: int) -> int:
        """Pages that nobody holds."""
        return len(self._free[group])

    def group_of(self, home: int, shard: int) -> int:
        """Group that holds a shard."""
        return (home + shard) % self.groups

    def newest_group(self, home: int, prefix: int) -> int:
        """Group of the shard that the token at position `prefix` is written to."""
        return self.group_of(home, prefix // self.shard_tokens)

    def missing_pages(self, sequence: Sequence, end: int) -> int:
        """Pages that the shard of token end - 1 still needs to hold tokens up to `end`."""
        shard = (end - 1) // self.shard_tokens
        inside = end - shard * self.shard_tokens
        held = len(sequence.pages[shard]) if shard < len(sequence.pages) else 0
        missing = -(-inside // self.page_tokens) - held
        return max(0, missing)

    def room_tokens(self, sequence: Sequence, prefix: int, pages: int) -> int:
        """Tokens from `prefix` on that fit its shard when `pages` further pages are taken."""
        shard = prefix // self.shard_tokens
        held = len(sequence.pages[shard]) if shard < len(sequence.pages) else 0
        inside = prefix - shard * self.shard_tokens
        return min((held + pages) * self.page_tokens, self.shard_tokens) - inside

    def grow(self, sequence: Sequence, end: int) -> tuple[int, ...]:
        """Takes the pages that hold tokens up to `end` in its shard and appends them.

        Call only when missing_pages() are free. Returns the new page numbers.
        """
        shard = (end - 1) // self.shard_tokens
        group = self.group_of(sequence.home, shard)
        count = self.missing_pages(sequence, end)
        if not count:
            return ()
        free, held = self._free[group], self._held[group]
        assert count <= len(free), (sequence.number, count, len(free))
        taken = tuple(free[: -count - 1 : -1])
        del free[-count:]
        for page in taken:
            held[page] = 1
        while len(sequence.pages) <= shard:
            sequence.pages.append([])
        sequence.pages[shard].extend(taken)
        return taken

    def release(self, sequence: Sequence) -> None:
        """Gives back all pages of a request."""
        for shard, pages in enumerate(sequence.pages):
            group = self.group_of(sequence.home, shard)
            for page in reversed(pages):
                assert self._held[group][page], f"page {page} of group {group} is freed twice"
                self._held[group][page] = 0
                self._free[group].append(page)
        sequence.pages = []

    def used_share(self) -> float:
        """Share of all pages that are held."""
        free = sum(len(pages) for pages in self._free)
        return 1.0 - free / (self.groups * self.pages)

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Raises AssertionError unless every page is free or held once, and tables have no gap."""
        seen = [bytearray(self.pages) for _ in range(self.groups)]
        for sequence in holders:
            for shard, pages in enumerate(sequence.pages):
                group = self.group_of(sequence.home, shard)
                assert len(pages) * self.page_tokens <= self.shard_tokens, "shard over its size"
                for page in pages:
                    assert not seen[group][page], f"page {page} of group {group} is held twice"
                    seen[group][page] = 1
            held = sum(
                min(len(pages) * self.page_tokens, self.shard_tokens) for pages in sequence.pages
            )
            assert held >= sequence.scheduled, f"request {sequence.number} has KV without a page"
        for group in range(self.groups):
            assert seen[group] == self._held[group], f"group {group}: holders and pool disagree"
            free = self._free[group]
            assert len(set(free)) == len(free), f"group {group}: a page is free twice"
            assert not any(seen[group][page] for page in free), f"group {group}: free and held"
            assert len(free) + sum(seen[group]) == self.pages, f"group {group}: pages lost"

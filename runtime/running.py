"""The requests that decode, in rows without gaps, so that a step goes over them once.

Plain objects and not arrays: a step of the paper's mix has three decodes, and one call of numpy
costs more than three of anything else. Two hundred cost a tenth of a millisecond a step.
"""

from collections.abc import Iterable, Iterator

from runtime.request import Sequence


class Running:
    """Rows are dense and unordered: a removed row is filled by the last one."""

    def __init__(self) -> None:
        """No rows."""
        self.rows: list[Sequence] = []
        self._row_of: dict[int, int] = {}

    def __len__(self) -> int:
        """Rows in use."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Sequence]:
        """Row by row; nothing may be added or removed meanwhile."""
        return iter(self.rows)

    def __contains__(self, number: int) -> bool:
        """Whether the request has a row."""
        return number in self._row_of

    def among(self, numbers: Iterable[int]) -> list[Sequence]:
        """Those of some requests that are here, in the order given."""
        rows, row_of = self.rows, self._row_of
        return [rows[row_of[number]] for number in numbers if number in row_of]

    def add(self, sequence: Sequence) -> None:
        """Appends a row."""
        self._row_of[sequence.number] = len(self.rows)
        self.rows.append(sequence)

    def remove(self, number: int) -> None:
        """Drops the row of a request that is here."""
        row = self._row_of.pop(number)
        last = self.rows.pop()
        if last.number != number:
            self.rows[row] = last
            self._row_of[last.number] = row

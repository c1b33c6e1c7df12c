"""Requests as columns: numpy arrays with one row a request, so that a step costs no Python loop.

Rows are dense and unordered: a removed row is filled by the last one. `row_of` finds a row by the
request's number.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
NO_ROW = -1


class Columns:
    """Growable parallel arrays. Arrays handed out are views: valid until the next add or remove."""

    def __init__(self, dtypes: Mapping[str, type]) -> None:
        """No rows; the column `number` must be among dtypes."""
        self._data: dict[str, Array] = {
            name: np.zeros(16, dtype=dtype) for name, dtype in dtypes.items()
        }
        self._row_of: Array = np.full(16, NO_ROW, dtype=np.int64)
        self._rows = 0

    def __len__(self) -> int:
        """Rows in use."""
        return self._rows

    def __getitem__(self, name: str) -> Array:
        """The column, as long as there are rows."""
        return self._data[name][: self._rows]

    def __contains__(self, number: int) -> bool:
        """Whether the request has a row."""
        return number < len(self._row_of) and self._row_of[number] != NO_ROW

    def row(self, number: int) -> int:
        """Row of a request that is here."""
        return int(self._row_of[number])

    def rows(self, numbers: Array) -> Array:
        """Rows of requests, NO_ROW for those that are gone."""
        return self._row_of[numbers]

    def add(self, values: Mapping[str, Any]) -> None:
        """Appends a row; every column must be given."""
        number = values["number"]
        if self._rows == len(self._data["number"]):
            self._data = {name: np.resize(data, 2 * len(data)) for name, data in self._data.items()}
        if number >= len(self._row_of):
            grown = np.full(max(2 * len(self._row_of), number + 1), NO_ROW, dtype=np.int64)
            grown[: len(self._row_of)] = self._row_of
            self._row_of = grown
        for name, data in self._data.items():
            data[self._rows] = values[name]
        self._row_of[number] = self._rows
        self._rows += 1

    def remove(self, number: int) -> None:
        """Drops the row of a request that is here."""
        row, last = self.row(number), self._rows - 1
        if row != last:
            for data in self._data.values():
                data[row] = data[last]
            self._row_of[self._data["number"][row]] = row
        self._row_of[number] = NO_ROW
        self._rows = last

"""Requests as columns: numpy arrays with one row a request, so that ranking costs no Python loop.

Rows are dense and unordered: a removed row is filled by the last one.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Columns:
    """Growable parallel arrays. Arrays handed out are views: valid until the next add or remove."""

    def __init__(self, dtypes: Mapping[str, type]) -> None:
        """No rows; the column `number` must be among dtypes."""
        self._data: dict[str, Array] = {
            name: np.zeros(16, dtype=dtype) for name, dtype in dtypes.items()
        }
        self.views: dict[str, Array] = {}
        """The columns by name."""
        self._row_of: dict[int, int] = {}
        self._resize(0)

    def __len__(self) -> int:
        """Rows in use."""
        return len(self._row_of)

    def __getitem__(self, name: str) -> Array:
        """The column, as long as there are rows."""
        return self.views[name]

    def __contains__(self, number: int) -> bool:
        """Whether the request has a row."""
        return number in self._row_of

    def row(self, number: int) -> int:
        """Row of a request that is here."""
        return self._row_of[number]

    def add(self, values: Mapping[str, Any]) -> None:
        """Appends a row; every column must be given."""
        row = len(self._row_of)
        if row == len(self._data["number"]):
            self._data = {name: np.resize(data, 2 * len(data)) for name, data in self._data.items()}
        for name, data in self._data.items():
            data[row] = values[name]
        self._row_of[values["number"]] = row
        self._resize(row + 1)

    def update(self, number: int, **values: Any) -> None:
        """Changes columns of a request that is here."""
        row, data = self._row_of[number], self._data
        for name, value in values.items():
            data[name][row] = value

    def remove(self, number: int) -> None:
        """Drops the row of a request that is here."""
        row = self._row_of.pop(number)
        last = len(self._row_of)
        if row != last:
            for data in self._data.values():
                data[row] = data[last]
            self._row_of[int(self._data["number"][row])] = row
        self._resize(last)

    def _resize(self, rows: int) -> None:
        # views are made when rows come and go and not when they are read, which is far more often
        self.views = {name: data[:rows] for name, data in self._data.items()}

"""What every fit answers with: a time, where it comes from, or a refusal that names the range."""

import itertools
import math
from typing import NamedTuple

import numpy as np

MOST_FACTOR = 4.0
"""A curve is carried on in proportion, and efficiencies by a neighbour, at most so far."""
MOST_LINEAR_FACTOR = 16.0
"""The same for what is linear by its nature: keys of attention, bytes of a link."""

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class OutOfRange(Exception):
    """A point too far from what was measured: term, what was asked, what there is."""

    def __init__(self, term: str, asked: str, measured: str, factor: float) -> None:
        """The message names all four."""
        self.factor = factor
        far = f" by a factor of {factor:.3g}" if math.isfinite(factor) else ""
        super().__init__(f"{term}: {asked} lies outside what was measured ({measured}){far}")


class Origin(NamedTuple):
    """How an estimate came about; the larger, the weaker."""

    factor: float
    """How far outside the measured range, 1 inside."""
    interpolated: bool

    def __str__(self) -> str:
        """As plans carry it."""
        if self.factor > 1.0:
            return f"extrapolated by {self.factor:.3g}"
        return "interpolated" if self.interpolated else "measured"


MEASURED = Origin(1.0, interpolated=False)
INTERPOLATED = Origin(1.0, interpolated=True)


class Estimate(NamedTuple):
    """Seconds and their origin."""

    seconds: float
    origin: Origin


def nonnegative(columns: Floats, seconds: Floats, *, beside: float = 0.0) -> Floats:
    """Coefficients that are not negative with the least sum of squared relative errors.

    columns [R, C], at most four columns: every set of them is tried.
    beside  what errors count relative to besides each row's own seconds
    """
    scaled, count = columns / (seconds + beside)[:, None], columns.shape[1]
    wanted = seconds / (seconds + beside)
    best, best_error = np.zeros(count), math.inf
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            part = scaled[:, chosen]
            found = np.linalg.lstsq(part, wanted, rcond=None)[0]
            error = float(np.sum((part @ found - wanted) ** 2))
            if (found >= 0).all() and error < best_error * (1 - 1e-12):
                best, best_error = np.zeros(count), error
                best[list(chosen)] = found
    return best

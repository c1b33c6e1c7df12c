"""What every fit answers with: a time, where it comes from, or a refusal that names the range."""

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


FLOOR = 0.01
"""Errors below it weigh alike where their sum is to be least: repeated measurements differ more."""


def nonnegative(
    columns: Floats, seconds: Floats, *, beside: float = 0.0, weight: Floats | None = None
) -> tuple[Floats, Floats]:
    """Coefficients [C] that are not negative with the least sum of squared relative errors.

    columns [R, C]; lone calls take no weight
    beside   what errors count relative to besides each row's own seconds
    weight   [R] of the rows; the answer's second part is the one with which another turn comes
             nearer to the least sum of the errors themselves, without their squares
    """
    scaled = columns / (seconds + beside)[:, None]
    size = np.maximum(scaled.max(axis=0), 1e-300)
    scaled, wanted = scaled / size, seconds / (seconds + beside)
    held = np.ones_like(seconds) if weight is None else weight
    found = _least(scaled * held[:, None], wanted * held)
    off = np.maximum(np.abs(scaled @ found - wanted), FLOOR)
    return found / size, off**-0.5


def _least(columns: Floats, wanted: Floats) -> Floats:
    """Least squares without negative coefficients: Lawson and Hanson's active sets.

    A coefficient is freed while that shortens the sum, and leaves where the free ones would take it
    below 0. Ends at the optimum, since the sum falls at every turn.
    """
    square, toward = columns.T @ columns, columns.T @ wanted
    count = len(toward)
    found, free = np.zeros(count), np.zeros(count, dtype=bool)
    for _ in range(10 * count):
        slope = np.where(free, -np.inf, toward - square @ found)
        if slope.max() <= 1e-12 * np.abs(toward).max():
            break
        free[slope.argmax()] = True
        while free.any():
            best = np.zeros(count)
            best[free] = np.linalg.lstsq(square[np.ix_(free, free)], toward[free], rcond=None)[0]
            low = free & (best <= 0)
            if not low.any():
                found = best
                break
            part = float(np.min(found[low] / np.maximum(found[low] - best[low], 1e-300)))
            found = np.maximum(found + part * (best - found), 0.0)
            free &= ~(low & (found <= 1e-15))
    return found

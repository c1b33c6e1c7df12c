"""From measured rows to the time of any shape: interpolated inside, marked or refused outside.

    matrix products   a curve over tokens by shape; another shape takes the efficiency of its
                      neighbours, in logarithms
    row-wise ops      a curve over tokens by width; another width takes the nearest, by elements, or
                      lies between its neighbours where a program takes whole rows
    attention         planner/fit_attention.py
    collectives       latency + bytes x s, scaled to a ring of more devices

Curves are straight between points, as plans/steptime.py reads its tables, and rise; coefficients
are not negative. Every answer says where it comes from. What lies further outside than MOST_FACTOR
is refused by OutOfRange, which names the range.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from planner.estimates import (
    INTERPOLATED,
    MOST_FACTOR,
    Estimate,
    Floats,
    Origin,
    OutOfRange,
    nonnegative,
)
from planner.fit_attention import Attention
from planner.profiles import Profile, Row

NEIGHBOURS = 4
"""Shapes whose efficiency an unknown shape takes the mean of."""
LAUNCH_S = 1.5e-6
"""Part of a short kernel's time that no work explains: a node of a CUDA graph takes 1 to 2 us."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A rising function through measured points, straight between them."""

    term: str
    at: Floats
    us: Floats

    def read(self, x: float) -> Estimate:
        """Constant below the first point, in proportion to x beyond the last."""
        low, high = float(self.at[0]), float(self.at[-1])
        factor = max(x / high, 1.0)
        if factor > MOST_FACTOR:
            raise OutOfRange(self.term, f"{x:.6g}", f"{low:.6g} to {high:.6g}", factor)
        us = float(np.interp(x, self.at, self.us)) * factor
        exact = x in self.at
        return Estimate(us * 1e-6, Origin(factor, interpolated=not exact))


def curve(term: str, points: Iterable[tuple[float, float]]) -> Curve:
    """The curve through (x, us), each time at least that of the point before."""
    at, us = np.array(sorted(points)).T
    return Curve(term=term, at=at, us=np.maximum.accumulate(us))


# --- matrix products ----------------------------------------------------------------------------


DENSE = 150.0
"""Operations a byte from which products, not memory, are the limit on Hopper."""


def heated(rows: Sequence[Row], factor: float) -> list[Row]:
    """Matrix products as they are on a hot chip: those bound by operations take longer."""
    found = []
    for row in rows:
        _, n, k, tokens = row.key
        n, k, tokens = int(n), int(k), int(tokens)
        dense = 2.0 * n * k * tokens > DENSE * _moved(n, k, tokens)
        found.append(replace(row, us=row.us * factor) if dense else row)
    return found


class Products:
    """Times of matrix products by op, n, k and tokens."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """The rates that the best rows reach stand for the device's."""
        points: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
        for row in rows:
            op, n, k, tokens = row.key
            points.setdefault((str(op), int(n), int(k)), []).append((float(tokens), row.us))
        self._curves = {
            shape: curve(f"{shape[0]} {shape[1]} x {shape[2]}, tokens", found)
            for shape, found in points.items()
        }
        self._flops_us = max(2.0 * k * n * t / us for (_, n, k), t, us in _flat(points))
        self._bytes_us = max(_moved(n, k, t) / us for (_, n, k), t, us in _flat(points))

    @property
    def ops(self) -> frozenset[str]:
        """Ops that were measured."""
        return frozenset(op for op, _, _ in self._curves)

    def read(self, op: str, n: int, k: int, tokens: int) -> Estimate:
        """Time of one product; raises OutOfRange."""
        known = self._curves.get((op, n, k))
        if known is not None:
            return known.read(tokens)
        near = sorted(
            (math.hypot(math.log2(n / other_n), math.log2(k / other_k)), other_n, other_k)
            for (other_op, other_n, other_k), found in self._curves.items()
            if other_op == op and tokens <= MOST_FACTOR * found.at[-1]
        )[:NEIGHBOURS]
        if not near:
            raise OutOfRange(op, f"{n} x {k} on {tokens} tokens", "nothing like it", math.inf)
        factor = 2.0 ** near[0][0]
        if factor > MOST_FACTOR:
            shape = f"{near[0][1]} x {near[0][2]}"
            raise OutOfRange(op, f"{n} x {k}", f"nearest shape {shape}", factor)
        shares, weights, outside = [], [], 1.0
        for distance, other_n, other_k in near:
            found = self._curves[op, other_n, other_k].read(tokens)
            outside = max(outside, found.origin.factor)
            floor_s = self._floor_s(other_n, other_k, tokens)
            shares.append(math.log(floor_s / found.seconds))
            weights.append(1.0 / (distance**2 + 0.05))
        share = math.exp(float(np.average(shares, weights=weights)))
        # a neighbour within a factor of two in sum is what the shapes were chosen for
        origin = Origin(max(outside, factor if factor > 2 else 1.0), interpolated=True)
        return Estimate(self._floor_s(n, k, tokens) / share, origin)

    def _floor_s(self, n: int, k: int, tokens: int) -> float:
        compute_us = 2.0 * n * k * tokens / self._flops_us
        return LAUNCH_S + 1e-6 * max(compute_us, _moved(n, k, tokens) / self._bytes_us)


def _moved(n: int, k: int, tokens: float) -> float:
    return 2.0 * (n * k + tokens * (n + k))


def _flat(
    points: dict[tuple[str, int, int], list[tuple[float, float]]],
) -> Iterable[tuple[tuple[str, int, int], float, float]]:
    return ((shape, t, us) for shape, found in points.items() for t, us in found)


WHOLE_ROWS = ("add_rms_norm", "all_reduce_add_rms_norm", "kv_write", "rms_norm")
"""Row-wise ops of which a program takes a whole row, so that rows count, not elements. With one
width of the fitted rows left out at a time the median of their errors is 1.9, 1.9 and 4.3 % instead
of 5.0, 2.4 and 6.0 on an H100, the P90 6, 9 and 22 % instead of 14, 20 and 16; on an H200 2.6, 2.9
and 3.4 % instead of 5.5, 2.4 and 11, and 9, 12 and 18 % instead of 15, 43 and 16."""


class RowWise:
    """Times of ops on rows, by op, width and tokens."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """Groups the rows by op and width."""
        points: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for row in rows:
            op, width, tokens = row.key
            points.setdefault((str(op), int(width)), []).append((float(tokens), row.us))
        self._curves = {
            key: curve(f"{key[0]} of width {key[1]}, tokens", found)
            for key, found in points.items()
        }

    @property
    def ops(self) -> frozenset[str]:
        """Ops that were measured."""
        return frozenset(op for op, _ in self._curves)

    def read(self, op: str, width: int, tokens: float) -> Estimate:
        """Time of one call; raises OutOfRange."""
        widths = [other for other_op, other in self._curves if other_op == op]
        if not widths:
            raise OutOfRange(op, f"width {width}", "nothing", math.inf)
        if op in WHOLE_ROWS and min(widths) < width < max(widths) and width not in widths:
            low = max(other for other in widths if other < width)
            high = min(other for other in widths if other > width)
            below, above = (self._curves[op, each].read(tokens) for each in (low, high))
            share = (width - low) / (high - low)
            factor = max(below.origin.factor, above.origin.factor)
            seconds = (1 - share) * below.seconds + share * above.seconds
            return Estimate(seconds, Origin(factor, interpolated=True))
        nearest = min(widths, key=lambda other: abs(math.log(other / width)))
        found = self._curves[op, nearest].read(tokens * width / nearest)
        if nearest == width:
            return found
        return Estimate(found.seconds, Origin(found.origin.factor, interpolated=True))


# --- collectives --------------------------------------------------------------------------------


class LinkTime(NamedTuple):
    """latency + bytes x byte_s."""

    latency_s: float
    byte_s: float
    origin: Origin


def ring_share(op: str, devices: int) -> float:
    """How many times the bytes that a rank gives cross its link in a ring."""
    if op == "all_reduce":
        return 2 * (devices - 1) / devices
    if op == "all_to_all":
        return (devices - 1) / devices
    return devices - 1.0 if op == "all_gather" else 1.0


def fit_links(rows: Sequence[Row], op: str, devices: int) -> LinkTime | None:
    """Of a collective over so many devices, or None where it was not measured.

    The nearest number of devices that was measured, its bytes scaled as in a ring; its latency is
    taken as it is, since small messages do not go round a ring.
    """
    counts = {int(row.key[1]) for row in rows if row.key[0] == op}
    if not counts:
        return None
    nearest = min(counts, key=lambda count: abs(math.log(count / devices)))
    found = [(float(row.key[2]), row.us * 1e-6) for row in rows if row.key[:2] == (op, nearest)]
    size, seconds = np.array(found).T
    (latency_s, byte_s), _ = nonnegative(np.stack([np.ones_like(size), size], axis=1), seconds)
    share = ring_share(op, devices) / ring_share(op, nearest)
    factor = max(devices / nearest, nearest / devices)
    origin = Origin(factor, interpolated=True) if factor > 1 else INTERPOLATED
    return LinkTime(float(latency_s), float(byte_s) * share, origin)


@dataclass(frozen=True, kw_only=True)
class Fits:
    """What a profile's rows were made into; None for what was not measured."""

    products: Products | None
    row_wise: RowWise | None
    attention: Attention | None
    sampling: RowWise | None
    """Widths are vocabularies, tokens are sampled rows."""
    links: tuple[Row, ...]


def fits_of(profile: Profile) -> Fits:
    """All fits of a profile."""
    chunks, decodes = profile.rows("attention_chunk"), profile.rows("attention_decode")
    products = heated(profile.rows("gemm"), profile.about.hot.get("gemm", 1.0))
    sampling = [
        Row(key=("sampling", *row.key), role=row.role, us=row.us, spread_us=row.spread_us)
        for row in profile.rows("sampling")
    ]
    return Fits(
        products=Products(products) if products else None,
        row_wise=RowWise(profile.rows("rows")) if profile.rows("rows") else None,
        attention=Attention(chunks, decodes) if chunks and decodes else None,
        sampling=RowWise(sampling) if sampling else None,
        links=profile.rows("links"),
    )

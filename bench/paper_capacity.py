"""Capacity from probes: the highest rate with 90 % of the requests in time."""

from collections.abc import Callable, Sequence
from statistics import fmean

from msgspec import Struct

from bench.paper_table import Row

CAPACITY_SHARE = 0.9
STEP = 1.05
"""Rates that are told apart: neighbours on a grid of powers of this."""
LEAST, MOST = -80, 45
"""Powers of STEP between which the rate is sought: 0.02 to 9 requests/s."""
PROBES = 3
"""Rates from which on probes that are all enough are a search, not a grid."""


class Capacity(Struct, frozen=True, kw_only=True):
    """What the probes of one policy say."""

    key: tuple[str, int, float]
    """Protocol, mix, window."""
    policy: str
    rps: float
    bounded: bool
    """Whether a neighbour above was not enough; else the search ended at its own edge."""
    rows: tuple[Row, ...]
    """The runs at that rate."""


def rate(power: int) -> float:
    """Requests a second of a point of the grid."""
    return float(f"{STEP**power:.3g}")


def highest_power(enough: Callable[[int], bool]) -> int:
    """Bisects for the highest power of STEP that is enough; enough falls with the power."""
    low, high = LEAST, MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


def capacities(rows: Sequence[Row], figure: str = "all_attained") -> list[Capacity]:
    """Of every policy whose probes end in neighbours of the grid, one enough and one not.

    Where every probe of a search was enough, the highest one, not bounded.
    """
    groups: dict[tuple[tuple[str, int, float], str], dict[float, list[Row]]] = {}
    for row in rows:
        case = row.case
        group = groups.setdefault(((case.protocol, case.mix, case.window_s), case.policy), {})
        group.setdefault(case.qps, []).append(row)
    rates = {rate(power): power for power in range(LEAST, MOST + 1)}
    found = []
    for (key, policy), by_rate in groups.items():
        powers = {rates[qps]: each for qps, each in by_rate.items() if qps in rates}
        good = {power for power, each in powers.items() if _enough(each, figure)}
        edges = [power for power in good if power + 1 in powers and power + 1 not in good]
        bounded = bool(edges)
        if not edges and len(good) == len(powers) >= PROBES:
            edges = [max(good)]
        if edges:
            best = max(edges)
            rows_there = tuple(powers[best])
            found.append(
                Capacity(key=key, policy=policy, rps=rate(best), bounded=bounded, rows=rows_there)
            )
    return found


def _enough(rows: Sequence[Row], figure: str) -> bool:
    return fmean(row[figure] for row in rows) >= CAPACITY_SHARE

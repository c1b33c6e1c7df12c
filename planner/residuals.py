"""What a profile's fits make of the rows that they never saw: the error of each term.

Rows of role `check` lie between the fitted points or on other shapes. Attention has two errors: of
the law that a call follows, and of the step-time formula, which has fewer terms and is what a plan
carries; error bands are those of the formula.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from planner.attention_work import Heads
from planner.estimates import OutOfRange
from planner.fit_attention import Attention
from planner.fits import Fits, fit_links, heated
from planner.profiles import Key, Profile, Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Residual:
    """One held-out row and its prediction."""

    table: str
    key: Key
    measured_us: float
    predicted_us: float

    @property
    def error(self) -> float:
        """Relative; above 0 where the prediction is too long."""
        return self.predicted_us / self.measured_us - 1.0

    @property
    def weighed(self) -> float:
        """The same, attention shorter than SHORT_US counted as that long: a step's time is hardly
        that of such a call, whose error would otherwise be taken for that of long ones."""
        whole_us = self.measured_us
        if self.table.startswith("attention"):
            whole_us = max(whole_us, SHORT_US)
        return (self.predicted_us - self.measured_us) / whole_us


SHORT_US = 50.0
"""A third of what the other ops of a layer take in a decode of an 8B model on an H100."""
TERM_OF = {
    "attention_chunk": "attention",
    "attention_decode": "attention",
    "gemm": "matmul",
    "links": "collectives",
    "rows": "matmul",
}
"""The terms of planner/measured.py that tables with held-out rows speak of."""


def residuals(profile: Profile, fits: Fits) -> dict[str, list[Residual]]:
    """Held-out rows by term; the head is a product, hand-overs and merges are links."""
    found: dict[str, list[Residual]] = {}
    for each in table_residuals(profile, fits, context=LONGEST):
        found.setdefault(TERM_OF[each.table], []).append(each)
    found["head"] = [each for each in found.get("matmul", []) if each.table == "gemm"]
    for term in ("hop", "merge"):
        found[term] = found.get("collectives", [])
    return found


LEAST_ERROR = 0.02
"""Repeated measurements of one kernel differ by as much (bench/results)."""
ROUND_TRIP = "round_trip"
"""Row of table `ranks`: what a decode step of several ranks takes longer than its work."""


def term_errors(profile: Profile, fits: Fits) -> tuple[dict[str, float], dict[str, float]]:
    """90th percentiles by term: of how far predictions are off, and of how much longer work took.

    `overhead` is that of a lone rank; ROUND_TRIP that of several, whose steps travel as well. No
    row of either is held out: their error is their spread.
    """
    errors, short = {}, {}
    for term, found in residuals(profile, fits).items():
        off = np.array([each.weighed for each in found])
        if len(off):
            errors[term] = max(float(np.quantile(np.abs(off), 0.9)), LEAST_ERROR)
            short[term] = max(float(np.quantile(-off, 0.9)), LEAST_ERROR)
    spreads = [("overhead", row) for row in profile.rows("step") if row.key == ("decode_list",)]
    spreads += [(ROUND_TRIP, row) for row in profile.rows("ranks") if row.key[0] == ROUND_TRIP]
    for term, row in spreads:
        spread = max(row.spread_us / row.us, errors.get(term, LEAST_ERROR))
        errors[term] = short[term] = spread
    return errors, short


def errors_of_plan(errors: Mapping[str, float], *, ranks: int, kv_dtype: str) -> dict[str, float]:
    """What `term_errors` found, as it holds for a replica of so many ranks."""
    found = dict(errors)
    trip = found.pop(ROUND_TRIP, None)
    if ranks > 1 and trip is not None:
        found["overhead"] = trip
    if kv_dtype == "fp8":  # one chunk was measured and no row held out: as of a formula
        found.pop("attention", None)
    return found


def table_residuals(
    profile: Profile, fits: Fits, *, context: int | None = None
) -> Iterator[Residual]:
    """Every held-out row that the fits have an answer for.

    context  attention by the coefficients of a plan for that context, instead of by its law; what
             no request of such a plan comes to is left out
    """

    def chunk_formula(fits: Fits, row: Row) -> float:
        heads, tokens, prefix = _call(row)
        found, _ = _attention(fits).chunk(heads, _within(context, tokens + prefix))
        return found.seconds(tokens, prefix)

    def decode_formula(fits: Fits, row: Row) -> float:
        heads, batch, keys = _call(row)
        found, _ = _attention(fits).decode(heads, _within(context, keys))
        return found.seconds(batch, keys)

    predict: dict[str, Predict] = {
        "attention_chunk": chunk_formula if context else _chunk,
        "attention_decode": decode_formula if context else _decode,
        "gemm": _product,
        "links": _collective,
        "rows": _row_wise,
    }
    for table, function in predict.items():
        rows: Sequence[Row] = profile.rows(table, "check")
        if table == "gemm":
            rows = heated(rows, profile.about.hot.get("gemm", 1.0))
        for row in rows:
            try:
                seconds = function(fits, row)
            except OutOfRange:
                continue  # such a point is never answered by the fit either
            yield Residual(table=table, key=row.key, measured_us=row.us, predicted_us=seconds * 1e6)


Predict = Callable[[Fits, Row], float]


def _numbers(row: Row) -> list[int]:
    return [int(part) for part in row.key if not isinstance(part, str)]


def _product(fits: Fits, row: Row) -> float:
    if fits.products is None:
        raise OutOfRange("products", "any", "nothing", math.inf)
    n, k, tokens = _numbers(row)
    return fits.products.read(str(row.key[0]), n, k, tokens).seconds


def _row_wise(fits: Fits, row: Row) -> float:
    if fits.row_wise is None:
        raise OutOfRange("row_wise", "any", "nothing", math.inf)
    width, tokens = _numbers(row)
    return fits.row_wise.read(str(row.key[0]), width, tokens).seconds


def _chunk(fits: Fits, row: Row) -> float:
    heads, tokens, prefix = _call(row)
    return _attention(fits).chunk_s(heads, tokens, prefix).seconds


def _decode(fits: Fits, row: Row) -> float:
    heads, batch, keys = _call(row)
    return _attention(fits).decode_s(heads, batch, keys).seconds


def _within(context: int | None, keys: int) -> int:
    if context is None or keys > context:
        raise OutOfRange("attention", f"{keys} keys", f"a plan for {context}", math.inf)
    return context


LONGEST = 1 << 20
"""Error bands are those of coefficients that have to serve every context that was measured."""


def _attention(fits: Fits) -> Attention:
    if fits.attention is None:
        raise OutOfRange("attention", "any", "nothing", math.inf)
    return fits.attention


def _call(row: Row) -> tuple[Heads, int, int]:
    heads, kv_heads, head_dim, first, second = _numbers(row)
    return (heads, kv_heads, head_dim), first, second


def _collective(fits: Fits, row: Row) -> float:
    devices, size = _numbers(row)
    found = fit_links(fits.links, str(row.key[0]), devices)
    if found is None:
        raise OutOfRange("links", "any", "nothing", math.inf)
    return found.latency_s + size * found.byte_s

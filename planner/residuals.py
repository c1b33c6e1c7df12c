"""What a profile's fits make of the rows that they never saw: the error of each term.

Rows of role `check` lie between the fitted points or on other shapes. Attention has two errors: of
the law that a call follows, and of the step-time formula, which has fewer terms and is what a plan
carries; error bands are those of the formula.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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

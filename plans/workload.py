"""What is asked of a deployment: classes of requests by length, their shares, and their targets."""

from itertools import pairwise
from typing import Annotated

from msgspec import Meta, Struct

from plans.model import Count

Quantile = tuple[Annotated[float, Meta(ge=0, le=1)], Annotated[int, Meta(ge=1)]]


class RequestClass(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Requests of one kind: lengths as quantile tables, read by linear interpolation."""

    name: str
    share: Annotated[float, Meta(gt=0, le=1)]
    """Of all requests."""
    input_tokens: tuple[Quantile, ...]
    """(quantile, tokens) rows, both rising, first quantile 0, last 1."""
    output_tokens: tuple[Quantile, ...]


class Workload(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mix of request classes that a plan is made for."""

    name: str
    classes: tuple[RequestClass, ...]
    source: str
    """Where the lengths come from."""

    @property
    def max_input_tokens(self) -> int:
        """Longest prompt of any class."""
        return max(row.input_tokens[-1][1] for row in self.classes)

    @property
    def max_context_tokens(self) -> int:
        """Longest prompt and its longest answer."""
        return max(row.input_tokens[-1][1] + row.output_tokens[-1][1] for row in self.classes)


def length_at(table: tuple[Quantile, ...], quantile: float) -> int:
    """Tokens at a quantile in [0, 1], interpolated linearly and rounded, at least 1."""
    below_q, below = table[0]
    for at_q, at in table[1:]:
        if quantile <= at_q:
            share = (quantile - below_q) / (at_q - below_q) if at_q > below_q else 1.0
            return max(1, round(below + share * (at - below)))
        below_q, below = at_q, at
    return table[-1][1]


def mean_length(table: tuple[Quantile, ...]) -> float:
    """Mean tokens of a quantile table: the area under its piecewise linear inverse CDF."""
    return sum(
        (high_q - low_q) * (low + high) / 2 for (low_q, low), (high_q, high) in pairwise(table)
    )


def mean_square_length(table: tuple[Quantile, ...]) -> float:
    """Mean of the squared tokens: quadratic work of prefill attention follows it."""
    return sum(
        (high_q - low_q) * (low * low + low * high + high * high) / 3
        for (low_q, low), (high_q, high) in pairwise(table)
    )


class ClassTargets(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Targets of one class of requests; None means as for all."""

    ttft_s: Annotated[float, Meta(gt=0)] | None = None
    tbt_s: Annotated[float, Meta(gt=0)] | None = None


class TtftTarget(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Deadline of the first token where a request names none.

    max(multiplier x solo prefill time, floor_s)
    """

    multiplier: Annotated[float, Meta(ge=1)] = 1.5
    floor_s: Annotated[float, Meta(gt=0)] = 0.5


class Targets(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Latency targets of a deployment; a request's own targets come before these."""

    ttft: TtftTarget = TtftTarget()
    tbt_s: Annotated[float, Meta(gt=0)] = 0.05
    """Longest gap between two tokens of one request."""
    classes: dict[str, ClassTargets] = {}


class Limits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the deployment accepts."""

    context_tokens: Count
    """Prompt and answer of one request."""
    sequences: Count
    """Requests that decode at the same time, per replica."""

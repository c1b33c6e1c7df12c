"""The error of a step time from those of its terms: no error is taken to cancel another.

Each term counts by its share of two typical steps, and the worse of the two is the answer. A term
that was measured elsewhere is trusted less in proportion to how far, until its error is that of a
formula; one whose error is larger than that already keeps it.
"""

from collections.abc import Callable, Mapping

from planner.estimates import Origin
from plans.steptime import StepTime, table_s

TYPICAL_STEPS: tuple[tuple[tuple[tuple[int, int], ...], tuple[int, ...]], ...] = (
    (((2048, 8192),), ()),
    ((), (8192,) * 16),
)
"""Chunks and decodes of the steps by whose parts the terms' errors are weighted; keys are those in
one KVP group."""


def doubted(error: float, factor: float, formula: float) -> float:
    """The error of a term `factor` outside what was measured.

    Distance alone never makes it larger than a formula's, and never less than it is inside.
    """
    return max(error, min(error * factor, formula))


def _nothing(_: int) -> float:
    return 0.0


def weighted(
    time: StepTime,
    origins: Mapping[str, Origin],
    errors: Mapping[str, float],
    formula: float,
    *,
    groups: int = 1,
    summed: Callable[[int], float] = _nothing,
) -> float:
    """The largest mean of the terms' errors over the typical steps, by their shares of the time.

    origins  of the terms that were read from measurements
    errors   of the terms of which rows were held out
    formula  the error of a term that was not measured, or of which nothing was held out
    groups   KVP groups whose partial results are merged
    summed   of a step's tokens, seconds in a layer's table that belong to the collectives
    """
    of = {
        term: doubted(errors.get(term, formula), origin.factor, formula)
        for term, origin in origins.items()
    }
    found = []
    for chunks, decodes in TYPICAL_STEPS:
        tokens = sum(each for each, _ in chunks) + len(decodes)
        layers = sum(time.stage_layers)
        table = table_s(time.matmul, tokens)
        sums = min(summed(tokens), table)  # the host may take longer than all of it
        merged = tokens * (groups - 1)
        parts = {
            "overhead": time.overhead_s * time.stages,
            "matmul": layers * (table - sums),
            "collectives": layers * (sums + time.comm_latency_s + tokens * time.comm_token_s),
            "hop": (time.stages - 1) * (time.hop_latency_s + tokens * time.hop_token_s),
            "head": table_s(time.head, len(chunks) + len(decodes)),
        }
        if merged:
            parts["merge"] = layers * (time.merge_latency_s + merged * time.merge_token_s)
        whole_s = time.step_s(chunks, decodes, groups)
        parts["attention"] = whole_s - sum(parts.values())
        found.append(sum(part * of.get(term, formula) for term, part in parts.items()) / whole_s)
    return max(found)

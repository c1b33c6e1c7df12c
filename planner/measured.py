"""Coefficients of the step-time formula from a device's profile, and how far they can be trusted.

A layer is the sum of its ops as codegen lowers them, each read from planner/fits.py at this rank's
shapes; products with an epilogue count where the profile has them. What a profile does not hold, or
only too far away, keeps the roofline's coefficient, is called `formula`, and is noted.

    matmul(T)   products + row-wise ops + what a layer's attention takes besides pairs and keys;
                up to GRAPH_TOKENS at least a layer's share of the host's time for the next step,
                which is prepared while this one runs; above it, where steps have chunks, at least
                the launches between recorded pieces, and a share of the host's time on top, since
                the device waits for a chunk's work list
    overhead    the work list that a recorded step makes on the device; with several ranks also a
                stage's share of what steps take longer by travelling to all ranks and back
    comm        the sum over the tp ranks beyond add_rms_norm (planner/reduce_time.py): the line
                under it, through a step of one token; what it leaves is in matmul(T)

The error band is that of the terms (planner/error_band.py), each the 90th percentile of its errors
on rows that were never fitted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from msgspec import structs

from planner.error_band import weighted
from planner.estimates import MEASURED, MOST_LINEAR_FACTOR, Estimate, Origin, OutOfRange
from planner.fit_attention import ChunkTime, DecodeTime
from planner.fits import Fits, LinkTime, fit_links, fits_of
from planner.profiles import Profile, load_profile
from planner.rank_shapes import Shapes
from planner.reduce_time import Line, Reduce, fused_of
from planner.residuals import ROUND_TRIP, errors_of_plan, term_errors
from planner.world import World
from plans.mesh import Parallelism
from plans.steptime import Knot, StepTime
from plans.topology import Link

GRAPH_TOKENS = 256
"""Steps of more tokens have chunks; smaller ones are taken for decodes, which are one recorded
launch up to this size (runtime/parallel/graphs.py)."""
DTYPES = ("bf16", "fp16")
"""Of weights and cache, for which a profile of bf16 holds; a cache in fp8 changes attention."""
FP8_CHUNK_TIME = 2.3
"""A chunk over keys in fp8, in the time over keys in bf16: 512 tokens on 131,072 keys take 3.36 ms
on an H100, 0.44 of the rate (bench/results/attention_peers_h100_202611.md)."""
FP8_DECODE_TIME = 0.59
"""The same of decodes: median of the five there, 0.55 to 0.64."""
FP8_NOTE = (
    f"attention over keys in fp8: that in bf16, measured, x {FP8_CHUNK_TIME} for chunks (512 tokens"
    f" on 131,072 keys) and x {FP8_DECODE_TIME} for decodes, as on an H100"
)
ALL_REDUCES = 2
"""Collectives of a layer: after the attention output and after the MLP."""
FORMULA_ERROR = 0.3
"""Of a term without a measurement: a roofline with assumed efficiencies."""
FORMULA_MARGIN = 0.1
"""What the packer adds to such a term."""
ATTENTION = "attention"
TERMS = ("matmul", ATTENTION, "collectives", "merge", "hop", "head", "overhead")


@dataclass(frozen=True, kw_only=True)
class Links:
    """The slowest link of each axis; None where the axis has one rank."""

    tp: Link | None = None
    kvp: Link | None = None
    spp: Link | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A step time, and what it rests on."""

    time: StepTime
    provenance: dict[str, str]
    error_band: float
    notes: tuple[str, ...] = ()


@dataclass(kw_only=True)
class _Terms:
    """Origins of what was read, by term, and why a term was not."""

    origins: dict[str, Origin] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def took(self, term: str, origin: Origin) -> None:
        """Keeps the weakest origin of a term."""
        self.origins[term] = max(self.origins.get(term, MEASURED), origin)

    def read(self, term: str, estimate: Estimate) -> float:
        """Seconds, their origin kept."""
        self.took(term, estimate.origin)
        return estimate.seconds


def usable(world: World) -> bool:
    """Whether a profile of dense models in bf16 speaks of this one."""
    model = world.model
    plain = model.experts is None and model.latent is None
    kept = world.kv_dtype in DTYPES or world.kv_dtype == "fp8"
    return plain and model.weight_dtype in DTYPES and kept


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A profile, its fits, and the error of each term."""

    profile: Profile
    fits: Fits
    errors: dict[str, float]
    """90th percentile of how far a prediction is off, by term (planner/residuals.py)."""
    short: dict[str, float]
    """The same of how much longer the work took, which is what a packer fears."""
    layers: dict[Any, tuple[tuple[Knot, ...], Origin]] = field(default_factory=dict)
    """Tables of layers by what they depend on: a search asks for the same few again and again."""
    sums: dict[tuple[int, int, int], tuple[Reduce, Line]] = field(default_factory=dict)
    """The same of sums over ranks, by ranks, width and tokens of a step."""


@cache
def prepared(device: str) -> Prepared | None:
    """Of a device of the catalog, or None where it was never measured."""
    profile = load_profile(device)
    return prepare(profile) if profile else None


def prepare(profile: Profile) -> Prepared:
    """Fits a profile and looks at what it was not fitted to."""
    fits = fits_of(profile)
    errors, short = term_errors(profile, fits)
    return Prepared(profile=profile, fits=fits, errors=errors, short=short)


# --- a rank's step --------------------------------------------------------------------------------


def measured(
    ready: Prepared, world: World, parallelism: Parallelism, base: StepTime, links: Links
) -> Measured:
    """The step time of a candidate, its roofline `base` where nothing was measured.

    links  of each axis, None where the axis has one rank
    """
    terms = _Terms()
    rank = Shapes(world, parallelism)
    changes: dict[str, Any] = {}
    parts: Sequence[tuple[str, Callable[[], dict[str, Any]]]] = (
        ("attention", lambda: _attention(ready, world, rank, terms)),
        ("matmul", lambda: {"matmul": _layer(ready, world, rank, links.tp, terms)}),
        ("head", lambda: {"head": _head(ready, world, rank, links.tp, terms)}),
        ("collectives", lambda: _collectives(ready, world, rank, links.tp, terms)),
        ("merge", lambda: _merge(ready, rank, links.kvp, terms)),
        ("hop", lambda: _hop(ready, rank, links.spp, terms)),
        ("overhead", lambda: _overhead(ready, parallelism, terms)),
    )
    for term, part in parts:
        try:
            changes |= part()
        except OutOfRange as error:
            terms.origins.pop(term, None)
            terms.refused[term] = str(error)
    time = structs.replace(base, source="profile", **changes)
    ranks, summed = parallelism.ranks_per_replica, _summed(ready, world, rank, links.tp)
    band, margin = (
        weighted(
            time,
            terms.origins,
            errors_of_plan(errors, ranks=ranks, kv_dtype=world.kv_dtype),
            formula,
            groups=parallelism.kvp,
            summed=summed,
        )
        for errors, formula in ((ready.errors, FORMULA_ERROR), (ready.short, FORMULA_MARGIN))
    )
    return Measured(
        time=structs.replace(time, margin=round(margin, 4)),
        provenance={
            term: str(terms.origins[term]) if term in terms.origins else "formula" for term in TERMS
        },
        error_band=round(band, 4),
        notes=(
            *(f"{term} by formula: {why}" for term, why in terms.refused.items()),
            *terms.notes,
            *ready.profile.gaps(),
        ),
    )


def _attention(ready: Prepared, world: World, rank: Shapes, terms: _Terms) -> dict[str, float]:
    """Coefficients of pairs and keys; what is left is part of the layer's table."""
    chunk, decode = _attention_fits(ready, world, rank, terms)
    slower, read = 1.0, 1.0
    if world.kv_dtype == "fp8":
        slower, read = FP8_CHUNK_TIME, FP8_DECODE_TIME
        terms.took(ATTENTION, Origin(FP8_CHUNK_TIME, interpolated=True))
        terms.notes.append(FP8_NOTE)
    return {
        "pair_s": slower * chunk.pair_s,
        "key_s": slower * chunk.key_s,
        "decode_key_s": read * decode.key_s,
        "decode_sequence_s": decode.sequence_s,
    }


def _attention_fits(
    ready: Prepared, world: World, rank: Shapes, terms: _Terms
) -> tuple[ChunkTime, DecodeTime]:
    if ready.fits.attention is None:
        raise OutOfRange("attention", "any", "nothing", np.inf)
    heads, context = (rank.heads, rank.kv_heads, rank.head_dim), world.limits.context_tokens
    most = world.scheduler.max_step_tokens
    chunk, origin = ready.fits.attention.chunk(heads, context, most)
    terms.took("attention", origin)
    decode, origin = ready.fits.attention.decode(heads, context)
    terms.took("attention", origin)
    return chunk, decode


def _layer(
    ready: Prepared, world: World, rank: Shapes, link: Link | None, terms: _Terms
) -> tuple[Knot, ...]:
    fits = ready.fits
    if fits.products is None or fits.row_wise is None:
        raise OutOfRange("matmul", "any", "nothing", np.inf)
    products, row_wise, ops = fits.products, fits.row_wise, fits.products.ops
    most = world.scheduler.max_step_tokens
    reduce, line = _reduce(ready, world, rank, link)
    key = (*rank.sizes, most, world.limits.context_tokens, reduce is None)
    if key in ready.layers:
        knots, origin = ready.layers[key]
        terms.took("matmul", origin)
        return knots
    try:
        chunk, decode = _attention_fits(ready, world, rank, _Terms())
    except OutOfRange:  # noted by the attention term
        chunk, decode = ChunkTime((1,), (0.0,), 0.0, 0.0), DecodeTime(0.0, 0.0, 0.0)
    host = _Host(ready.profile, rank.stage_layers)

    def seconds(tokens: int) -> float:
        total_s = sum(
            terms.read("matmul", products.read(op, n, k, tokens)) for op, n, k in rank.products(ops)
        )
        total_s += sum(
            (count if op == "add_rms_norm" else 1)
            * terms.read(
                "matmul",
                row_wise.read(op, width, tokens if op == "add_rms_norm" else tokens * count),
            )
            for op, width, count in rank.rows(ops)
        )
        if reduce is not None:
            total_s += _beyond_s(reduce, line, tokens)
        start_s = chunk.start(tokens) if tokens >= chunk.at[0] else 0.0
        total_s += max(decode.start_s, start_s)
        if tokens > GRAPH_TOKENS:
            return max(total_s, host.launch_s) + host.chunk_s
        return max(total_s, host.step_s)

    knots = _table(most, seconds, _kinks(reduce))
    ready.layers[key] = knots, terms.origins["matmul"]
    return knots


class _Host:
    """The host's time in a step, as a share of each layer of a stage."""

    def __init__(self, profile: Profile, layers: float) -> None:
        """What was not measured counts nothing."""

        def part(what: str) -> float:
            return (profile.step_us(what) or 0.0) * 1e-6

        self.step_s = part("host_step") / layers
        self.chunk_s = (part("host_step") + part("chunk_list")) / layers
        self.launch_s = part("eager paged_attention") + part("graph_launch")


def _head(
    ready: Prepared, world: World, rank: Shapes, link: Link | None, terms: _Terms
) -> tuple[Knot, ...]:
    """Last norm, projection, logits gathered, and a token drawn from each row."""
    fits, vocab = ready.fits, world.model.vocab
    if fits.products is None or fits.row_wise is None or fits.sampling is None:
        raise OutOfRange("head", "any", "nothing", np.inf)
    products, row_wise, sampling = fits.products, fits.row_wise, fits.sampling
    gather = _link(ready, "all_gather", rank.tp, link) if rank.tp > 1 else None
    if gather:
        terms.took("head", gather.origin)

    def seconds(rows: int) -> float:
        total_s = terms.read("head", products.read("linear", vocab // rank.tp, rank.hidden, rows))
        total_s += terms.read("head", row_wise.read("add_rms_norm", rank.hidden, rows))
        total_s += terms.read("head", sampling.read("sampling", vocab, rows))
        if gather:
            total_s += gather.latency_s + 4 * rows * vocab / rank.tp * gather.byte_s
        return total_s

    return _table(world.limits.sequences, seconds)


def _table(
    most: int, seconds: Callable[[int], float], more: Sequence[int] = ()
) -> tuple[Knot, ...]:
    """Knots at powers of two and between them, the last at or past `most`; never falling."""
    found, last_s = [], 0.0
    for row in _sizes(most, more):
        last_s = max(last_s, seconds(row))
        found.append(Knot(at=row, seconds=last_s))
    return tuple(found)


def _sizes(most: int, more: Sequence[int] = ()) -> list[int]:
    rows = {1 << power for power in range((most - 1).bit_length() + 1)}
    rows |= {3 * row // 2 for row in rows if row > 1 and row < most}
    rows |= {row for row in more if row < most}
    return sorted(rows)


# --- links and host -------------------------------------------------------------------------------


def _link(ready: Prepared, op: str, devices: int, link: Link | None) -> LinkTime:
    """A collective over NVLink; raises OutOfRange for other links, which no profile measures."""
    if link is None or link.kind != "nvlink":
        kind = "no link" if link is None else link.kind
        raise OutOfRange(op, kind, "nvlink", np.inf)
    found = fit_links(ready.fits.links, op, devices)
    if found is None:
        raise OutOfRange(op, f"{devices} devices", "nothing", np.inf)
    return found


def _kinks(reduce: Reduce | None) -> tuple[int, ...]:
    """Sizes of a step at which it begins to be run in another way."""
    ends = (GRAPH_TOKENS, *((reduce.most,) if reduce is not None and reduce.most else ()))
    return tuple(size for end in ends for size in (end, end + 1))


def _reduce(
    ready: Prepared, world: World, rank: Shapes, link: Link | None
) -> tuple[Reduce | None, Line]:
    """The sum over the tp ranks, and the line under it; None where no row speaks of it."""
    nothing = None, Line(latency_s=0.0, token_s=0.0)
    if rank.tp == 1 or ready.fits.row_wise is None:
        return nothing
    most = world.scheduler.max_step_tokens
    key = (rank.tp, rank.hidden, most)
    try:
        over = _link(ready, "all_reduce", rank.tp, link)
        if key not in ready.sums:
            found = Reduce(
                ranks=rank.tp,
                width=rank.hidden,
                link=over,
                fused=fused_of(ready.profile),
                norms=ready.fits.row_wise,
            )
            ready.sums[key] = found, found.line(_sizes(most, _kinks(found)))
        return ready.sums[key]
    except OutOfRange:  # noted by the collectives' term
        return nothing


def _beyond_s(reduce: Reduce, line: Line, tokens: int) -> float:
    """What the table of a layer holds of its sums."""
    return ALL_REDUCES * line.beyond(tokens, reduce.seconds(tokens))


def _summed(
    ready: Prepared, world: World, rank: Shapes, link: Link | None
) -> Callable[[int], float]:
    """Of tokens, how many of the seconds in a layer's table are doubted as collectives are."""
    reduce, line = _reduce(ready, world, rank, link)
    if reduce is None:
        return lambda tokens: 0.0
    last = _sizes(world.scheduler.max_step_tokens)[-1]
    return lambda tokens: _beyond_s(reduce, line, min(tokens, last))


def _collectives(
    ready: Prepared, world: World, rank: Shapes, link: Link | None, terms: _Terms
) -> dict[str, float]:
    if rank.tp == 1:
        return {}
    reduce, line = _reduce(ready, world, rank, link)
    if reduce is None:
        _link(ready, "all_reduce", rank.tp, link)  # says why
        raise OutOfRange("all_reduce", f"width {rank.hidden}", "no row-wise op like it", np.inf)
    terms.took("collectives", reduce.origin)
    return {
        "comm_latency_s": ALL_REDUCES * line.latency_s,
        "comm_token_s": ALL_REDUCES * line.token_s,
    }


def _merge(ready: Prepared, rank: Shapes, link: Link | None, terms: _Terms) -> dict[str, float]:
    """Partial results of a token's heads go to every other group."""
    if link is None:
        return {}
    found = _link(ready, "all_gather", 2, link)
    terms.took("merge", found.origin)
    around_s = 1e-6 * max((us for _, us in _of_ranks(ready.profile, MERGE)), default=0.0)
    row = rank.heads * (rank.head_dim * rank.size + 4)
    return {"merge_latency_s": found.latency_s + around_s, "merge_token_s": row * found.byte_s}


def _hop(ready: Prepared, rank: Shapes, link: Link | None, terms: _Terms) -> dict[str, float]:
    if link is None:
        return {}
    found = _link(ready, "send_recv", 2, link)
    terms.took("hop", found.origin)
    return {
        "hop_latency_s": found.latency_s,
        "hop_token_s": rank.hidden * rank.size * found.byte_s,
    }


MERGE = "merge"
"""Row of table `ranks`: what a layer takes around the exchange of partial results."""


def _of_ranks(profile: Profile, what: str) -> list[tuple[int, float]]:
    """(devices, microseconds) of one row's measurements."""
    return [(int(row.key[1]), row.us) for row in profile.rows("ranks") if row.key[0] == what]


def _overhead(ready: Prepared, parallelism: Parallelism, terms: _Terms) -> dict[str, float]:
    list_us = ready.profile.step_us("decode_list")
    if list_us is None:
        raise OutOfRange("overhead", "decode_list", "nothing", np.inf)
    terms.took("overhead", MEASURED)
    ranks = parallelism.ranks_per_replica
    trips = dict(_of_ranks(ready.profile, ROUND_TRIP))
    trip_us = 0.0
    if ranks > 1 and trips:
        nearest = min(trips, key=lambda each: max(each / ranks, ranks / each))
        # a message to each rank and one back: what is beyond sixteen times is called sixteen
        factor = min(max(nearest / ranks, ranks / nearest), MOST_LINEAR_FACTOR)
        terms.took("overhead", Origin(factor, interpolated=factor > 1))
        trip_us = trips[nearest] / parallelism.spp
    return {"overhead_s": (list_us + trip_us) * 1e-6}

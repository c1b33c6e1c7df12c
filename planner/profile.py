"""What a profile measures, and how it is kept: points of every table, written as they come.

The points cover the shapes of dense models from 0.6B to 405B and their shards at tp 1 to 8; a model
between them is interpolated. A quarter as many lie between the points or on other shapes: they are
never fitted and tell the error. How a point is measured is the caller's to say (planner/cli_tune.py
hands in codegen/meter.py), so that this module needs no GPU and no torch.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from planner.profiles import ABOUT, KEYS, About, Key, Role, Row, read_table, write_table
from plans.codec import dump_file

TOKENS = tuple(1 << power for power in range(14))
"""Of a step: 1 to 8192."""
HEAD_ROWS_MAX = 512
"""Sampled rows of a step: a vocabulary projection never sees more."""
Shape = tuple[int, int, int, int, int, int, tuple[int, ...]]
FITTED_MODELS: tuple[
    Shape, ...
] = (  # hidden, query heads, KV heads, head size, MLP, vocabulary, tp degrees
    (1024, 16, 8, 128, 3072, 151936, (1,)),  # 0.6B
    (2048, 32, 8, 64, 8192, 128256, (1,)),  # 1B
    (4096, 32, 8, 128, 14336, 128256, (1, 2, 4, 8)),  # 8B
    (8192, 64, 8, 128, 28672, 128256, (1, 2, 4, 8)),  # 70B
    (16384, 128, 8, 128, 53248, 128256, (8,)),  # 405B
)
OTHER_MODELS: tuple[Shape, ...] = (
    (3072, 24, 8, 128, 8192, 128256, (1,)),  # 3B
    (3584, 28, 4, 128, 18944, 152064, (1, 2)),  # 7B
    (5120, 40, 8, 128, 17408, 151936, (1, 4)),  # 14B
)
HEADS = ((32, 8, 128), (16, 4, 128), (8, 2, 128), (4, 1, 128), (64, 8, 128), (32, 4, 128),
         (16, 2, 128), (8, 1, 128), (32, 8, 64))  # fmt: skip
CHUNKS = (32, 128, 512, 2048, 8192)
PREFIXES = (0, 2048, 8192, 32768, 131072, 524288, 1048576)
BATCHES = (1, 4, 16, 64, 256)
KV_LENGTHS = (256, 1024, 4096, 16384, 65536, 262144, 1048576)
PAIR_FLOPS_MAX = 5e13
"""A point of attention above it, about a tenth of a second a call, is left out."""
KV_BYTES_MAX = 6 << 30
"""Keys and values of one point at most: what codegen/problems.py makes pages for."""
CHECKS = 8
"""Chunks of each set of heads that are only checked, evenly spread in logarithms."""
LINK_BYTES = tuple(1 << power for power in range(13, 29))
"""8 KiB to 256 MiB."""
LINK_OPS = ("all_reduce", "all_gather", "send_recv", "all_to_all")
TABLES = ("step", "copy", "sampling", "rows", "gemm", "attention_decode", "attention_chunk")
"""Those of one device, in the order in which they are measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One thing to measure."""

    table: str
    key: Key
    role: Role = "fit"

    def named(self) -> dict[str, int | str]:
        """The key's parts by name."""
        return dict(zip(KEYS[self.table], self.key, strict=True))


Measure = Callable[[Point], tuple[float, float]]
"""Microseconds and their spread; raises whatever goes wrong."""


def points(
    tables: Sequence[str] = TABLES, *, fused: Sequence[str] = (), seed: int = 0
) -> list[Point]:
    """All points of the tables, in order; the same for the same seed.

    fused  ops of FUSED that programs use: matrix products with an epilogue
    """
    draw = random.Random(seed)  # noqa: S311 - chooses what to measure
    every = {
        "step": _fit("step", [(what,) for what in (*HOST, *(f"eager {op}" for op in EAGER))]),
        "copy": _fit("copy", [(1 << power,) for power in range(18, 31, 2)]),
        "sampling": _fit(
            "sampling",
            [(v, rows) for v in (32000, 128256, 151936) for rows in (1, 8, 64, 256, 512)],
        ),
        "rows": _row_points(),
        "gemm": [each for op in ("linear", *fused) for each in _product_points(op, draw)],
        "attention_decode": _decode_points(draw),
        "attention_chunk": _chunk_points(draw),
    }
    return [point for table in tables for point in every[table]]


FUSED = ("gate_up_silu", "qkv_rope_write")
"""Matrix products with an epilogue, which programs use where codegen has them."""
HOST = ("chunk_list", "decode_list", "graph_launch", "host_step")
"""Parts of a step that are not its ops."""
EAGER = ("add_rms_norm", "linear", "paged_attention")
"""Ops whose launch by the host is timed."""


def link_points(devices: int) -> list[Point]:
    """Collectives over so many devices of one node; send_recv is between two."""
    return [
        Point(table="links", key=(op, 2 if op == "send_recv" else devices, size), role=role)
        for size in LINK_BYTES  # a run that is cut short has all kinds of the sizes it came to
        for op in LINK_OPS
        for role in ("check" if size.bit_length() % 3 == 0 else "fit",)
    ]


def _fit(table: str, keys: Sequence[Key]) -> list[Point]:
    return [Point(table=table, key=key) for key in keys]


def shapes(model: Shape) -> Iterator[tuple[str, int, int, int]]:
    """(op that fuses it, n, k, most tokens) of a layer's products and the head, by degree."""
    hidden, heads, kv_heads, head_dim, ffn, vocab, degrees = model
    for tp in degrees:
        wide = (heads // tp + 2 * max(kv_heads // tp, 1)) * head_dim
        yield "qkv_rope_write" if head_dim == 128 else "", wide, hidden, TOKENS[-1]
        yield "", hidden, heads // tp * head_dim, TOKENS[-1]
        yield "gate_up_silu", 2 * ffn // tp, hidden, TOKENS[-1]
        yield "", hidden, ffn // tp, TOKENS[-1]
        yield "", vocab // tp, hidden, HEAD_ROWS_MAX


def _product_points(op: str, draw: random.Random) -> list[Point]:
    """Powers of two on the fitted models; checks between them, and on other models."""
    fitted, others = (
        {
            (n, k): most
            for model in models
            for fuser, n, k, most in shapes(model)
            if op in {"linear", fuser}
        }
        for models in (FITTED_MODELS, OTHER_MODELS)
    )
    wanted: dict[Key, Role] = {}
    for (n, k), most in fitted.items():
        wanted |= {(op, n, k, tokens): "fit" for tokens in TOKENS if tokens <= most}
    for (n, k), most in (*fitted.items(), *others.items()):
        count = 2 if (n, k) in fitted else 4
        for power in draw.sample(range(most.bit_length() - 1), count):
            wanted.setdefault((op, n, k, draw.randrange(1 << power, 2 << power)), "check")
    return [Point(table="gemm", key=key, role=role) for key, role in wanted.items()]


def _row_points() -> list[Point]:
    """Tokens and widths by factors of three halves and four thirds where rows are the unit, since
    whole waves of them and what fits in a cache make steps there."""
    widths = {
        "add_rms_norm": (1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384),
        "kv_write": (128, 256, 384, 512, 768, 1024),
        "rms_norm": (128, 1024, 2048, 4096, 8192),
        "rope": (128, 512, 1024, 2048, 4096, 8192),
        "silu_mul": (3072, 3584, 7168, 14336, 28672),
    }
    fitted = (1, 8, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
    checks = {"add_rms_norm": 5120, "kv_write": 640, "rope": 3584, "silu_mul": 17408}
    found = []
    for op, sizes in widths.items():
        heads = 16 if (op, sizes[0]) == ("rms_norm", 128) else 1  # of queries and keys
        for width in sizes:
            more = heads if width == sizes[0] else 1
            found += [Point(table="rows", key=(op, width, tokens * more)) for tokens in fitted]
            found += [
                Point(table="rows", key=(op, width, tokens * more), role="check")
                for tokens in (90, 700)
            ]
        if op in checks:
            found += [
                Point(table="rows", key=(op, checks[op], tokens), role="check")
                for tokens in (3, 100, 3000)
            ]
    return found


def _kv_bytes(heads: tuple[int, int, int], keys: int) -> int:
    return 4 * heads[1] * heads[2] * keys


def _fits_in(heads: tuple[int, int, int], tokens: int, prefix: int) -> bool:
    """Whether a chunk is short enough in time and memory."""
    flops = 4 * heads[0] * heads[2] * tokens * (prefix + tokens / 2)
    return flops < PAIR_FLOPS_MAX and _kv_bytes(heads, prefix + tokens + 128) < KV_BYTES_MAX


def _chunk_points(draw: random.Random) -> list[Point]:
    found = []
    for heads in HEADS:
        grid = [
            (tokens, prefix)
            for tokens in CHUNKS
            for prefix in PREFIXES
            if _fits_in(heads, tokens, prefix)
        ]
        found += [Point(table="attention_chunk", key=(*heads, *each)) for each in grid]
        between: set[tuple[int, int]] = set()
        while len(between) < CHECKS:
            tokens, prefix = round(2 ** draw.uniform(5, 13)), round(2 ** draw.uniform(6, 20))
            if _fits_in(heads, tokens, prefix):
                between.add((tokens, prefix))
        found += [
            Point(table="attention_chunk", key=(*heads, *each), role="check")
            for each in sorted(between - set(grid))
        ]
    return found


def _decode_points(draw: random.Random) -> list[Point]:
    found = []
    for heads in HEADS:
        grid = [
            (batch, keys)
            for batch in BATCHES
            for keys in KV_LENGTHS
            if _kv_bytes(heads, batch * (keys + 128)) < KV_BYTES_MAX
        ]
        found += [Point(table="attention_decode", key=(*heads, *each)) for each in grid]
        between: set[tuple[int, int]] = set()
        while len(between) < CHECKS:
            batch, keys = round(2 ** draw.uniform(0, 8)), round(2 ** draw.uniform(8, 20))
            if _kv_bytes(heads, batch * (keys + 128)) < KV_BYTES_MAX:
                between.add((batch, keys))
        found += [
            Point(table="attention_decode", key=(*heads, *each), role="check")
            for each in sorted(between - set(grid))
        ]
    return found


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a run of measurements did."""

    measured: int
    kept: int
    """Points that the folder held already."""
    failed: tuple[str, ...]
    """Points that raised, and what."""
    left: int
    """Points for which there was no time."""


def take(
    wanted: Sequence[Point],
    measure: Measure,
    folder: Path,
    about: About,
    *,
    limit_s: float,
    note: Callable[[Point], None] = lambda point: None,
    now_s: Callable[[], float] = time.monotonic,
) -> Taken:
    """Measures points into a folder, and goes on where an earlier run of the same day stopped.

    A table is written when its last point is done or the time is over, so that a run that is cut
    short loses nothing. What the folder holds of another table, or of links, stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dump_file(folder / ABOUT, about)
    began_s = now_s()
    counts = {"measured": 0, "kept": 0, "left": 0}
    failed = []
    for table in dict.fromkeys(point.table for point in wanted):
        path = folder / f"{table}.csv"
        rows = {row.key: row for row in read_table(path)} if path.exists() else {}
        for point in (each for each in wanted if each.table == table):
            note(point)
            if point.key in rows:
                counts["kept"] += 1
                continue
            if now_s() - began_s > limit_s:
                counts["left"] += 1
                continue
            try:
                us, spread_us = measure(point)
            except Exception as error:  # noqa: BLE001 - one point must not lose the others
                failed.append(f"{table} {point.key}: {type(error).__name__}: {error}")
                continue
            rows[point.key] = Row(key=point.key, role=point.role, us=us, spread_us=spread_us)
            counts["measured"] += 1
        if rows:
            write_table(folder, table, rows.values())
    return Taken(**counts, failed=tuple(failed))

"""Which tuned parameters a plan's kernels get, and what has to be said about them.

Records stand in catalog/tuned/<device>/<op>.yaml; `medha-tune --kernels --install` writes them. One
of another device with the same compute capability, or of another Triton, is a better default than
none: it is used and named in the plan's notes. One of an older source is not used.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from planner.catalog import CATALOG, load_device, names
from plans.codec import load_file
from plans.errors import InvalidFile
from plans.plan import Plan
from plans.tuned import TOKENS_MAX, Tuned, most_tokens, nearest

TUNED = CATALOG / "tuned"
COMMAND = "medha-tune --kernels --install"
TYPICAL = {"batch": 32, "tokens": 2048}
"""Decodes, and tokens of the row-wise ops, for which a plan's kernels are chosen."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Parameters by op, for what a record was fit to be used, and notes for the reader."""

    params: dict[str, dict[str, int]]
    notes: tuple[str, ...]


Space = Mapping[str, tuple[int, ...]]
"""What each tunable of an op may be; nothing named: any number."""


def load_records(device: str, folder: Path | None = None) -> dict[str, Tuned]:
    """Records of a device by op.

    Raises InvalidFile for a record of another op than its name, and for buckets of no use.
    """
    found = {}
    for path in sorted(((folder or TUNED) / device).glob("*.yaml")):
        record = load_file(path, Tuned)
        if record.op != path.stem:
            raise InvalidFile(str(path), "op", f"{record.op!r} in the file of {path.stem}")
        for field, problem in _problems(record):
            raise InvalidFile(str(path), field, problem)
        found[record.op] = record
    return found


def _problems(record: Tuned) -> Iterator[tuple[str, str]]:
    """Fields of a record that no kernel, of whatever source, could be tuned to."""
    if not record.buckets:
        yield "buckets", f"is empty; nearest: no file, or {COMMAND}"
    for row, bucket in enumerate(record.buckets):
        here = f"buckets[{row}]"
        for part in ("when", "params"):
            for name, value in getattr(bucket, part).items():
                if value < 0:
                    yield f"{here}.{part}.{name}", f"{value} is negative"
        if bucket.library_us is not None and "tokens" not in bucket.when:
            yield f"{here}.when", "has no tokens, and library_us is compared by them"


def _strange_params(record: Tuned, space: Space) -> Iterator[tuple[str, str]]:
    """Tunables that the op does not have, and values that its search does not try."""
    for row, bucket in enumerate(record.buckets):
        for name, value in bucket.params.items():
            field = f"buckets[{row}].params.{name}"
            if name not in space:
                near = difflib.get_close_matches(name, space, n=1, cutoff=0.0)
                known = ", ".join(sorted(space))
                yield field, f"no tunable of {record.op}; nearest: {near[0]}; known: {known}"
            elif space[name] and value not in space[name]:
                near_value = min(space[name], key=lambda each: abs(each - value))
                tried = ", ".join(map(str, space[name]))
                yield field, f"{value} is not in its search; nearest: {near_value}; it has {tried}"


def records_for(device: str, folder: Path | None = None) -> tuple[dict[str, Tuned], str]:
    """Records of the device, else of one with the same compute capability; and whose they are."""
    own = load_records(device, folder)
    if own:
        return own, device
    capability = load_device(device).compute_capability
    for other in names("devices"):
        if other == device or load_device(other).compute_capability != capability:
            continue
        if found := load_records(other, folder):
            return found, other
    return {}, device


def choose(
    plan: Plan,
    source_sha256: Callable[[str], str],
    triton: str,
    folder: Path | None = None,
    space: Callable[[str], Space] | None = None,
) -> Choice:
    """Parameters for the kernels of a plan.

    source_sha256  of an op's sources as they are now; an op that is no more raises UnknownName
    triton         its version here
    space          what the tunables of an op may be; None asks no record
    raises         InvalidFile for a record that fits the source and not its tunables
    """
    device = plan.topology.device
    records, owner = records_for(device, folder)
    params: dict[str, dict[str, int]] = {}
    notes = []
    if records and owner != device:
        made_on = next(iter(records.values())).device
        notes.append(
            f"kernels untuned: no records of {device}, those of {made_on} are used; on the device:"
            f" {COMMAND}"
        )
    stale, foreign = [], set()
    for op, record in records.items():
        if record.source_sha256 != source_sha256(op):
            stale.append(op)
            continue
        for field, problem in _strange_params(record, space(op)) if space else ():
            path = (folder or TUNED) / owner / f"{op}.yaml"
            raise InvalidFile(str(path), field, problem)
        if record.triton != triton:
            foreign.add(record.triton)
        products = products_of(plan).get(op, ())
        heaviest = max(products, key=lambda each: each["n"] * each["k"] * each["count"], default={})
        params[op] = chosen(record, {**sizes_of(plan), **heaviest})
        if (bound := most_tokens(record.buckets, products)) is not None:
            params[op][TOKENS_MAX] = bound
    if stale:
        notes.append(
            f"kernels untuned: {', '.join(stale)} changed since they were tuned and keep their"
            f" defaults; on the device: {COMMAND}"
        )
    if foreign:
        notes.append(
            f"kernels were tuned with Triton {', '.join(sorted(foreign))}, here is {triton}"
        )
    return Choice(params=params, notes=tuple(notes))


def sizes_of(plan: Plan) -> dict[str, int]:
    """Sizes of the plan's problems on one rank, in the words of codegen/problems.py."""
    model, tp = plan.model, plan.parallelism.tp
    context = min(plan.kv.tokens_per_kvp_shard, plan.limits.context_tokens)
    return {
        **TYPICAL,
        "head_dim": model.head_dim,
        "heads": model.heads // tp,
        "keys": min(context, 131072),
        "kv_heads": max(model.kv_heads // tp, 1),
        "page_tokens": plan.kv.page_tokens,
        "width": model.hidden,
    }


def products_of(plan: Plan) -> dict[str, tuple[dict[str, int], ...]]:
    """By op, the products of a step on one rank: n rows of the weight, k inputs, and how many."""
    model, tp = plan.model, plan.parallelism.tp
    layers = -(-model.layers // plan.parallelism.spp)
    heads = model.heads // tp
    kv_heads = max(model.kv_heads // tp, 1)
    ffn = model.ffn // tp
    qkv, out = (heads + 2 * kv_heads) * model.head_dim, heads * model.head_dim
    return {
        "gate_up_silu": ({"n": 2 * ffn, "k": model.hidden, "count": layers},),
        "linear": (
            {"n": model.hidden, "k": out, "count": layers},
            {"n": model.hidden, "k": ffn, "count": layers},
            {"n": -(-model.vocab // tp), "k": model.hidden, "count": 1},
        ),
        "qkv_rope_write": ({"n": qkv, "k": model.hidden, "count": layers},),
    }


def chosen(record: Tuned, sizes: Mapping[str, int]) -> dict[str, int]:
    """Parameters of the nearest bucket of each regime, joined."""
    found: dict[str, int] = {}
    for regime in dict.fromkeys(bucket.regime for bucket in record.buckets):
        bucket = nearest(record.buckets, regime, sizes)
        assert bucket is not None, f"{record.op} has buckets of {regime}"
        found |= bucket.params
    return found

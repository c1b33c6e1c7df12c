"""What the search may choose: degrees of the four axes, layers of each stage, and the variants.

Every tp that shards the model evenly inside one node, every spp and kvp that fit beside it, and as
many replicas as are left: replicas only ever add capacity, so fewer would lose against more.
Degrees need not divide the devices; what they leave over is idle, and printed. Each such mesh shape
comes in variants: page size, the length at which KVP groups join, and the dtypes asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

from msgspec import structs

from planner.world import PAGE_TOKENS, World
from plans.errors import Infeasible
from plans.mesh import Parallelism
from plans.model import Model

PAGE_SIZES = (PAGE_TOKENS, 64)
"""Pages that the kernels take; the first wins where they are equal."""

Stages = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One point of the space."""

    parallelism: Parallelism
    stages: Stages
    """Layer range [first, end) of each stage."""
    page_tokens: int = PAGE_TOKENS
    spread: int | None = None
    """KVP groups that hold one request at the context limit: fewer than kvp lets groups join later
    as a request grows, and leaves the others to other requests. None means all."""
    weight_dtype: str | None = None
    """None means the model's."""
    kv_dtype: str | None = None
    """None means the world's."""

    @property
    def label(self) -> str:
        """Degrees in words, and what is not as usual."""
        text = degrees(self.parallelism)
        if self.spread is not None and self.spread != self.parallelism.kvp:
            text += f", {self.spread} groups a request"
        if self.page_tokens != PAGE_TOKENS:
            text += f", pages of {self.page_tokens}"
        if self.weight_dtype is not None:
            text += f", {self.weight_dtype} weights"
        if self.kv_dtype is not None:
            text += f", {self.kv_dtype} KV"
        return text

    @property
    def groups(self) -> int:
        """KVP groups of one request at the context limit."""
        return self.parallelism.kvp if self.spread is None else self.spread

    @property
    def stage_layers(self) -> tuple[int, ...]:
        """Layers of each stage."""
        return tuple(end - first for first, end in self.stages)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """A candidate, or all of one degree, that cannot be; a row of the ledger."""

    label: str
    constraint: str
    need: str
    have: str
    nearest: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruned:
    """Candidates that were not priced, and the proof that none could have entered the table."""

    label: str
    branches: int
    """Mesh shapes that the row stands for."""
    reason: str
    bound: str
    """What the best of them could reach at most, or must take at least."""
    best: str
    """What it had to beat."""


def gpus_text(count: int) -> str:
    """`1 GPU`, `16 GPUs`."""
    return f"{count} GPU{'s'[: count > 1]}"


def degrees(parallelism: Parallelism) -> str:
    """`tp 8 x spp 2 x kvp 1 x 1 replica`."""
    p = parallelism
    return f"tp {p.tp} x spp {p.spp} x kvp {p.kvp} x {p.replicas} replica{'s'[: p.replicas > 1]}"


def rejected(label: str, error: Infeasible) -> Rejected:
    """A ledger row from the error that a constraint raised."""
    return Rejected(
        label=label,
        constraint=error.constraint,
        need=error.need,
        have=error.have,
        nearest=error.nearest,
    )


def check_tp(model: Model, tp: int) -> None:
    """Raises Infeasible where tp ranks cannot share the model's matrices evenly."""
    widths = {"heads": model.heads, "vocab": model.vocab}
    if model.dense_layers:
        widths["ffn"] = model.ffn
    if model.experts is not None:
        widths |= {"expert ffn": model.experts.ffn, "shared ffn": model.experts.shared_ffn}
    for what, count in widths.items():
        if count % tp:
            raise Infeasible(what, f"tp must divide {what}", f"{count} % {tp} = {count % tp}")
    if model.kv_heads % tp and tp % model.kv_heads:
        raise Infeasible(
            "kv_heads", "tp must divide kv_heads or be a multiple", f"kv_heads {model.kv_heads}"
        )


def cut_layers(layers: int, spp: int) -> Stages:
    """Layers over stages as evenly as they go; the first stages take the surplus.

    The last stage also runs the head, so it is never the one with a layer more.
    """
    base, surplus = divmod(layers, spp)
    ends = [0]
    for stage in range(spp):
        ends.append(ends[-1] + base + (stage < surplus))
    return tuple(pairwise(ends))


def candidates(world: World) -> tuple[list[Candidate], list[Rejected]]:
    """Every mesh shape, each as its plainest candidate; and the degrees that none can have."""
    topology = world.topology
    found: list[Candidate] = []
    ledger: list[Rejected] = []
    for tp in range(1, min(topology.devices_per_node, topology.devices) + 1):
        try:
            check_tp(world.model, tp)
        except Infeasible as error:
            ledger.append(rejected(f"tp {tp}", error))
            continue
        slots = topology.nodes * (topology.devices_per_node // tp)  # tp groups that stay in a node
        for spp, kvp in _pairs(slots, world.model.layers):
            replicas = slots // (spp * kvp)
            parallelism = Parallelism(
                tp=tp,
                spp=spp,
                kvp=kvp,
                replicas=replicas,
                idle=topology.devices - tp * spp * kvp * replicas,
            )
            found.append(
                Candidate(parallelism=parallelism, stages=cut_layers(world.model.layers, spp))
            )
    return found, ledger


def branches(root: Candidate) -> list[Candidate]:
    """A mesh shape with each length at which its KVP groups join: all of them, half of them, ..."""
    spreads: list[int | None] = [None]
    wide = root.parallelism.kvp
    while (wide := (wide + 1) // 2) > 1:
        spreads.append(wide)  # one group a request is what replicas are, without the lockstep
    return [replace(root, spread=spread) for spread in spreads]


def variants(world: World, branch: Candidate) -> list[Candidate]:
    """A branch in every page size and in the dtypes asked for."""
    return [
        replace(branch, page_tokens=page, weight_dtype=weights, kv_dtype=kv)
        for weights, kv in dtypes(world)
        for page in PAGE_SIZES
    ]


def dtypes(world: World) -> list[tuple[str | None, str | None]]:
    """Pairs of weight and KV dtype to choose from; None is the one that the world has anyway."""
    weights = [None if each == world.model.weight_dtype else each for each in world.weight_dtypes]
    kv = [None if each == world.kv_dtype else each for each in world.kv_dtypes]
    return list(product(weights or [None], kv or [None]))


def specialise(world: World, candidate: Candidate) -> World:
    """The question with the candidate's page size and dtypes in it."""
    changes: dict[str, Any] = {"page_tokens": candidate.page_tokens}
    if candidate.weight_dtype not in (None, world.model.weight_dtype):
        changes["model"] = structs.replace(world.model, weight_dtype=candidate.weight_dtype)
    if candidate.kv_dtype is not None:
        changes["kv_dtype"] = candidate.kv_dtype
    return replace(world, **changes)


def _pairs(slots: int, layers: int) -> Iterator[tuple[int, int]]:
    for kvp in range(1, slots + 1):
        for spp in range(1, min(slots // kvp, layers) + 1):
            yield spp, kvp

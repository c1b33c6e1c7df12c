"""What the search may choose: degrees of the four axes and the layers of each stage.

Every tp that shards the model evenly inside one node, every spp and kvp that fit beside it, and as
many replicas as are left: replicas only ever add capacity, so fewer would lose against more.
Degrees need not divide the devices; what they leave over is idle, and printed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from planner.world import World
from plans.errors import Infeasible
from plans.mesh import Parallelism
from plans.model import Model

FULL_SEARCH_DEVICES = 64
"""Up to here every pair of spp and kvp is tried; beyond, only those that leave the fewest idle."""

Stages = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One point of the space."""

    parallelism: Parallelism
    stages: Stages
    """Layer range [first, end) of each stage."""

    @property
    def label(self) -> str:
        """Degrees in words."""
        return degrees(self.parallelism)

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
    for what, count in (("heads", model.heads), ("ffn", model.ffn), ("vocab", model.vocab)):
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
    """All candidates, and the degrees that no candidate can have with their reason."""
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
        pairs = list(_pairs(slots, world.model.layers))
        if topology.devices > FULL_SEARCH_DEVICES:
            fewest = min(slots % (spp * kvp) for spp, kvp in pairs)
            pairs = [(spp, kvp) for spp, kvp in pairs if slots % (spp * kvp) == fewest]
        for spp, kvp in pairs:
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


def _pairs(slots: int, layers: int) -> Iterator[tuple[int, int]]:
    for kvp in range(1, slots + 1):
        for spp in range(1, min(slots // kvp, layers) + 1):
            yield spp, kvp

"""Where a rank stands: rank number, coordinates on the axes, and who shares an axis with it.

Order of the axes, fastest first: tp, kvp, spp, replica. A rank map gives each rank its device.
"""

from msgspec import Struct

from plans.model import Count

Degree = Count


class Parallelism(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the devices are used."""

    tp: Degree = 1
    """Ranks that share every matrix; all inside one node."""
    spp: Degree = 1
    """Pipeline stages; chunks of one request follow each other through them."""
    kvp: Degree = 1
    """Groups that share the KV of one request."""
    replicas: Degree = 1
    """Independent engines."""
    idle: int = 0
    """Devices asked for that no degree fills."""

    @property
    def ranks_per_replica(self) -> int:
        """Ranks of one engine."""
        return self.tp * self.spp * self.kvp

    @property
    def ranks(self) -> int:
        """Ranks of all replicas; idle devices hold none."""
        return self.ranks_per_replica * self.replicas


class Coordinates(Struct, frozen=True, kw_only=True):
    """A rank's place on each axis."""

    replica: int
    stage: int
    group: int
    tp: int


def coordinates(parallelism: Parallelism, rank: int) -> Coordinates:
    """Place of a rank; raises IndexError outside the mesh."""
    if not 0 <= rank < parallelism.ranks:
        raise IndexError(f"rank {rank} is outside 0 to {parallelism.ranks - 1}")
    rest, tp = divmod(rank, parallelism.tp)
    rest, group = divmod(rest, parallelism.kvp)
    replica, stage = divmod(rest, parallelism.spp)
    return Coordinates(replica=replica, stage=stage, group=group, tp=tp)


def rank_at(parallelism: Parallelism, place: Coordinates) -> int:
    """Rank at a place; the inverse of `coordinates`."""
    row = place.replica * parallelism.spp + place.stage
    return (row * parallelism.kvp + place.group) * parallelism.tp + place.tp


def axis_ranks(parallelism: Parallelism, rank: int, axis: str) -> tuple[int, ...]:
    """All ranks that differ from `rank` only on one axis ("tp", "kvp" or "spp"), in axis order."""
    place = coordinates(parallelism, rank)
    strides = {"tp": 1, "kvp": parallelism.tp, "spp": parallelism.tp * parallelism.kvp}
    here = {"tp": place.tp, "kvp": place.group, "spp": place.stage}[axis]
    size = {"tp": parallelism.tp, "kvp": parallelism.kvp, "spp": parallelism.spp}[axis]
    first = rank - here * strides[axis]
    return tuple(first + step * strides[axis] for step in range(size))

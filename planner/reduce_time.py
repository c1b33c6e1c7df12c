"""What the sum over the tp ranks, residual added and norm, takes: twice a layer.

Steps of few tokens take all three in one launch of ours, where ranks read each other's memory
(codegen/kernels/all_reduce_add_rms_norm); others take NCCL's all_reduce and then the kernel of
add_rms_norm. The launch was measured by table `fused` of a profile; for another number of ranks
than was measured its tokens count in proportion to what a rank reads of its peers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from planner.estimates import MEASURED, Estimate, Origin
from planner.fits import LinkTime, RowWise
from planner.profiles import Profile, Row

OP = "all_reduce_add_rms_norm"
TOKENS_MAX = 256
"""Most tokens of the one launch."""
PAIR_READ_BYTES_MAX = 4096 << 10
"""Most bytes that it reads of a peer where there are two ranks."""
READ_BYTES_MAX = 2048 << 10
"""The same of all peers where there are more."""


def fused_tokens(ranks: int, row_bytes: int) -> int:
    """Most tokens of a step that takes one launch; the rule is the kernel's."""
    most = PAIR_READ_BYTES_MAX if ranks == 2 else READ_BYTES_MAX
    return min(TOKENS_MAX, most // ((ranks - 1) * row_bytes))


class Fused:
    """Times of the one launch, as measured between so many ranks."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """Groups the rows by number of ranks."""
        self._ranks = {int(row.key[1]) for row in rows}
        self._rows = {
            ranks: RowWise(
                [
                    Row(
                        key=(str(row.key[0]), row.key[2], row.key[3]),
                        role=row.role,
                        us=row.us,
                        spread_us=row.spread_us,
                    )
                    for row in rows
                    if row.key[1] == ranks
                ]
            )
            for ranks in self._ranks
        }

    def read(self, ranks: int, width: int, tokens: int) -> Estimate:
        """Seconds of one launch; raises OutOfRange."""
        nearest = min(self._ranks, key=lambda each: max(each / ranks, ranks / each))
        scaled = tokens * (ranks - 1) / (nearest - 1)
        found = self._rows[nearest].read(OP, width, max(scaled, 1.0))
        apart = max(ranks / nearest, nearest / ranks)
        factor = max(found.origin.factor, apart)
        return Estimate(
            found.seconds, Origin(factor, interpolated=found.origin.interpolated or apart > 1)
        )


def fused_of(profile: Profile) -> Fused | None:
    """Of a profile, or None where it was not measured."""
    rows = [row for row in profile.rows("fused") if row.key[0] == OP]
    return Fused(rows) if rows else None


@dataclass(frozen=True, kw_only=True)
class Line:
    """latency_s + tokens x token_s of one sum, nowhere above what it takes."""

    latency_s: float
    token_s: float

    def beyond(self, tokens: int, seconds: float) -> float:
        """What the line leaves of a time."""
        return max(seconds - self.latency_s - tokens * self.token_s, 0.0)


class Reduce:
    """The time of one sum beyond add_rms_norm, which every program has."""

    def __init__(
        self, *, ranks: int, width: int, link: LinkTime, fused: Fused | None, norms: RowWise
    ) -> None:
        """width is that of the residual stream, in 16-bit numbers."""
        self._ranks, self._width = ranks, width
        self._row_bytes = 2 * width
        self._link, self._fused, self._norms = link, fused, norms
        self.most = fused_tokens(ranks, self._row_bytes) if fused else 0
        """Tokens of the largest step with one launch."""
        self.origin = MEASURED
        """The weakest that was read."""

    def seconds(self, tokens: int) -> float:
        """Beyond add_rms_norm; raises OutOfRange."""
        if self._fused is None or tokens > self.most:
            self.origin = max(self.origin, self._link.origin)
            return self._link.latency_s + tokens * self._row_bytes * self._link.byte_s
        found = self._fused.read(self._ranks, self._width, tokens)
        self.origin = max(self.origin, found.origin)
        norm = self._norms.read("add_rms_norm", self._width, tokens)
        return max(found.seconds - norm.seconds, 0.0)

    def line(self, sizes: Sequence[int]) -> Line:
        """Through a step of one token, below those of all other sizes."""
        first_s = self.seconds(1)
        slopes = [(self.seconds(size) - first_s) / (size - 1) for size in sizes if size > 1]
        token_s = min(max(min(slopes, default=0.0), 0.0), first_s)
        return Line(latency_s=first_s - token_s, token_s=token_s)

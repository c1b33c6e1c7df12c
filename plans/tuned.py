"""What tuning a kernel on a device found: the record that codegen writes and the planner reads.

A record is dated and says on what it was made. One that does not fit (other device, other compute
capability, other Triton, or a kernel changed since) still gives better defaults than none, so it is
used, and said aloud.
"""

from collections.abc import Iterable, Mapping
from math import log2

from msgspec import Struct

TOKEN_KEYS = ("batch", "keys", "tokens")
"""Sizes of a bucket that steps vary; the others are the model's, and have to be equal."""
TOKENS_MAX = "TOKENS_MAX"
"""Tunable of ops that take the library's product in steps of more tokens than it says."""


class Bucket(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The best parameters on one problem, and how good they are."""

    regime: str
    """Which problems of codegen/problems.py."""
    when: dict[str, int]
    """Sizes of the problem."""
    params: dict[str, int]
    """Only those that were tuned in this regime."""
    us: float
    """Median time of a call inside a CUDA graph, data not in L2."""
    spread_us: float
    """Between the fifth and the fourth fifth of the rounds."""
    default_us: float
    """The same for the defaults, in the same rounds."""
    floor_us: float
    """The larger of products over the device's rate and bytes over its bandwidth."""
    error: float
    """Largest difference from the reference, as a share of the op's tolerance."""
    library_us: float | None = None
    """The same problem without our product, in the same rounds, of ops that TOKENS_MAX bounds."""


class Tuned(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One op on one device."""

    op: str
    device: str
    """As torch names it."""
    compute_capability: str
    driver: str
    torch: str
    triton: str
    source_sha256: str
    """Of the op's folder, see codegen/tune.py."""
    effort: str
    made: str
    """Day, UTC."""
    command: str
    buckets: tuple[Bucket, ...]


def nearest(buckets: Iterable[Bucket], regime: str, sizes: Mapping[str, int]) -> Bucket | None:
    """The bucket of a regime that is nearest to sizes, or None.

    Sizes of the model have to be equal where both name them, unless no bucket has equal ones; steps
    are compared by the logarithm of their tokens, keys and sequences. A draw goes to the first.
    """
    rivals = [each for each in buckets if each.regime == regime]

    def distance(each: Bucket) -> tuple[int, float]:
        shared = each.when.keys() & sizes.keys()
        unequal = sum(each.when[key] != sizes[key] for key in shared - set(TOKEN_KEYS))
        apart = sum(abs(log2(max(each.when[key], 1) / max(sizes[key], 1))) for key in shared)
        return unequal, apart

    return min(rivals, key=distance, default=None)


def most_tokens(buckets: Iterable[Bucket], products: Iterable[Mapping[str, int]]) -> int | None:
    """TOKENS_MAX of an op: up to which of the measured tokens our products beat the library's.

    products  n, k and `count`, how often a step has the product; all times of an op count together,
              since its file has one bound. None where no bucket names the library's time.
    """
    rivals = [each for each in buckets if each.library_us is not None]
    bound = 0 if rivals else None
    wanted = list(products)
    for tokens in sorted({each.when["tokens"] for each in rivals}):
        here = [each for each in rivals if each.when["tokens"] == tokens]
        ours = library = 0.0
        for product in wanted or [{"count": 1}]:
            found = nearest(here, here[0].regime, product)
            assert found is not None, "rivals of one number of tokens are of one regime"
            ours += product["count"] * found.us
            library += product["count"] * (found.library_us or 0.0)
        if ours > library:
            break
        bound = tokens
    return bound

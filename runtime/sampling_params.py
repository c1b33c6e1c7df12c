"""What a request says about how its tokens are drawn; no torch, so that the core may carry it.

The meaning of the fields, and the order in which they apply, stands in runtime/sampling.py.
"""

import math
from typing import Annotated

from msgspec import Meta, Struct

from plans.errors import UsageError

SEED_MAX = 2**63 - 1


class SamplingParams(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one request's tokens are drawn; raises UsageError where a value breaks its rule."""

    temperature: Annotated[float, Meta(ge=0)] = 0.0
    """Logits are divided by it; 0 takes the best token, and then nothing below applies."""
    top_k: Annotated[int, Meta(ge=0)] = 0
    """Only this many best tokens stay, and those that tie with the last of them; 0 keeps all."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Only the best tokens stay whose probabilities first reach this sum."""
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Only tokens stay that are at least this likely, as a share of the most likely one."""
    seed: Annotated[int, Meta(ge=0, le=SEED_MAX)] = 0
    """Fixes the draws: the same seed and the same logits give the same tokens."""

    def __post_init__(self) -> None:
        """Checks the limits also where a value is built in Python, since Meta acts on decoding."""
        rules = {
            "temperature": ("finite and at least 0", 0 <= self.temperature < math.inf),
            "top_k": ("at least 0 (0 keeps all tokens)", self.top_k >= 0),
            "top_p": ("above 0 and at most 1", 0 < self.top_p <= 1),
            "min_p": ("from 0 to 1", 0 <= self.min_p <= 1),
            "seed": (f"from 0 to {SEED_MAX}", 0 <= self.seed <= SEED_MAX),
        }
        for name, (rule, holds) in rules.items():
            if not holds:
                raise UsageError(f"{name}: {getattr(self, name)} is not {rule}")

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken, with no draw."""
        return self.temperature == 0

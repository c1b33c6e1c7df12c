"""Rotary frequencies: of the base, and stretched for contexts beyond the trained one.

Plain double arithmetic, so that the same plan gives the same digits on every machine; users round
to fp32. Sources: arXiv 2309.00071 (linear, yarn), the Llama 3.1 reference code (llama3).
"""

import math

from plans.model import Rope, RopeScaling


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[float, ...]:
    """Radians per position of each pair of a head's elements, fastest first."""
    plain = [rope.theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2)]
    scaling = rope.scaling
    if scaling is None:
        return tuple(plain)
    if scaling.kind == "linear":
        return tuple(frequency / scaling.factor for frequency in plain)
    if scaling.kind == "llama3":
        return tuple(_llama3(frequency, scaling) for frequency in plain)
    low, high = (
        _yarn_pair(rope, turns, head_dim) for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), head_dim - 1)
    span = high - low if high != low else 0.001  # the reference code's guard against a step of 0
    ramp = [min(max((pair - low) / span, 0.0), 1.0) for pair in range(head_dim // 2)]
    return tuple(
        frequency / scaling.factor * share + frequency * (1 - share)
        for frequency, share in zip(plain, ramp, strict=True)
    )


def attention_factor(rope: Rope) -> float:
    """What yarn multiplies both cos and sin with; 1 for the others."""
    scaling = rope.scaling
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return 0.1 * math.log(scaling.factor) + 1.0


def _llama3(frequency: float, scaling: RopeScaling) -> float:
    """Waves that turn often in the trained context stay, slow ones stretch, between is blended."""
    turns = scaling.original_context_tokens * frequency / (2 * math.pi)
    if turns > scaling.high_freq_factor:
        return frequency
    if turns < scaling.low_freq_factor:
        return frequency / scaling.factor
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - share) * frequency / scaling.factor + share * frequency


def _yarn_pair(rope: Rope, turns: float, head_dim: int) -> float:
    """The pair, as a fraction, whose wave turns so often in the trained context."""
    assert rope.scaling is not None, "yarn has a scaling"
    context = rope.scaling.original_context_tokens
    return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

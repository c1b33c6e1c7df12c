"""What a scheduling policy is: it orders requests and says what each yields; pack.py packs."""

from typing import Any, Protocol

import numpy as np
from msgspec import Struct

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


class Prefills(Struct, frozen=True, kw_only=True):
    """Requests that still have prefill to do, as columns of one length; read only."""

    number: Ints
    """Arrival order: smaller came first."""
    arrival_s: Floats
    deadline_s: Floats
    """Relative to arrival."""
    work_s: Floats
    """Predicted seconds of the whole lone prefill, fixed at arrival."""
    remaining_s: Floats
    """Predicted seconds of what is not yet submitted."""
    prompt_tokens: Ints
    missing_tokens: Ints
    started: Bools
    """It holds KV."""
    recent: Bools
    """It had a chunk in the step before: the prefill in progress."""
    long: Bools
    served_tokens: Ints
    """Prefill tokens submitted, of all requests, since this one arrived."""
    step: int
    """Steps before the one to be packed."""

    def __len__(self) -> int:
        """Requests."""
        return len(self.number)


class Ranked(Struct, frozen=True, kw_only=True):
    """A policy's answer, one entry a request."""

    keys: Floats
    """Finite; the smallest goes first, ties by arrival number."""
    yields: Floats
    """Share of the step in [0, 1) that a long request leaves to waiting short ones."""
    demoted: Bools
    """Best effort: goes after all others but keeps its guaranteed share of the step."""


class Policy(Protocol):
    """Orders requests. Owns no pages, no budget, no clock.

    Pure: same arguments, same answer. Called once a step, because keys move with time; no order is
    kept between steps.
    """

    def rank(self, waiting: Prefills, *, now_s: float) -> Ranked:
        """Keys (smallest first), yields and demotions, one a request."""
        ...


LEAST_S = 1e-6
"""Divisor of a key where work or deadline is nothing: keys stay finite."""


def slack_s(waiting: Prefills, now_s: float) -> Floats:
    """Seconds that each request could still wait: arrival + deadline - now - remaining prefill."""
    return waiting.arrival_s + waiting.deadline_s - now_s - waiting.remaining_s


def plain(keys: Floats) -> Ranked:
    """The answer of a policy that yields nothing and demotes nobody."""
    return Ranked(
        keys=keys, yields=np.zeros(len(keys)), demoted=np.zeros(len(keys), dtype=np.bool_)
    )

"""The contract between the engine loop and whatever runs its steps.

The engine alone decides: which tokens of which request, which pages, in which order. An executor
runs steps in `step_id` order on every stage and reports each when its last stage is done. It keeps
by request number what does not change from step to step: the page table, and live the token ids.
"""

from typing import Any, Protocol

import numpy as np
from msgspec import Struct

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


class Chunk(Struct, frozen=True, kw_only=True):
    """One prefill chunk: tokens [prefix, prefix + tokens) of the prompt and the answer so far."""

    request: int
    """Number that the engine gave the request."""
    tokens: int
    prefix: int
    """Tokens of the request whose KV exists, or will by the time the step runs."""
    home: int
    """Group of shard 0; shard i lies in group (home + i) mod kvp."""
    samples: bool
    """The chunk ends the prefill: its last token's logits are sampled."""


class NewPages(Struct, frozen=True, kw_only=True):
    """Pages appended to one request's table of one shard; they hold before the step runs."""

    request: int
    shard: int
    pages: tuple[int, ...]


class Step(Struct, frozen=True, kw_only=True):
    """One batch on its way through the stages. Order of rows: decodes first, then chunks."""

    step_id: int
    decodes: Ints
    """Request numbers that decode one token each: their last token is the query."""
    decode_prefix: Ints
    """Tokens whose KV exists, for each decode: all of the request but its last token."""
    decode_home: Ints
    """Group of shard 0 of each decode."""
    chunks: tuple[Chunk, ...] = ()
    pages: tuple[NewPages, ...] = ()
    evicted: tuple[int, ...] = ()
    """Requests that lost their pages since the step before: forget their page tables, keep their
    tokens. Applied before `pages`: a request may be evicted and start again in one step."""
    ended: tuple[int, ...] = ()
    """Requests that finished or were cancelled since the step before: forget them."""

    @property
    def tokens(self) -> int:
        """Query tokens of the step."""
        return len(self.decodes) + sum(chunk.tokens for chunk in self.chunks)


class StepResult(Struct, frozen=True, kw_only=True):
    """What came of a step."""

    step: Step
    tokens: dict[int, int]
    """Sampled token by request, for each decode and sampling chunk; empty in simulation."""
    stage_s: tuple[float, ...]
    """Seconds that each stage spent on it."""
    finished_s: float
    """Clock when the last stage was done."""


class Executor(Protocol):
    """Runs steps. Owns no schedule and hands out no pages."""

    def can_submit(self) -> bool:
        """Whether the first stage takes another step now."""
        ...

    def submit(self, step: Step) -> None:
        """Starts a step; steps come in step_id order. Call only after can_submit()."""
        ...

    def in_flight(self) -> int:
        """Steps submitted and not yet collected."""
        ...

    def wait(self, *, until_s: float | None) -> list[StepResult]:
        """Lets time pass until a step ends, the first stage frees, or until_s; results in order.

        With nothing in flight it only lets time pass until until_s.
        """
        ...

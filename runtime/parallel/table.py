"""What each rank remembers of the requests: their tokens, and their pages by shard.

Every rank applies every step, in step_id order, so all tables are the same at the same step. The
engine decides everything in them; `Totals` lets a rank notice that it has missed something.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from msgspec import Struct

from plans.plan import Plan
from runtime.executor.base import Ints, Step
from runtime.sampling_params import SamplingParams


class Totals(Struct, frozen=True, array_like=True):
    """Sums over a table, kept up to date with it."""

    requests: int
    tokens: int
    """Prompts and answers so far."""
    pages: int
    """Held by all shards."""


@dataclass(slots=True)
class _Pages:
    """Page numbers in the order of the tokens, with spare room at the end."""

    numbers: Ints = field(default_factory=lambda: np.zeros(8, dtype=np.int64))
    held: int = 0

    def grow(self, pages: tuple[int, ...]) -> None:
        end = self.held + len(pages)
        if end > len(self.numbers):
            self.numbers = np.resize(self.numbers, 2 * end)
        self.numbers[self.held : end] = pages
        self.held = end


@dataclass(slots=True, kw_only=True)
class State:
    """What is kept of one request."""

    tokens: list[int]
    """Prompt and answer so far."""
    prompt_tokens: int
    sampling: SamplingParams
    coming: int = 0
    """Sampled tokens that are on the device and not yet here."""
    shards: dict[int, _Pages] = field(default_factory=dict)

    def grow(self, shard: int, pages: tuple[int, ...]) -> None:
        """Appends pages to a shard."""
        self.shards.setdefault(shard, _Pages()).grow(pages)

    def pages(self, shard: int, count: int) -> Ints:
        """The first pages of a shard; an AssertionError where it has not as many."""
        held = self.shards.get(shard, _Pages())
        assert held.held >= count, f"shard {shard} has KV without a page"
        return held.numbers[:count]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One request's share of a step."""

    number: int
    state: State
    prefix: int
    tokens: int
    home: int
    samples: bool


class RequestTable:
    """State by request number."""

    def __init__(self) -> None:
        """Knows nobody."""
        self._states: dict[int, State] = {}
        self._tokens = 0
        self._pages = 0

    def __len__(self) -> int:
        """Requests added and not ended."""
        return len(self._states)

    def sampling_of(self, number: int) -> SamplingParams:
        """How a request is sampled."""
        return self._states[number].sampling

    def totals(self) -> Totals:
        """The sums."""
        return Totals(len(self._states), self._tokens, self._pages)

    def add(self, number: int, prompt: Sequence[int], sampling: SamplingParams) -> None:
        """Makes a request known, before the first step that holds a piece of it."""
        self._states[number] = State(
            tokens=list(prompt), prompt_tokens=len(prompt), sampling=sampling
        )
        self._tokens += len(prompt)

    def append(self, sampled: Iterable[tuple[int, int]]) -> None:
        """Adds sampled tokens, (request, token), to their answers; ended requests have none."""
        for number, token in sampled:
            state = self._states.get(number)
            if state is not None:
                state.tokens.append(token)
                state.coming = max(state.coming - 1, 0)
                self._tokens += 1

    def expect(self, numbers: Iterable[int]) -> None:
        """Notes that the requests' next tokens are on the device; `append` brings them."""
        for number in numbers:
            self._states[number].coming += 1

    def apply(self, step: Step) -> None:
        """Forgets and grows as a step says, before it runs."""
        for number in step.ended:
            state = self._states.pop(number, None)
            if state is not None:  # a request may end before it was ever scheduled
                self._tokens -= len(state.tokens)
                self._drop_pages(state)
        for number in step.evicted:
            if number in self._states:
                self._drop_pages(self._states[number])
        for new in step.pages:
            self._states[new.request].grow(new.shard, new.pages)
            self._pages += len(new.pages)

    def _drop_pages(self, state: State) -> None:
        self._pages -= sum(pages.held for pages in state.shards.values())
        state.shards.clear()

    def rows(self, step: Step) -> list[Row]:
        """The rows of a step in its order: decodes, then chunks."""
        decodes = zip(
            step.decodes.tolist(),
            step.decode_prefix.tolist(),
            step.decode_home.tolist(),
            strict=True,
        )
        rows = [
            Row(
                number=number,
                state=self._states[number],
                prefix=prefix,
                tokens=1,
                home=home,
                samples=True,
            )
            for number, prefix, home in decodes
        ]
        rows += [
            Row(
                number=chunk.request,
                state=self._states[chunk.request],
                prefix=chunk.prefix,
                tokens=chunk.tokens,
                home=chunk.home,
                samples=chunk.samples,
            )
            for chunk in step.chunks
        ]
        for row in rows:
            known, end = len(row.state.tokens) + row.state.coming, row.prefix + row.tokens
            assert end == known if row.samples else end < known, (row.number, end, known)
        return rows


def newest_shard(plan: Plan, row: Row) -> int:
    """Shard that a row's keys are written to; a chunk never crosses a shard's edge."""
    return row.prefix // plan.kv.tokens_per_kvp_shard


def row_groups(plan: Plan, row: Row) -> list[int]:
    """Groups that hold a shard of a row's request, oldest shard first, the writing one last."""
    kvp = plan.parallelism.kvp
    return [(row.home + shard) % kvp for shard in range(newest_shard(plan, row) + 1)]


def step_groups(plan: Plan, step: Step) -> frozenset[int]:
    """Groups that have work in a step."""
    kvp, size = plan.parallelism.kvp, plan.kv.tokens_per_kvp_shard
    if kvp == 1:
        return frozenset({0} if step.tokens else ())
    homes = np.concatenate([step.decode_home, [chunk.home for chunk in step.chunks]])
    newest = np.concatenate([step.decode_prefix, [chunk.prefix for chunk in step.chunks]]) // size
    found = {
        (int(home) + shard) % kvp
        for home, last in set(zip(homes.tolist(), newest.tolist(), strict=True))
        for shard in range(int(last) + 1)
    }
    return frozenset(found)

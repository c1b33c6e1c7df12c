"""The load of a step in every KVP group at once: the slowest group decides its time.

Shard i of a request lies in group (home + i) mod groups. Each group that holds a shard runs the
same query tokens; only the newest shard is causal and written to (design section 4, KVP).
"""

from collections.abc import Sequence

import numpy as np

from plans.chunks import add_sharded_chunk
from plans.steptime import StepLoad, StepTime
from runtime.executor.base import Step


class GroupLoads:
    """One StepLoad a group, all stages summed."""

    __slots__ = ("_groups", "_one", "_shard_tokens")

    def __init__(self, step_time: StepTime, *, groups: int, shard_tokens: int) -> None:
        """Starts empty."""
        self._shard_tokens = shard_tokens
        self._one = StepLoad(step_time) if groups == 1 else None
        """The only group, where there is one: then no request is cut."""
        self._groups = (
            [StepLoad(step_time) for _ in range(groups)] if self._one is None else [self._one]
        )

    def active(self, home: int, prefix: int) -> list[tuple[int, int]]:
        """(group, shards behind the newest one) of each group that works on a token at `prefix`."""
        newest = prefix // self._shard_tokens
        count = len(self._groups)
        return [((home + newest - behind) % count, behind) for behind in range(newest + 1)]

    def add_decodes(self, prefixes: Sequence[int], homes: Sequence[int]) -> None:
        """Adds one decode token for each request; a prefix excludes the token itself."""
        if not prefixes:
            return
        if self._one is not None:
            self._one.add_decodes(len(prefixes), sum(prefixes) + len(prefixes))
            return
        groups = len(self._groups)
        prefix, home = np.array(prefixes), np.array(homes)
        newest = prefix // self._shard_tokens
        for behind in range(int(newest.max()) + 1):
            here = newest >= behind
            group = (home + newest - behind)[here] % groups
            keys = self._shard_tokens
            if behind == 0:
                read = prefix[here] + 1 - newest[here] * self._shard_tokens
            else:
                read = np.full(len(group), keys)
            counts = np.bincount(group, minlength=groups)
            tokens = np.bincount(group, weights=read, minlength=groups)
            merges = np.bincount(group, weights=newest[here], minlength=groups)
            for index in np.flatnonzero(counts):
                self._groups[index].add_decodes(
                    int(counts[index]), int(tokens[index]), merges=int(merges[index])
                )

    def add_chunk(self, home: int, tokens: int, prefix: int) -> None:
        """Adds a chunk to every group that holds a shard of its request."""
        if self._one is not None:
            self._one.add_chunk(tokens, prefix)
            return
        for group, behind in self.active(home, prefix):
            add_sharded_chunk(
                self._groups[group], tokens, prefix, self._shard_tokens, behind=behind
            )

    def tokens(self, home: int, prefix: int) -> int:
        """Most query tokens of any group that a token at `prefix` would work in."""
        if self._one is not None:
            return self._one.tokens
        return max(self._groups[group].tokens for group, _ in self.active(home, prefix))

    def seconds(self) -> float:
        """Time of the slowest group."""
        if self._one is not None:
            return self._one.seconds()
        return max(load.seconds() for load in self._groups)

    def stages_s(self) -> tuple[float, ...]:
        """Time of the slowest group on each stage."""
        if self._one is not None:
            return self._one.stages_s()
        return tuple(map(max, zip(*(load.stages_s() for load in self._groups), strict=True)))

    def group_seconds(self, group: int) -> float:
        """Time of one group."""
        return self._groups[group].seconds()

    def groups_s(self) -> list[float]:
        """Time of each group."""
        return [load.seconds() for load in self._groups]

    def largest_chunk(
        self, home: int, prefix: int, budget_s: float, most: int, *, at_least: int = 1
    ) -> int:
        """Largest chunk, from at_least on, that keeps every group it works in within budget_s."""
        if self._one is not None:
            return self._one.largest_chunk(prefix, budget_s, most, at_least=at_least)
        newest = prefix // self._shard_tokens
        for group, behind in self.active(home, prefix):
            if most <= 0:
                break
            keys_only = behind > 0
            keys = self._shard_tokens if keys_only else prefix - newest * self._shard_tokens
            most = self._groups[group].largest_chunk(
                keys,
                budget_s,
                most,
                at_least=at_least,
                kvp_groups=newest + 1,
                keys_only=keys_only,
            )
        return most

    def add_step(self, step: Step) -> None:
        """Adds all work of a step."""
        self.add_decodes(step.decode_prefix.tolist(), step.decode_home.tolist())
        for chunk in step.chunks:
            self.add_chunk(chunk.home, chunk.tokens, chunk.prefix)

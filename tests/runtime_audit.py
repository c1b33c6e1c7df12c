"""An observer that re-derives the state of every request from the steps alone and checks them.

Independent of the book: it sees only what an executor sees, plus arrivals and ends.
"""

from dataclasses import dataclass, field

import pytest

from plans.plan import Plan
from runtime.clock import VirtualClock
from runtime.engine import Engine
from runtime.executor.base import Chunk, Step, StepResult
from runtime.executor.simulated import SimulatedExecutor
from runtime.request import Record, Sequence
from runtime.scheduler import PACKER, load_policy
from runtime.scheduler.loads import GroupLoads


@dataclass(slots=True)
class Seen:
    """One request as the steps show it."""

    prompt_tokens: int
    max_tokens: int
    own_tbt: bool
    cursor: int = 0
    sampled: int = 0
    in_flight: int = 0
    computed: int = 0
    """Tokens computed, recomputed ones counted again."""
    lost: int = 0
    recomputes: bool = False
    """Evicted and not yet sampled again."""
    pages: dict[int, list[int]] = field(default_factory=dict)
    home: int | None = None


class Audit:
    """Raises AssertionError at the first step that breaks an invariant."""

    def __init__(
        self,
        plan: Plan,
        *,
        chunk_tokens: int | None = None,
        decodes_first: bool = False,
        ahead: bool = False,
    ) -> None:
        """What may be expected of the steps.

        decodes_first  no running decode is left out of a step but for want of a page
        ahead          a decode may be in a step while its last token is in flight
        """
        self.in_flight_most = int(ahead)
        self.plan = plan
        self.decodes_first = decodes_first
        self.chunk_tokens = chunk_tokens
        self.live: dict[int, Seen] = {}
        self.records: dict[int, Record] = {}
        self.steps: list[Step] = []
        self.last_finished_s = 0.0

    def arrived(self, sequence: Sequence, now_s: float) -> None:
        request = sequence.request
        assert request.number not in self.live, "arrived twice"
        assert now_s >= request.arrival_s
        self.live[request.number] = Seen(
            request.prompt_tokens, request.max_tokens, own_tbt=request.tbt_target_s is not None
        )

    def submitted(self, step: Step, now_s: float) -> None:
        assert step.step_id == len(self.steps), "step ids have a gap"
        self.steps.append(step)
        for number in step.ended:
            assert number not in self.live, "told an executor to forget a live request"
        for number in step.evicted:
            if number in self.live:
                seen = self.live[number]
                assert seen.in_flight == 0, "evicted in flight"
                seen.lost += seen.cursor
                seen.cursor, seen.pages, seen.home = 0, {}, None
                seen.recomputes = True
        for new in step.pages:
            self.live[new.request].pages.setdefault(new.shard, []).extend(new.pages)
        limit_s = self._limit_s()
        self._decodes(step)
        self._chunks(step)
        self._no_page_twice()
        self._budget(step, limit_s)

    def _decodes(self, step: Step) -> None:
        numbers = step.decodes.tolist()
        assert len(set(numbers)) == len(numbers)
        if self.decodes_first:
            for number in self.live.keys() - set(numbers):
                seen = self.live[number]
                runs = seen.sampled and not seen.recomputes and self._decodes_now(seen)
                needs_page = seen.cursor % self.plan.kv.page_tokens == 0
                assert not runs or needs_page, f"decode {number} was displaced"
        for number, prefix in zip(numbers, step.decode_prefix.tolist(), strict=True):
            seen = self.live[number]
            ahead = self.in_flight_most and seen.in_flight
            assert seen.sampled >= 1 or ahead, "decode before its first token"
            assert seen.cursor == prefix == seen.prompt_tokens + seen.sampled - 1 + seen.in_flight
            assert seen.in_flight <= self.in_flight_most, "decodes a token that does not exist yet"
            assert seen.sampled + seen.in_flight < seen.max_tokens
            self._advance(number, 1)

    def _decodes_now(self, seen: Seen) -> bool:
        more = seen.sampled + seen.in_flight < seen.max_tokens
        return more and seen.in_flight <= self.in_flight_most

    def _chunks(self, step: Step) -> None:
        numbers = [chunk.request for chunk in step.chunks]
        assert len(set(numbers)) == len(numbers)
        assert not set(numbers) & set(step.decodes.tolist())
        shard = self.plan.kv.tokens_per_kvp_shard
        for chunk in step.chunks:
            seen = self.live[chunk.request]
            assert chunk.tokens >= 1
            assert chunk.prefix == seen.cursor
            assert seen.home in (None, chunk.home), "home moved while pages are held"
            seen.home = chunk.home
            assert chunk.prefix // shard == (chunk.prefix + chunk.tokens - 1) // shard
            self._advance(chunk.request, chunk.tokens)
            length = seen.prompt_tokens + seen.sampled
            assert seen.cursor <= length, "computes tokens that do not exist"
            assert chunk.samples == (seen.cursor == length)

    def _advance(self, number: int, tokens: int) -> None:
        seen = self.live[number]
        seen.cursor += tokens
        seen.computed += tokens
        seen.in_flight += 1
        shard = self.plan.kv.tokens_per_kvp_shard
        for index in range(-(-seen.cursor // shard)):
            needed = min(seen.cursor - index * shard, shard)
            held = len(seen.pages.get(index, [])) * self.plan.kv.page_tokens
            assert held >= needed, f"request {number} writes KV without a page"

    def _no_page_twice(self) -> None:
        owners: dict[tuple[int, int], int] = {}
        for number, seen in self.live.items():
            for shard, pages in seen.pages.items():
                group = ((seen.home or 0) + shard) % self.plan.parallelism.kvp
                for page in pages:
                    assert 0 <= page < self.plan.kv.pages_per_rank
                    other = owners.setdefault((group, page), number)
                    assert other == number, f"page {page} of {other} and {number}"
        held = sum(len(pages) for seen in self.live.values() for pages in seen.pages.values())
        assert held == len(owners), "one request holds a page twice"

    def _limit_s(self) -> float:
        """The most that the step may be predicted to take, margin included."""
        config = self.plan.scheduler
        running = [seen for seen in self.live.values() if seen.sampled and not seen.recomputes]
        if all(seen.own_tbt for seen in running):
            return config.idle_budget_s
        return config.step_budget_s

    def _budget(self, step: Step, limit_s: float) -> None:
        """Within the budget, but for the least chunk of the first prefill."""
        config, most = self.plan.scheduler, self.chunk_tokens
        loads = self._loads(step)
        for chunk in step.chunks:
            tokens = loads.tokens(chunk.home, chunk.prefix)
            assert tokens <= max(config.max_step_tokens, len(step.decodes))
            assert most is None or tokens <= max(most, len(step.decodes))
        if most is not None or not step.chunks or self._fits(loads, limit_s):
            return
        small = [chunk for chunk in step.chunks if chunk.tokens <= config.min_chunk_tokens]
        assert small, "the step is over its budget and no chunk is a least one"
        assert any(
            len(step.chunks) == 1 or self._fits(self._loads(step, without=each), limit_s)
            for each in small
        ), "more than one least chunk takes the step over its budget"

    def _fits(self, loads: GroupLoads, limit_s: float) -> bool:
        return loads.seconds() * (1 + self.plan.step_time.margin) <= limit_s * (1 + 1e-9)

    def _loads(self, step: Step, *, without: Chunk | None = None) -> GroupLoads:
        """Predicted load of the decodes and of all chunks but one."""
        loads = GroupLoads(
            self.plan.step_time,
            groups=self.plan.parallelism.kvp,
            shard_tokens=self.plan.kv.tokens_per_kvp_shard,
        )
        loads.add_decodes(step.decode_prefix.tolist(), step.decode_home.tolist())
        for chunk in step.chunks:
            if chunk != without:
                loads.add_chunk(chunk.home, chunk.tokens, chunk.prefix)
        return loads

    def collected(self, result: StepResult) -> None:
        assert result.finished_s >= self.last_finished_s, "steps end out of order"
        self.last_finished_s = result.finished_s
        step = result.step
        sampling = step.decodes.tolist() + [each.request for each in step.chunks if each.samples]
        plain = [each.request for each in step.chunks if not each.samples]
        for number in sampling + plain:
            if number in self.live:
                self.live[number].in_flight -= 1
        for number in sampling:
            if number in self.live:
                self.live[number].sampled += 1
                self.live[number].recomputes = False

    def ended(self, record: Record, now_s: float) -> None:
        number = record.request.number
        assert number not in self.records, "ended twice"
        self.records[number] = record
        seen = self.live.pop(number)
        assert record.generated == seen.sampled <= seen.max_tokens
        if record.reason == "length":
            assert seen.sampled == seen.max_tokens
            length = seen.prompt_tokens + seen.sampled - 1
            assert seen.computed == length + seen.lost, "a token was computed twice or never"
            assert record.recomputed_tokens == seen.lost


class FeedingExecutor(SimulatedExecutor):
    """Takes a second step while the first runs, as one does that feeds tokens back by itself."""

    def can_submit(self) -> bool:
        return self.in_flight() < 2


@dataclass
class Run:
    """One simulated run, audited."""

    plan: Plan
    policy: str = "lars"
    ahead: bool = False
    audit: Audit = field(init=False)
    clock: VirtualClock = field(default_factory=VirtualClock)

    def __post_init__(self) -> None:
        scheduling = load_policy(self.policy, self.plan.scheduler)
        self.audit = Audit(
            self.plan,
            chunk_tokens=scheduling.chunk_tokens,
            decodes_first=scheduling.composer == PACKER,
            ahead=self.ahead,
        )
        executor = FeedingExecutor if self.ahead else SimulatedExecutor
        self.engine = Engine(
            self.plan,
            executor(self.plan, self.clock),
            self.clock,
            scheduling,
            observer=self.audit,
            ahead=self.ahead,
        )

    def drain(self, most_ticks: int = 100_000) -> None:
        for _ in range(most_ticks):
            if not self.engine.tick():
                break
        else:
            pytest.fail("does not drain")
        self.engine.book.check_integrity()
        assert self.engine.book.pools.used_share() == 0.0
        assert not self.engine.book.sequences

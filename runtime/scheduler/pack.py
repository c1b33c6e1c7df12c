"""Fills one step: decodes first, then prefill chunks in the policy's order, within the budgets.

Shared by all policies, so that none can break a budget. Invariants:

- every decode that can run is in the step, one token each; prefills never displace it
- predicted seconds stay within the budget, but for the minimum progress of the first prefill
- tokens of a group stay within max_step_tokens; a chunk stays within the plan's schedule and shard
- where steps are launched ahead, one that the budget ends leaves out the few tokens of a last tile,
  and a chunk that it cuts ends with a tile of queries
- best-effort prefills go last, but first in the steps that their share pays for (share.py)
- at most one long prefill a group while others wait; it leaves its yield to waiting short ones
- what does not fit is passed over, and time that nobody claimed goes to whom it would have fed
"""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import numpy as np

from plans.chunks import chunk_at, query_tile
from runtime.book import Book
from runtime.executor.base import Step
from runtime.request import Sequence
from runtime.scheduler import Scheduling
from runtime.scheduler.budget import TimeBudget
from runtime.scheduler.commit import StepMaker
from runtime.scheduler.loads import GroupLoads
from runtime.scheduler.memory import Displaceable, Room, page_for_decode
from runtime.scheduler.order import Candidate, Queue, queues
from runtime.scheduler.pages import PageTaker, StepPages
from runtime.scheduler.share import BestEffortShare

MISSES = 256
"""Candidates passed over in one scan before it ends; bounds the time of a decision."""
NOTHING_FAILED = (-1.0, 0)
"""Limit and prefix of a chunk that did not fit, when all did so far."""
TILE_TOKENS = 128
"""Tokens that a matrix product takes at a time, and between the sizes of large steps' graphs: so
1,026 tokens take as long as 1,152 (bench/results/engine_steps_h100_202611.csv)."""
TILE_SHARE = 1 / 8
"""Most of a chunk that is cut off so that a step ends with a tile; more would cost more steps."""


@dataclass(slots=True)
class Draft:
    """A step under construction."""

    loads: GroupLoads
    budget_s: float
    members: set[int]
    """Requests with a part in it."""
    pages: StepPages
    placed: list[tuple[Sequence, int]] = field(default_factory=list)
    """Chunks: (request, tokens)."""
    long_groups: set[int] = field(default_factory=set)
    misses: int = 0
    hopeless: tuple[float, int] = NOTHING_FAILED
    """(limit, prefix): within that limit no least chunk behind that prefix, or more, fits."""
    ended: bool = False
    """What is left of the budget would begin a tile for a few tokens."""
    fits: tuple[int, float, bool] = (-1, 0.0, True)
    """Chunks placed, limit, and whether a fresh prompt still fitted then."""


class Packer:
    """Turns the book into the next step."""

    def __init__(self, book: Book, scheduling: Scheduling) -> None:
        """Packs for the book's plan, in the order of the policy."""
        self._book = book
        self._plan = book.plan
        self._config = book.plan.scheduler
        self._scheduling = scheduling
        self._maker = StepMaker(book)
        self._one_group = book.plan.parallelism.kvp == 1
        self._tile = query_tile(book.plan.model.group)
        """Tokens of a tile of queries."""
        self._budget = TimeBudget(book.plan)
        self._pages = PageTaker(book)
        self._share = BestEffortShare(
            self._config.best_effort_share, groups=book.plan.parallelism.kvp
        )
        self._starts = 0
        """Fresh prompts that may still start in the step under construction."""
        self.overrun_s = 0.0
        """Seconds that a step takes beyond the formula, learnt by the engine."""

    def pack(self, now_s: float) -> Step | None:
        """The next step, with pages taken and cursors moved; None where nothing can run now."""
        book = self._book
        decodes = book.ready()
        page_tokens = book.pools.page_tokens
        edge = [each for each in decodes if not each.scheduled % page_tokens]
        if edge:
            stalled = self._grow_decodes(edge)
            if stalled and book.ahead:
                return None  # those who could give way are in flight: the step there ends first
            decodes = [each for each in book.ready() if each.number not in stalled]
        if not decodes and not len(book.waiting):
            return None
        loads = self._maker.empty()
        loads.add_decodes([each.scheduled for each in decodes], [each.home for each in decodes])
        placed = self._prefills(decodes, loads, now_s) if len(book.waiting) else []
        if not decodes and not placed:
            return None
        self._budget.submitted(loads.stages_s(), now_s, overrun_s=self.overrun_s)
        return self._maker.make(decodes, placed)

    def _oldest(self, draft: Draft) -> None:
        """Gives the oldest request that has pages, or waits for some, its least progress.

        For where nobody else could run: whoever ranks before it may be many, and all of them
        without a page to be had, since they are younger.
        """
        waiting = self._book.waiting
        old = waiting["number"][waiting["started"]].tolist()
        old += self._pages.waiting_for_pages()
        if old:
            row = waiting.row(min(old))
            candidate = Candidate(
                number=int(waiting["number"][row]),
                prefix=int(waiting["prefix"][row]),
                missing=int(waiting["missing_tokens"][row]),
                long=bool(waiting["long"][row]),
                share=0.0,
            )
            draft.hopeless = NOTHING_FAILED
            self._settle(draft, candidate)
            self._place(draft, candidate, least=True)

    def predicted_s(self, step: Step) -> float:
        """The formula's seconds of a step, summed over stages, without overrun or margin."""
        return self._maker.predicted_s(step)

    def _grow_decodes(self, edge: list[Sequence]) -> set[int]:
        """Gives each decode the page its next token begins, oldest first; returns who must wait."""
        book, pools = self._book, self._book.pools
        stalled: set[int] = set()
        idle = Displaceable(book, stalled)  # no prefill among them: all that are idle
        for sequence in sorted(edge, key=lambda each: each.number):
            number, prefix = sequence.number, sequence.scheduled
            if number not in book.running:
                continue  # evicted by an older one just now
            group = pools.newest_group(sequence.home, prefix)
            if pools.missing_pages(sequence, prefix + 1):  # one, since this token begins a page
                room = page_for_decode(book, sequence, group, idle)
            else:
                room = Room.YES
            if room is Room.YES:
                book.grow(sequence, prefix + 1)
            elif room is Room.LATER or sequence.in_flight:
                stalled.add(number)
            else:
                book.evict(sequence)
        return stalled

    def _prefills(
        self, decodes: list[Sequence], loads: GroupLoads, now_s: float
    ) -> list[tuple[Sequence, int]]:
        """Places chunks beside the decodes, in rank order; adds them to the loads."""
        budget_s = float("inf")
        if self._scheduling.chunk_tokens is None:
            budget_s = self._budget.seconds(self._book, decodes, now_s, overrun_s=self.overrun_s)
        members = {each.number for each in decodes}
        draft = Draft(
            loads=loads, budget_s=budget_s, members=members, pages=self._pages.step(members)
        )
        normal, demoted = self._queues(now_s)
        if len(demoted):
            self._with_share(draft, normal, demoted)
        else:
            self._place_all(draft, normal, least=True)
        if not decodes and not draft.placed:
            self._oldest(draft)
        return draft.placed

    def _with_share(self, draft: Draft, normal: Queue, demoted: Queue) -> None:
        """Best effort goes last, but first in the groups where its share is due."""
        due = self._share.due()
        before_s = draft.loads.groups_s()
        if due:
            self._place_all(draft, demoted, least=True, only=due)
        first_s = draft.loads.groups_s()
        self._place_all(draft, normal, least=not draft.placed)
        last_s = draft.loads.groups_s()
        self._place_all(draft, demoted, least=not draft.placed)
        after_s = draft.loads.groups_s()
        used_s = [
            first - before + after - last
            for before, first, last, after in zip(before_s, first_s, last_s, after_s, strict=True)
        ]
        others_s = [last - first for first, last in zip(first_s, last_s, strict=True)]
        self._share.debit(due, used_s=used_s, others_s=others_s)

    def _queues(self, now_s: float) -> tuple[Queue, Queue]:
        """Waiting requests in rank order: those that can be in time, and the demoted."""
        book = self._book
        prefills = book.prefills()
        ranked = self._scheduling.policy.rank(prefills, now_s=now_s)
        fresh = len(prefills) - int(np.count_nonzero(prefills.started))
        self._starts = self._plan.limits.sequences - (len(book.sequences) - fresh)
        return queues(
            prefills,
            book.waiting["prefix"],
            ranked,
            started_only=self._starts <= 0,
            most=1 if self._scheduling.one_prompt else MISSES,
        )

    def _place_all(
        self, draft: Draft, queue: Queue, *, least: bool, only: AbstractSet[int] | None = None
    ) -> None:
        """Places candidates in order until the budget; the first one makes its least progress.

        only  groups of candidates that are meant; None means all
        """
        waiting_longs = []
        draft.misses = 0  # one class without pages must not end the step for the other
        if least:
            draft.hopeless = NOTHING_FAILED
        for index, candidate in enumerate(queue):
            if candidate.number in draft.members:
                continue
            if not least and self._hopeless(draft, candidate, draft.budget_s):
                continue
            if not least and self._full(draft, draft.budget_s):
                break
            if not candidate.prefix and draft.pages.refuses(candidate.number, candidate.missing):
                draft.misses += 1
                continue
            group = self._settle(draft, candidate)
            if only is not None and group not in only:
                continue
            if candidate.long and group in draft.long_groups:
                waiting_longs.append(candidate)
                continue
            self._yield(draft, queue, index, candidate)
            if self._place(draft, candidate, least=least):
                least = False
        self._place_longs(draft, waiting_longs)

    def _place_longs(self, draft: Draft, longs: list[Candidate]) -> None:
        """Gives further long prefills the time that nobody else could use; most often none."""
        for candidate in longs:
            if self._full(draft, draft.budget_s):
                return
            if not self._hopeless(draft, candidate, draft.budget_s):
                self._settle(draft, candidate)
                self._place(draft, candidate, least=False)

    def _yield(self, draft: Draft, queue: Queue, index: int, candidate: Candidate) -> None:
        """Places short requests behind a long one, within the share of the time that it leaves."""
        if not candidate.long or candidate.share <= 0 or draft.budget_s == float("inf"):
            return
        yielded_s = draft.loads.seconds() + candidate.share * draft.budget_s
        limit_s = min(draft.budget_s, yielded_s)
        for other in queue.since(index + 1):
            if other.long or other.number in draft.members:
                continue
            if self._full(draft, limit_s):
                return
            if not self._hopeless(draft, other, limit_s):
                self._settle(draft, other)
                self._place(draft, other, least=False, limit_s=limit_s)

    def _full(self, draft: Draft, limit_s: float) -> bool:
        """Whether not even a least chunk of a fresh prompt fits into any group."""
        if draft.misses >= MISSES or draft.ended:
            return True
        placed, limit_then_s, fits = draft.fits
        if placed != len(draft.placed) or limit_s != limit_then_s:
            fits = self._fits_fresh(draft, limit_s)
            draft.fits = len(draft.placed), limit_s, fits
        return not fits

    def _fits_fresh(self, draft: Draft, limit_s: float) -> bool:
        least = self._config.min_chunk_tokens
        most = self._scheduling.chunk_tokens or self._config.max_step_tokens
        return any(
            draft.loads.tokens(group, 0) < most
            and draft.loads.largest_chunk(group, 0, limit_s, least, at_least=least)
            for group in range(self._plan.parallelism.kvp)
        )

    def _settle(self, draft: Draft, candidate: Candidate) -> int:
        """The group that a request would work in now; one without pages finds its home first."""
        if self._one_group:
            return 0
        sequence = self._book.sequences[candidate.number]
        if not sequence.pages:
            sequence.home = self._pages.home(draft.pages, draft.loads, sequence)
        return self._book.pools.newest_group(sequence.home, sequence.scheduled)

    def _place(
        self, draft: Draft, candidate: Candidate, *, least: bool, limit_s: float | None = None
    ) -> bool:
        """Places the largest chunk of a settled request; False where none fits."""
        if draft.ended:
            return False
        config = self._config
        sequence = self._book.sequences[candidate.number]
        limit_s = draft.budget_s if limit_s is None else limit_s
        fresh = not sequence.pages
        if fresh and (self._starts <= 0 or self._pages.refuses(draft.pages, sequence)):
            draft.misses += 1
            return False
        prefix = sequence.scheduled
        most = self._most(sequence, draft.loads.tokens(sequence.home, prefix))
        floor = min(config.min_chunk_tokens, sequence.missing, most)
        tokens = draft.loads.largest_chunk(
            sequence.home, prefix, limit_s, most, at_least=max(floor, 1)
        )
        if tokens < floor and least:
            tokens = floor
        if floor <= 0 or tokens < floor:
            draft.misses += 1
            if floor == config.min_chunk_tokens:
                limit_then_s, shortest = draft.hopeless
                draft.hopeless = (
                    limit_s,
                    min(prefix, shortest) if limit_s <= limit_then_s else prefix,
                )
            return False
        if self._book.ahead and tokens < most:
            in_group = draft.loads.tokens(sequence.home, prefix)
            # of the whole step only where the budget ends it, for all who wait
            ends = _whole_tiles(in_group, tokens) if limit_s >= draft.budget_s else tokens
            draft.ended = floor <= ends < tokens
            tokens = ends if draft.ended else max(_whole_queries(self._tile, prefix, tokens), floor)
        tokens = self._pages.take(draft.pages, sequence, tokens, floor)
        if tokens <= 0:
            draft.misses += 1
            return False
        draft.loads.add_chunk(sequence.home, tokens, prefix)
        draft.placed.append((sequence, tokens))
        draft.members.add(candidate.number)
        self._starts -= fresh
        if candidate.long:
            draft.long_groups.add(self._book.pools.newest_group(sequence.home, prefix))
        return True

    def _hopeless(self, draft: Draft, candidate: Candidate, limit_s: float) -> bool:
        """Whether a chunk behind no longer a prefix did not fit before, and nothing got better.

        A step only fills up and its time rises with the prefix; with several groups a longer
        prefix may lie in an emptier group, so there nothing is concluded.
        """
        limit_then_s, prefix = draft.hopeless
        return (
            candidate.prefix >= prefix
            and limit_s <= limit_then_s
            and candidate.missing >= self._config.min_chunk_tokens
            and self._one_group
        )

    def _most(self, sequence: Sequence, in_group: int) -> int:
        """Largest chunk that the request, the schedule, its shard and the step's size allow.

        in_group is what the busiest of its groups already has in the step.
        """
        prefix = sequence.scheduled
        shard = self._plan.kv.tokens_per_kvp_shard
        static = self._scheduling.chunk_tokens
        cap = self._scheduling.request_tokens
        if cap is None or len(self._book.sequences) == 1:  # vLLM: a lone request is not capped
            cap = sequence.missing
        return min(
            sequence.missing,
            cap,
            chunk_at(self._plan.prefill.chunks, prefix) if static is None else static - in_group,
            shard - prefix % shard,
            self._config.max_step_tokens - in_group,
        )


def _whole_tiles(in_group: int, tokens: int) -> int:
    """The chunk without the few tokens that would begin another tile behind in_group others."""
    over = (in_group + tokens) % TILE_TOKENS
    few = min(tokens * TILE_SHARE, TILE_TOKENS / 2)
    return tokens - over if in_group + tokens > TILE_TOKENS and over <= few else tokens


def _whole_queries(tile: int, prefix: int, tokens: int) -> int:
    """The chunk without what begins another tile of queries, unless that is most of it.

    70 tokens of 4 heads each behind 200,000 others lie in three or four tiles of 32 tokens: such
    steps took 28 ms where the formula, whose chunks fill their tiles, has 22 (the same file).
    """
    over = (prefix + tokens) % tile
    return tokens - over if 2 * over <= tokens else tokens

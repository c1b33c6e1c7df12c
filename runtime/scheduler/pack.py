"""Fills one step: decodes first, then prefill chunks in the policy's order, within the budgets.

Shared by all policies, so that none can break a budget. Invariants:

- every decode that can run is in the step, one token each; prefills never displace it
- predicted seconds stay within the budget, but for the minimum progress of the first prefill
- tokens of a group stay within max_step_tokens; a chunk stays within the plan's schedule and shard
- at most one long prefill a group while others wait; it leaves its yield to waiting short ones
- what does not fit is passed over, and time that nobody claimed goes to whom it would have fed
"""

from dataclasses import dataclass, field

import numpy as np

from plans.chunks import chunk_at
from runtime.book import Book
from runtime.executor.base import Step
from runtime.request import Sequence
from runtime.scheduler import Scheduling
from runtime.scheduler.commit import StepMaker
from runtime.scheduler.loads import GroupLoads
from runtime.scheduler.memory import KeptPages, Room, make_room
from runtime.scheduler.order import Candidate, Queue

MISSES = 256
"""Candidates passed over in one step before the scan ends; bounds the time of a decision."""
NOTHING_FAILED = (-1.0, 0)
"""Limit and prefix of a chunk that did not fit, when all did so far."""
WORTH = 0.02
"""Share of the budget below which leftover time is not worth a second look."""


@dataclass(slots=True)
class Placed:
    """A chunk that is in the step under construction."""

    sequence: Sequence
    prefix: int
    tokens: int
    cut: bool
    """Only the time limit kept it from being longer."""


@dataclass(slots=True)
class Draft:
    """A step under construction."""

    base: GroupLoads
    """The decodes alone."""
    loads: GroupLoads
    budget_s: float
    placed: list[Placed] = field(default_factory=list)
    members: set[int] = field(default_factory=set)
    long_groups: set[int] = field(default_factory=set)
    misses: int = 0
    hopeless: tuple[float, int] = NOTHING_FAILED
    """(limit, prefix): within that limit no least chunk behind that prefix, or more, fits."""
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
        self._kept = KeptPages(book)
        self._starts = 0
        """Fresh prompts that may still start in the step under construction."""
        self.overrun_s = 0.0
        """Seconds that a step takes beyond the formula, learnt by the engine."""

    def pack(self, now_s: float) -> Step | None:
        """The next step, with pages taken and cursors moved; None where nothing can run now."""
        book = self._book
        stalled = self._grow_decodes()
        running = book.running
        rows = np.flatnonzero(~running["in_flight"])
        if not len(rows) and not len(book.waiting):
            return None
        if stalled:
            rows = rows[~np.isin(running["number"][rows], list(stalled))]
        numbers, prefix = running["number"][rows], running["prefix"][rows]
        home = running["home"][rows]
        base = self._maker.empty()
        base.add_decodes(prefix, home)
        if not len(book.waiting):
            return self._maker.make(numbers, []) if len(rows) else None
        draft = Draft(base=base, loads=base.copy(), budget_s=self._budget_s(now_s))
        draft.members.update(numbers.tolist())
        self._prefills(draft, now_s)
        if not len(rows) and not draft.placed:
            self._oldest(draft)
        if not len(rows) and not draft.placed:
            return None
        return self._maker.make(numbers, [(each.sequence, each.tokens) for each in draft.placed])

    def _oldest(self, draft: Draft) -> None:
        """Gives the oldest request that has pages, or waits for some, its least progress.

        For where nobody else could run: whoever ranks before it may be many, and all of them
        without a page to be had, since they are younger.
        """
        waiting = self._book.waiting
        old = waiting["number"][waiting["started"]].tolist()
        old += [number for number in self._kept.numbers() if number in waiting]
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
            self._place(draft, candidate, draft.budget_s, least=True)

    def predicted_s(self, step: Step) -> float:
        """The formula's seconds of a step, summed over stages, without overrun or margin."""
        return self._maker.predicted_s(step)

    def _grow_decodes(self) -> set[int]:
        """Gives each decode the page its next token needs, oldest first; returns who must wait."""
        book, pools = self._book, self._book.pools
        running = book.running
        edge = ~running["in_flight"] & (running["prefix"] % pools.page_tokens == 0)
        stalled: set[int] = set()
        if not edge.any():
            return stalled
        for number in np.sort(running["number"][edge]).tolist():
            if number not in running:
                continue  # evicted by an older one just now
            sequence = book.sequences[number]
            prefix = int(running["prefix"][running.row(number)])
            group = pools.newest_group(sequence.home, prefix)
            missing = pools.missing_pages(sequence, prefix + 1)
            room = make_room(book, sequence, group, missing, keep=set(), decodes=True)
            if room is Room.YES:
                book.grow(sequence, prefix + 1)
            elif room is Room.LATER:
                stalled.add(number)
            else:
                book.evict(sequence)
        return stalled

    def _budget_s(self, now_s: float) -> float:
        """Predicted seconds that the step may take, its decodes included."""
        config, running = self._config, self._book.running
        if self._scheduling.chunk_tokens is not None:
            return float("inf")
        if not len(running):
            budget_s = config.idle_budget_s
        else:
            limit = np.where(running["own_tbt"], config.idle_budget_s, config.step_budget_s).min()
            slack = (running["last_token_s"] + running["tbt_s"]).min() - now_s
            # a token that is late already does not stop all prefill
            budget_s = min(float(limit), max(float(slack), 0.5 * config.step_budget_s))
        # a host that takes more than half of the budget is not made faster by smaller chunks
        budget_s = max(budget_s - max(self.overrun_s, 0.0), 0.5 * budget_s)
        return budget_s / (1.0 + self._plan.step_time.margin)

    def _prefills(self, draft: Draft, now_s: float) -> None:
        """Places chunks in rank order."""
        normal, demoted = self._queues(now_s)
        decode_s = draft.loads.seconds()
        spare_s = max(draft.budget_s - decode_s, 0.0)
        share = self._config.best_effort_share
        limit_s = draft.budget_s
        if len(normal) and len(demoted) and spare_s < float("inf"):
            limit_s -= share * spare_s
        self._place_all(draft, normal, limit_s, least=True)
        turn = self._book.steps % round(1 / share) == 0  # progress of the demoted without any spare
        self._place_all(draft, demoted, draft.budget_s, least=not draft.placed or turn)
        if limit_s < draft.budget_s:
            self._enlarge(draft)
            self._place_all(draft, normal, draft.budget_s, least=False)

    def _queues(self, now_s: float) -> tuple[Queue, Queue]:
        """Waiting requests in rank order: those that can be in time, and the demoted."""
        book = self._book
        prefills = book.prefills()
        ranked = self._scheduling.policy.rank(prefills, now_s=now_s)
        resident = len(book.sequences) - int((~prefills.started).sum())
        self._starts = self._plan.limits.sequences - resident
        only = prefills.started if self._starts <= 0 else None
        most = 1 if self._scheduling.one_prompt else MISSES
        queues = []
        for chosen in (~ranked.demoted, ranked.demoted):
            rows = np.flatnonzero(chosen if only is None else chosen & only)
            queues.append(
                Queue(
                    keys=ranked.keys[rows],
                    numbers=prefills.number[rows],
                    prefix=book.waiting["prefix"][rows],
                    missing=prefills.missing_tokens[rows],
                    long=prefills.long[rows],
                    yields=ranked.yields[rows],
                    most=most,
                )
            )
        return queues[0], queues[1]

    def _place_all(self, draft: Draft, queue: Queue, limit_s: float, *, least: bool) -> None:
        """Places candidates in order until the limit; the first one makes its least progress."""
        waiting_longs = []
        if least:
            draft.hopeless = NOTHING_FAILED
        for index, candidate in enumerate(queue):
            if candidate.number in draft.members:
                continue
            if candidate.long and self._beside_a_long(draft, candidate):
                waiting_longs.append(candidate)
                continue
            if not least and self._hopeless(draft, candidate, limit_s):
                continue
            if not least and self._full(draft, limit_s):
                return
            self._yield(draft, queue, index, candidate, limit_s)
            if self._place(draft, candidate, limit_s, least=least):
                least = False
        if waiting_longs:
            self._place_longs(draft, waiting_longs, limit_s)

    def _place_longs(self, draft: Draft, longs: list[Candidate], limit_s: float) -> None:
        """Gives further long prefills the time that nobody else could use; most often none."""
        shortest = min(longs, key=lambda each: each.prefix)
        sequence, least = self._book.sequences[shortest.number], self._config.min_chunk_tokens
        room = draft.loads.largest_chunk(
            sequence.home, shortest.prefix, limit_s, least, at_least=least
        )
        if not room and shortest.missing >= least:
            draft.hopeless = limit_s, shortest.prefix
        for candidate in longs:
            if self._full(draft, limit_s):
                return
            if not self._hopeless(draft, candidate, limit_s):
                self._place(draft, candidate, limit_s, least=False)

    def _yield(
        self, draft: Draft, queue: Queue, index: int, candidate: Candidate, limit_s: float
    ) -> None:
        """Places short requests behind a long one, within the share of the time that it leaves."""
        if not candidate.long or candidate.share <= 0 or draft.budget_s == float("inf"):
            return
        yielded_s = draft.loads.seconds() + candidate.share * draft.budget_s
        limit_s = min(limit_s, yielded_s)
        for other in queue.since(index + 1):
            if other.long or other.number in draft.members:
                continue
            if self._full(draft, limit_s):
                return
            if not self._hopeless(draft, other, limit_s):
                self._place(draft, other, limit_s, least=False)

    def _full(self, draft: Draft, limit_s: float) -> bool:
        """Whether not even a least chunk of a fresh prompt fits into any group."""
        if draft.misses >= MISSES:
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

    def _beside_a_long(self, draft: Draft, candidate: Candidate) -> bool:
        """Whether a group that the request works in has a long prefill in the step already."""
        if not draft.long_groups:
            return False
        return self._one_group or bool(self._long_groups(candidate.number) & draft.long_groups)

    def _long_groups(self, number: int) -> set[int]:
        sequence = self._book.sequences[number]
        return {self._book.pools.newest_group(sequence.home, sequence.scheduled)}

    def _place(self, draft: Draft, candidate: Candidate, limit_s: float, *, least: bool) -> bool:
        """Places the largest chunk of one request; False where none fits."""
        book, config = self._book, self._config
        sequence = book.sequences[candidate.number]
        fresh = sequence.scheduled == 0
        if fresh and self._starts <= 0:
            draft.misses += 1
            return False
        if fresh and not sequence.pages:
            sequence.home = self._home(draft, sequence)
        prefix = sequence.scheduled
        most = self._most(sequence, draft.loads.tokens(sequence.home, prefix))
        floor = min(config.min_chunk_tokens, sequence.missing, most)
        tokens = draft.loads.largest_chunk(
            sequence.home, prefix, limit_s, most, at_least=max(floor, 1)
        )
        cut = tokens < most
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
        tokens = self._with_pages(draft, sequence, tokens, floor)
        if tokens <= 0:
            draft.misses += 1
            return False
        draft.loads.add_chunk(sequence.home, tokens, prefix)
        draft.placed.append(Placed(sequence=sequence, prefix=prefix, tokens=tokens, cut=cut))
        draft.members.add(candidate.number)
        self._starts -= fresh
        if candidate.long:
            draft.long_groups |= self._long_groups(candidate.number)
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

    def _with_pages(self, draft: Draft, sequence: Sequence, tokens: int, floor: int) -> int:
        """Takes pages for up to `tokens`, at least `floor`; returns how many tokens have pages."""
        book, pools = self._book, self._book.pools
        prefix = sequence.scheduled
        group = pools.newest_group(sequence.home, prefix)
        running = len(book.running)
        free = pools.free_pages(group)
        first = self._kept.group_of(sequence) == group
        if not first:
            free -= min(running, 1 + pools.pages // 50)  # decodes grow soon
        if not sequence.pages:
            kept = self._kept.before(group, sequence)
            free -= kept
            chunk = pools.missing_pages(sequence, prefix + tokens)
            start = chunk if first else self._start_pages(sequence)
            if free < start and (kept or running + len(draft.placed)):
                self._kept.keep(group, sequence, chunk)
                return 0
        room = pools.room_tokens(sequence, prefix, max(free, 0))
        if room < floor:
            needed = pools.missing_pages(sequence, prefix + floor)
            keep = draft.members
            if make_room(book, sequence, group, needed, keep=keep, decodes=False) is not Room.YES:
                self._kept.keep(group, sequence, needed)
                return 0
            room = floor
        if first:
            self._kept.release(group)
        tokens = min(tokens, room)
        book.grow(sequence, prefix + tokens)
        return tokens

    def _start_pages(self, sequence: Sequence) -> int:
        """Free pages without which a prompt does not start: all of a short one, some of a long one.

        A request that was evicted before waits for all it had, so that it is not evicted again.
        """
        pools = self._book.pools
        enough = sequence.length if sequence.evictions else self._config.long_tokens
        tokens = min(sequence.length, enough, pools.shard_tokens)
        return min(-(-tokens // pools.page_tokens), pools.pages)

    def _home(self, draft: Draft, sequence: Sequence) -> int:
        """Group with the least predicted pending seconds, by live state."""
        groups = self._plan.parallelism.kvp
        if groups == 1:
            return 0
        kept = self._kept.group_of(sequence)
        if kept is not None:
            return kept
        waiting = self._book.waiting
        started = waiting["started"]
        pending = np.bincount(
            waiting["newest"][started], weights=waiting["remaining_s"][started], minlength=groups
        )
        return min(
            range(groups),
            key=lambda group: (pending[group] + draft.loads.group_seconds(group), group),
        )

    def _enlarge(self, draft: Draft) -> None:
        """Gives time that the best-effort class left over to the first chunk that was cut."""
        if draft.budget_s - draft.loads.seconds() < WORTH * draft.budget_s:
            return
        for placed in draft.placed:
            if not placed.cut:
                continue
            loads = draft.base.copy()
            for other in draft.placed:
                if other is not placed:
                    loads.add_chunk(other.sequence.home, other.tokens, other.prefix)
            home, prefix = placed.sequence.home, placed.prefix
            in_group = draft.loads.tokens(home, prefix) - placed.tokens
            most = self._most(placed.sequence, in_group)
            tokens = loads.largest_chunk(home, prefix, draft.budget_s, most)
            if tokens > placed.tokens:
                tokens = self._with_pages(draft, placed.sequence, tokens, placed.tokens)
                placed.tokens = max(placed.tokens, tokens)
            loads.add_chunk(home, placed.tokens, prefix)
            draft.loads = loads
            return

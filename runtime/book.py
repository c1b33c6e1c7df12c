"""Who is where: every request that has arrived and not ended, its cursors, pages and columns.

    arrive -> waiting (prefill to do) -> finishing (last chunk in flight) -> running -> end
                 ^______________________________ evict _________________________|

With an executor that feeds tokens back, a finishing request is among the running ones already.

The engine and the packer share one Book; nothing else changes it.
"""

import numpy as np

from plans.chunks import WorkTable
from plans.plan import Plan
from runtime.columns import Columns
from runtime.executor.base import NewPages
from runtime.kvcache import PagePools
from runtime.request import Request, Sequence
from runtime.running import Running
from runtime.scheduler.policy import Prefills

WAITING = {
    "number": np.int64,
    "arrival_s": np.float64,
    "deadline_s": np.float64,
    "work_s": np.float64,
    "remaining_s": np.float64,
    "prompt_tokens": np.int64,
    "prefix": np.int64,
    "missing_tokens": np.int64,
    "home": np.int64,
    "newest": np.int64,
    "served_before": np.int64,
    "started": np.bool_,
    "recent": np.bool_,
    "long": np.bool_,
}
FOREVER_S = 1e9
"""Deadline of a request that has all the time in the world: policies need finite keys."""


class Book:
    """State of all live requests; of waiting ones as columns too, since policies rank thousands."""

    def __init__(self, plan: Plan, *, ahead: bool = False) -> None:
        """Empty, with the plan's page pools and work table.

        ahead  a request may decode while its last token is still in flight: the executor feeds
               tokens back by itself
        """
        self.plan = plan
        self.ahead = ahead
        self.sequences: dict[int, Sequence] = {}
        self.waiting = Columns(WAITING)
        self.running = Running()
        self.pools = PagePools(
            groups=plan.parallelism.kvp,
            pages=plan.kv.pages_per_rank,
            page_tokens=plan.kv.page_tokens,
            shard_tokens=plan.kv.tokens_per_kvp_shard,
        )
        self.work = WorkTable(plan.prefill.chunks, plan.step_time, plan.kv.tokens_per_kvp_shard)
        self.work.solo_s(plan.limits.context_tokens)  # made whole before anybody waits for it
        self.steps = 0
        """Steps submitted."""
        self.served_tokens = 0
        """Prefill tokens submitted."""
        self.holders: dict[int, Sequence] = {}
        """Requests that hold pages."""
        self.new_pages: list[NewPages] = []
        self.evicted: list[int] = []
        self.ended: list[int] = []

    def arrive(self, request: Request) -> Sequence:
        """Fixes deadline and work of a request and lets it wait."""
        targets = self.plan.targets
        named = targets.classes.get(request.class_name or "")
        work_s = self.work.solo_s(request.prompt_tokens)
        deadline_s = request.ttft_target_s
        if deadline_s is None and named is not None:
            deadline_s = named.ttft_s
        if deadline_s is None:
            deadline_s = max(targets.ttft.multiplier * work_s, targets.ttft.floor_s)
        tbt_s = request.tbt_target_s
        if tbt_s is None and named is not None:
            tbt_s = named.tbt_s
        sequence = Sequence(
            request=request,
            deadline_s=min(deadline_s, FOREVER_S),
            work_s=work_s,
            tbt_s=targets.tbt_s if tbt_s is None else tbt_s,
            long=request.prompt_tokens >= self.plan.scheduler.long_tokens,
            served_before=self.served_tokens,
        )
        self.sequences[request.number] = sequence
        self._wait(sequence)
        return sequence

    def _wait(self, sequence: Sequence) -> None:
        request = sequence.request
        if sequence.generated:
            sequence.whole_s = self.work.solo_s(sequence.length)
        self.waiting.add(
            {
                "number": request.number,
                "arrival_s": request.arrival_s,
                "deadline_s": sequence.deadline_s,
                "work_s": sequence.work_s,
                "remaining_s": sequence.whole_s,
                "prompt_tokens": request.prompt_tokens,
                "prefix": sequence.scheduled,
                "missing_tokens": sequence.missing,
                "home": 0,
                "newest": 0,
                "served_before": sequence.served_before,
                "started": False,
                "recent": False,
                "long": sequence.long,
            }
        )

    def prefills(self) -> Prefills:
        """What a policy may see of the waiting requests."""
        waiting = self.waiting.views
        return Prefills(
            number=waiting["number"],
            arrival_s=waiting["arrival_s"],
            deadline_s=waiting["deadline_s"],
            work_s=waiting["work_s"],
            remaining_s=waiting["remaining_s"],
            prompt_tokens=waiting["prompt_tokens"],
            missing_tokens=waiting["missing_tokens"],
            started=waiting["started"],
            recent=waiting["recent"],
            long=waiting["long"],
            served_tokens=self.served_tokens - waiting["served_before"],
            step=self.steps,
        )

    def grow(self, sequence: Sequence, end: int) -> None:
        """Takes the pages that hold tokens up to `end` and announces them to the executor."""
        pages = self.pools.grow(sequence, end)
        if pages:
            self.holders[sequence.number] = sequence
            shard = (end - 1) // self.pools.shard_tokens
            self.new_pages.append(NewPages(request=sequence.number, shard=shard, pages=pages))

    def submit_chunk(self, sequence: Sequence, tokens: int) -> bool:
        """Moves the cursor over a chunk whose pages it has; True where that ends the prefill."""
        scheduled = sequence.scheduled + tokens
        sequence.scheduled = scheduled
        sequence.in_flight += 1
        self.served_tokens += tokens
        missing = sequence.length - scheduled
        if missing == 0:
            self.waiting.remove(sequence.number)
            if self.ahead:  # its first token is on the way, and may be decoded from as any other
                self.running.add(sequence)
            return True
        self.waiting.update(
            sequence.number,
            prefix=scheduled,
            missing_tokens=missing,
            remaining_s=max(sequence.whole_s - self.work.solo_s(scheduled), 0.0),
            home=sequence.home,
            newest=self.pools.newest_group(sequence.home, scheduled),
            started=True,
            recent=True,
        )
        return False

    def decode(self, sequence: Sequence, now_s: float) -> None:
        """The prefill has ended and sampled: from now on one token a step."""
        sequence.last_token_s = now_s
        if sequence.number not in self.running:
            self.running.add(sequence)

    def ready(self) -> list[Sequence]:
        """Running requests that may decode one more token now, row by row."""
        if not self.ahead:
            return [each for each in self.running.rows if not each.in_flight]
        return [
            each
            for each in self.running.rows
            if each.in_flight <= 1 and each.generated + each.in_flight < each.request.max_tokens
        ]

    def evict(self, sequence: Sequence) -> None:
        """Takes all pages of a request that has nothing in flight; it will be recomputed."""
        assert sequence.in_flight == 0, f"request {sequence.number} is in flight"
        self.pools.release(sequence)
        self.holders.pop(sequence.number, None)
        sequence.prefix_lost += sequence.computed
        sequence.evictions += 1
        sequence.scheduled = sequence.computed = 0
        if sequence.number in self.running:
            self.running.remove(sequence.number)
        else:
            self.waiting.remove(sequence.number)
        self._wait(sequence)
        self.new_pages = [each for each in self.new_pages if each.request != sequence.number]
        self.evicted.append(sequence.number)

    def end(self, sequence: Sequence) -> None:
        """Forgets a request in whatever state, and frees its pages.

        Work of it may be in flight: later steps that get its pages run after that on every stage.
        """
        number = sequence.number
        for table in (self.waiting, self.running):
            if number in table:
                table.remove(number)
        self.pools.release(sequence)
        self.holders.pop(number, None)
        del self.sequences[number]
        self.new_pages = [each for each in self.new_pages if each.request != number]
        self.ended.append(number)

    def check_integrity(self) -> None:
        """Raises AssertionError where columns, sequences and pools disagree."""
        for sequence in self.sequences.values():
            places = (sequence.number in self.waiting) + (sequence.number in self.running)
            finishing = sequence.missing == 0 and sequence.in_flight > 0 and places == 0
            assert places == 1 or finishing, f"request {sequence.number} is in {places} places"
            assert 0 <= sequence.computed <= sequence.scheduled <= sequence.length
        assert len(self.waiting) + len(self.running) <= len(self.sequences)
        holders = {number for number, each in self.sequences.items() if any(each.pages)}
        assert holders == self.holders.keys(), "holders and page tables disagree"
        self.pools.check_integrity(self.sequences.values())

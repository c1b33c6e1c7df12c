"""Rules of the packer, one by one, on steps whose seconds are the tokens in them.

`python bench/scheduler_mutations.py` removes each of these rules and shows that a test here fails.
"""

from collections.abc import Iterable

import pytest
from strategies_runtime import QUANTUM_S, linear_plan

from plans.plan import Plan
from runtime.book import Book
from runtime.executor.base import Step
from runtime.request import Request, Sequence
from runtime.scheduler import load_policy
from runtime.scheduler.pack import Packer

NOW_S = 16.0


class World:
    """A book and the packer on it, filled by hand."""

    def __init__(self, plan: Plan, policy: str = "fcfs") -> None:
        self.plan = plan
        self.book = Book(plan)
        self.packer = Packer(self.book, load_policy(policy, plan.scheduler))

    def arrive(
        self, prompts: Iterable[int], *, ttft_s: float | None = None, tbt_s: float | None = None
    ) -> list[Sequence]:
        first = len(self.book.sequences)
        asked = [
            Request(
                number=number,
                arrival_s=0.0,
                prompt_tokens=tokens,
                max_tokens=9,
                ttft_target_s=ttft_s,
                tbt_target_s=tbt_s,
            )
            for number, tokens in enumerate(prompts, first)
        ]
        return [self.book.arrive(request) for request in asked]

    def start(self, tokens: int, *, done: int, home: int = 0) -> Sequence:
        """A prompt of which `done` tokens are computed."""
        (sequence,) = self.arrive([tokens])
        sequence.home = home
        self.book.grow(sequence, done)
        self.book.submit_chunk(sequence, done)
        sequence.in_flight, sequence.computed = 0, done
        return sequence

    def decoding(self, *, last_token_s: float, tbt_s: float | None) -> Sequence:
        """A request of one prompt token that has its first token."""
        (sequence,) = self.arrive([1], tbt_s=tbt_s)
        self.book.grow(sequence, 1)
        self.book.submit_chunk(sequence, 1)
        sequence.in_flight, sequence.computed, sequence.generated = 0, 1, 1
        self.book.decode(sequence, last_token_s)
        return sequence

    def take(self, group: int, leave: int) -> None:
        """Fills a group but for `leave` pages, by a request that has all it wants."""
        pools = self.book.pools
        tokens = (pools.free_pages(group) - leave) * pools.page_tokens
        while tokens > 0:
            some = min(tokens, pools.shard_tokens)
            self.start(some + 1, done=some, home=group)
            tokens -= some

    def take_by_decodes(self, leave: int, *, reserved: bool = False) -> None:
        """The same by requests that decode and have their token in flight: they need no page.

        reserved  leave also those that no prompt may start on, one for each of them
        """
        pools, asked = self.book.pools, leave
        if reserved:
            leave += -(-(pools.free_pages(0) - leave) // (pools.shard_tokens // pools.page_tokens))
        while pools.free_pages(0) > leave:
            some = min((pools.free_pages(0) - leave) * pools.page_tokens, pools.shard_tokens)
            sequence = self.start(some, done=some)
            sequence.generated = 1
            self.book.decode(sequence, NOW_S)
        for sequence in self.book.running:
            sequence.in_flight = 1
        assert not reserved or pools.free_pages(0) - len(self.book.running) == asked

    def fill_by_decodes(self, group: int) -> Sequence:
        """Takes all pages of a group, by requests whose token is in flight; the first of them."""
        pools, first = self.book.pools, len(self.book.sequences)
        while pools.free_pages(group):
            some = min(pools.free_pages(group) * pools.page_tokens, pools.shard_tokens)
            sequence = self.start(some, done=some, home=group)
            sequence.generated, sequence.in_flight = 1, 1
            self.book.decode(sequence, NOW_S)
        return self.book.sequences[first]

    def pack(self, now_s: float = NOW_S) -> Step:
        step = self.packer.pack(now_s)
        assert step is not None
        return step


def tokens_of(step: Step) -> dict[int, int]:
    return {chunk.request: chunk.tokens for chunk in step.chunks}


# --- the time between tokens --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waited", "tbt", "tokens"),
    [
        (0, None, 51),  # the plan's target, 0.05 s
        (0, 100, 100),  # its own target is longer, and than the step budget
        (0, 50, 50),
        (10, 50, 40),  # since its last token
        (10, 30, 32),  # no less than half of the step budget
        (900, 50, 32),  # late already: prefill goes on
        (0, 900, 128),  # no more than the idle budget
    ],
)
def test_the_tightest_time_between_tokens_bounds_the_step(
    waited: int, tbt: int | None, tokens: int
) -> None:
    world = World(linear_plan())
    last_token_s = NOW_S - waited * QUANTUM_S
    world.decoding(last_token_s=last_token_s, tbt_s=None if tbt is None else tbt * QUANTUM_S)
    (prefill,) = world.arrive([900])
    assert world.pack().tokens == tokens
    assert prefill.scheduled == tokens - 1, "all but the decode's"


def test_a_step_beside_a_decode_in_flight_may_last_from_one_of_its_tokens_to_the_next() -> None:
    """Its next token comes with the step ahead, whatever this one takes; but the one after that
    stands behind this one. So it is its whole target, 40, and not the 20 that are left of it."""
    world = World(linear_plan(spp=2))
    world.decoding(last_token_s=NOW_S, tbt_s=40 * QUANTUM_S)
    assert world.pack().tokens == 1
    world.arrive([900])
    assert world.pack(NOW_S + 20 * QUANTUM_S).tokens == 40


def test_the_last_token_in_flight_bounds_no_step() -> None:
    world = World(linear_plan(spp=2))
    decode = world.decoding(last_token_s=NOW_S, tbt_s=40 * QUANTUM_S)
    decode.generated = decode.request.max_tokens - 1
    world.pack()
    world.arrive([900])
    assert world.pack(NOW_S + 20 * QUANTUM_S).tokens == 128


def test_the_step_ahead_takes_from_the_time_of_the_one_behind() -> None:
    """Two stages, each half of a step's time. 128 tokens enter at 0 and leave the last stage at 128
    quanta. A step that enters at 64 is in the last stage from 128 on at the earliest, for half of
    its time: of the 100 quanta that its decode may wait, 36 are left there.
    """
    world = World(linear_plan(spp=2))
    world.arrive([128])
    assert world.pack(NOW_S).tokens == 128
    half_s = 64 * QUANTUM_S
    world.decoding(last_token_s=NOW_S + half_s, tbt_s=100 * QUANTUM_S)
    world.arrive([900])
    assert world.pack(NOW_S + half_s).tokens == 72


# --- long prompts -------------------------------------------------------------------------------


def test_one_long_prompt_a_step_while_short_ones_wait() -> None:
    """The schedule gives the first long at most 40 tokens: the short one has the rest of the 128,
    and the second long what that leaves."""
    world = World(linear_plan())
    first = world.start(1000, done=1000 - 40)
    second, short = world.arrive([900, 70])
    step = world.pack()
    assert list(tokens_of(step).items()) == [
        (first.number, 40),
        (short.number, 70),
        (second.number, 18),
    ]


def test_each_group_has_its_long_prompt() -> None:
    """Fresh ones find their home first: the third goes where no long one is, whatever its number
    says, and only the fourth is set aside for the short one."""
    world = World(linear_plan(kvp=3))
    started = [world.start(300, done=260, home=home) for home in (0, 1)]
    third, fourth, short = world.arrive([400, 500, 30])
    step = world.pack()
    homes = {chunk.request: chunk.home for chunk in step.chunks}
    assert [homes[each.number] for each in (*started, third)] == [0, 1, 2]
    order = list(tokens_of(step))
    assert order[:3] == [each.number for each in (*started, third)]
    assert order.index(short.number) < order.index(fourth.number)


def test_a_long_prompt_with_slack_leaves_a_part_of_the_step_to_short_ones() -> None:
    """By its target it has rho 0.25, so that much of the 128 tokens is for the short one behind."""
    world = World(linear_plan(), "lars")
    work_s = world.book.work.solo_s(1000)
    target_s = NOW_S + 1.25 * work_s
    (long,) = world.arrive([1000], ttft_s=target_s)
    (short,) = world.arrive([200], ttft_s=NOW_S + 1e3)
    assert tokens_of(world.pack()) == {short.number: 32, long.number: 96}


# --- homes and pages ----------------------------------------------------------------------------


def test_the_home_is_the_group_with_the_least_pending_seconds() -> None:
    world = World(linear_plan(kvp=3))
    for home, left in ((0, 50), (1, 30), (2, 40)):
        world.start(300, done=300 - left, home=home)
    (fresh,) = world.arrive([20])
    world.pack()
    assert fresh.home == 1


def test_what_the_step_already_holds_is_pending_too() -> None:
    world = World(linear_plan(kvp=2))
    first, second = world.arrive([60, 60])
    world.pack()
    assert {first.home, second.home} == {0, 1}


def test_a_home_without_room_is_none() -> None:
    """The first group is empty of work but has no page; the second has both work and pages."""
    world = World(linear_plan(kvp=2))
    world.take(0, leave=2)
    for each in world.book.holders.values():
        world.book.waiting["remaining_s"][world.book.waiting.row(each.number)] = 0.0
    world.start(300, done=200, home=1)
    (fresh,) = world.arrive([100])
    step = world.pack()
    assert fresh.home == 1
    assert tokens_of(step)[fresh.number] > 0


def test_nobody_loses_pages_where_that_would_not_be_enough() -> None:
    """The oldest wants 8 pages for its least chunk; all its juniors together hold fewer."""
    world = World(linear_plan(min_chunk_tokens=128, sequences=3))
    oldest = world.start(400, done=128)
    filler = world.start(300, done=48)
    world.take_by_decodes(0)
    world.packer.pack(NOW_S)
    assert filler.evictions == 0
    assert oldest.evictions == 0


def test_the_cheapest_juniors_lose_their_pages_until_it_is_enough() -> None:
    world = World(linear_plan())
    oldest = world.start(600, done=128)
    dear, cheap, cheapest = (world.start(900, done=done) for done in (320, 64, 32))
    world.take_by_decodes(0)
    world.pack()
    assert oldest.scheduled > 128
    assert [each.evictions for each in (dear, cheap, cheapest)] == [0, 0, 1]


def test_nobody_loses_pages_while_in_flight() -> None:
    world = World(linear_plan())
    world.start(600, done=128)
    flying, idle = world.start(900, done=32), world.start(900, done=320)
    flying.in_flight = 1
    world.take_by_decodes(0)
    world.pack()
    assert (flying.evictions, idle.evictions) == (0, 1)


def test_nobody_loses_pages_once_in_the_step() -> None:
    """By work the junior goes first, on the room of its last page; then the senior has none."""
    world = World(linear_plan(), "srpt")
    senior, junior = world.start(600, done=128), world.start(40, done=33)
    world.take_by_decodes(0)
    assert tokens_of(world.pack()).keys() == {junior.number}
    assert (senior.evictions, junior.evictions) == (0, 0)


def test_a_prompt_refused_for_want_of_pages_does_not_stop_shorter_ones() -> None:
    """Of the free pages 4 are kept for the oldest, which would start on 16. That leaves 8: too few
    for 10 and 11 pages, enough for 3 and then for 1."""
    world = World(linear_plan())
    world.take_by_decodes(12, reserved=True)
    oldest, longer, longest, shorter, least = world.arrive([900, 160, 170, 40, 16])
    step = world.pack()
    assert tokens_of(step).keys() == {shorter.number, least.number}
    assert not any(each.pages for each in (oldest, longer, longest))


def test_whoever_has_pages_kept_in_one_group_is_not_refused_for_those_kept_in_another() -> None:
    """A prompt waits for 7 pages of the second group, of which 4 are kept for it, while a started
    one waits for a page of the first. Then 22 come free in the second, 14 of them for decodes. A
    younger prompt of 5 pages ranks first and is refused; it takes the first group for its home."""
    world = World(linear_plan(kvp=2), "srpt")
    world.start(150, done=112, home=0)
    world.fill_by_decodes(0)
    filler = world.fill_by_decodes(1)
    (waiting,) = world.arrive([100])
    world.packer.pack(NOW_S)
    assert (waiting.home, waiting.pages) == (1, [])
    younger, long = world.arrive([70, 1000])
    world.book.end(filler)
    long.home = 1
    world.book.grow(long, 160)
    world.book.submit_chunk(long, 160)
    long.in_flight, long.computed = 0, 160
    assert world.book.pools.free_pages(1) == 22
    assert tokens_of(world.pack()).keys() == {waiting.number}
    assert (younger.home, younger.pages) == (0, [])


def test_best_effort_that_finds_no_pages_does_not_end_the_step_for_others() -> None:
    """It is due in the second step, and every one of 300 is passed over; then the others go on."""
    world = World(linear_plan(step_budget_s=32 * QUANTUM_S), "lars")
    world.take_by_decodes(12, reserved=True)
    world.arrive([900] * 300, ttft_s=1e-9)
    easy = world.arrive([16] * 5, ttft_s=1e6)
    for _ in range(2):
        assert len(world.pack().chunks) == 2
    assert [each.scheduled for each in easy] == [16, 16, 16, 16, 0]

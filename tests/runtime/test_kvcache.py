"""Page pools and columns: nothing leaked, nothing held twice, rows found by number."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runtime.columns import Columns
from runtime.kvcache import PagePools
from runtime.request import Request, Sequence
from runtime.running import Running
from runtime.scheduler.order import Candidate, in_order, queues
from runtime.scheduler.policy import Prefills, Ranked


def sequence(number: int, home: int = 0) -> Sequence:
    request = Request(number=number, arrival_s=0.0, prompt_tokens=100, max_tokens=1)
    return Sequence(request=request, deadline_s=1.0, work_s=1.0, tbt_s=1.0, home=home)


class PoolMachine(RuleBasedStateMachine):
    """Random growth and release against a plain count of pages."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = PagePools(groups=3, pages=10, page_tokens=4, shard_tokens=16)
        self.held: dict[int, Sequence] = {}
        self.tokens: dict[int, int] = {}

    @rule(home=st.integers(0, 2))
    def start(self, home: int) -> None:
        number = len(self.tokens)
        self.held[number] = sequence(number, home)
        self.tokens[number] = 0

    @rule(data=st.data(), tokens=st.integers(1, 20))
    def grow(self, data: st.DataObject, tokens: int) -> None:
        if not self.held:
            return
        number = data.draw(st.sampled_from(sorted(self.held)))
        each, prefix = self.held[number], self.tokens[number]
        group = self.pools.newest_group(each.home, prefix)
        room = self.pools.room_tokens(each, prefix, self.pools.free_pages(group))
        tokens = min(tokens, room, 48 - prefix)
        if tokens <= 0:
            return
        before = self.pools.free_pages(group)
        taken = self.pools.grow(each, prefix + tokens)
        assert self.pools.free_pages(group) == before - len(taken)
        self.tokens[number] = each.scheduled = prefix + tokens

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            number = data.draw(st.sampled_from(sorted(self.held)))
            self.pools.release(self.held.pop(number))

    @invariant()
    def pages_are_free_or_held_once(self) -> None:
        self.pools.check_integrity(self.held.values())
        needed = 0
        for number in self.held:
            full, rest = divmod(self.tokens[number], 16)
            needed += full * 4 + -(-rest // 4)
        free = sum(self.pools.free_pages(group) for group in range(3))
        assert free == 30 - needed


TestPools = PoolMachine.TestCase


def test_integrity_check_sees_a_leaked_a_doubled_and_a_missing_page() -> None:
    for fault in ("leak", "double", "missing"):
        pools = PagePools(groups=1, pages=4, page_tokens=4, shard_tokens=16)
        one, two = sequence(0), sequence(1)
        pools.grow(one, 8)
        pools.grow(two, 4)
        one.scheduled, two.scheduled = 8, 4
        pools.check_integrity([one, two])
        if fault == "leak":
            one.pages[0].pop()
            one.scheduled = 4
        elif fault == "double":
            two.pages[0] = [one.pages[0][0]]
        else:
            one.scheduled = 9
        with pytest.raises(AssertionError):
            pools.check_integrity([one, two])


@given(st.data())
def test_columns_find_rows_by_number_whatever_was_removed(data: st.DataObject) -> None:
    columns = Columns({"number": np.int64, "value": np.float64})
    plain: dict[int, float] = {}
    for number in range(data.draw(st.integers(1, 60))):
        columns.add({"number": number, "value": number / 2})
        plain[number] = number / 2
        if data.draw(st.booleans()):
            gone = data.draw(st.sampled_from(sorted(plain)))
            columns.remove(gone)
            del plain[gone]
        elif data.draw(st.booleans()):
            changed = data.draw(st.sampled_from(sorted(plain)))
            columns.update(changed, value=-1.0)
            plain[changed] = -1.0
    assert len(columns) == len(plain)
    assert dict(zip(columns["number"].tolist(), columns["value"].tolist(), strict=True)) == plain
    for number in range(60):
        assert (number in columns) == (number in plain)
        if number in plain:
            assert columns["value"][columns.row(number)] == plain[number]


@given(st.data())
def test_running_requests_are_found_by_number_whatever_was_removed(data: st.DataObject) -> None:
    running = Running()
    plain: dict[int, Sequence] = {}
    for number in range(data.draw(st.integers(1, 60))):
        plain[number] = sequence(number, 0)
        running.add(plain[number])
        if data.draw(st.booleans()):
            gone = data.draw(st.sampled_from(sorted(plain)))
            running.remove(gone)
            del plain[gone]
    assert len(running) == len(plain)
    assert sorted(each.number for each in running) == sorted(plain)
    for number in range(60):
        assert (number in running) == (number in plain)
    asked = data.draw(st.permutations(range(60)))
    assert running.among(asked) == [plain[number] for number in asked if number in plain]


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, -3.0, 7.25]), max_size=700),
    st.randoms(use_true_random=False),
)
def test_lazy_order_is_the_sorted_order_with_ties_by_number(keys: list[float], random) -> None:  # type: ignore[no-untyped-def]
    numbers = list(range(len(keys)))
    random.shuffle(numbers)
    found = list(in_order(np.array(keys), np.array(numbers, dtype=np.int64)))
    assert found == sorted(range(len(keys)), key=lambda index: (keys[index], numbers[index]))


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, -3.0, 7.25]), st.booleans(), st.booleans()),
        max_size=200,
    ),
    started_only=st.booleans(),
    most=st.sampled_from([1, 5, 256]),
    first=st.integers(0, 70),
    random=st.randoms(use_true_random=False),
)
def test_queues_are_the_sorted_classes_whether_few_wait_or_many(
    rows, started_only, most, first, random
) -> None:  # type: ignore[no-untyped-def]
    numbers = list(range(len(rows)))
    random.shuffle(numbers)
    number = np.array(numbers, dtype=np.int64)
    keys, started, late = (np.array([row[each] for row in rows]) for each in range(3))
    waiting = Prefills(
        number=number,
        arrival_s=keys,
        deadline_s=keys,
        work_s=keys,
        remaining_s=keys,
        prompt_tokens=number,
        missing_tokens=number + 3,
        started=started.astype(np.bool_),
        recent=started.astype(np.bool_),
        long=number % 2 == 0,
        served_tokens=number,
        step=0,
    )
    ranked = Ranked(keys=keys, yields=number / 8, demoted=late.astype(np.bool_))
    found = queues(waiting, number + 1, ranked, started_only=started_only, most=most)
    for queue, demoted in zip(found, (False, True), strict=True):
        expected = [
            Candidate(each, each + 1, each + 3, each % 2 == 0, each / 8)
            for _, each, _, is_late in sorted(zip(keys, numbers, started, late, strict=True))
            if is_late == demoted and (started[numbers.index(each)] or not started_only)
        ][:most]
        assert len(queue) == len(expected)
        assert list(queue.since(first)) == expected[first:]
        assert list(queue) == expected

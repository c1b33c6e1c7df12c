"""Every policy: its key against the formula written out for one request, and what all must hold."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import make_plan

from plans.errors import UnknownName, UsageError
from plans.plan import Scheduler
from runtime.book import Book
from runtime.request import Request
from runtime.scheduler import ENGINES, OPTIONS, POLICIES, load_policy
from runtime.scheduler.order import in_order
from runtime.scheduler.policy import Policy, Prefills, Ranked

SCHEDULER = Scheduler()
NOW_S = 1e6
"""A large clock: keys are float64 and must not lose milliseconds."""


@st.composite
def prefills(draw: st.DrawFn, *, most: int = 40) -> Prefills:
    """Waiting requests in any state that the book can show."""
    rows = draw(st.integers(0, most))
    random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    prompt = random.integers(1, 1 << random.integers(1, 20, size=rows), endpoint=True)
    missing = random.integers(1, prompt, endpoint=True)
    work_s = prompt * draw(st.sampled_from([0.0, 1e-5, 1e-3]))
    return Prefills(
        number=random.permutation(3 * rows)[:rows],
        arrival_s=NOW_S - random.exponential(draw(st.sampled_from([1e-3, 10.0, 1e4])), size=rows),
        deadline_s=np.where(random.random(rows) < 0.1, 0.0, 0.5 + 1.5 * work_s),
        work_s=work_s,
        remaining_s=work_s * missing / prompt,
        prompt_tokens=prompt,
        missing_tokens=missing,
        started=missing < prompt,
        recent=(missing < prompt) & (random.random(rows) < 0.5),
        long=prompt >= SCHEDULER.long_tokens,
        served_tokens=random.integers(0, 1 << 24, size=rows),
        step=draw(st.integers(0, 1 << 20)),
    )


def rank(spec: str, waiting: Prefills, now_s: float = NOW_S) -> Ranked:
    policy: Policy = load_policy(spec, SCHEDULER).policy
    return policy.rank(waiting, now_s=now_s)


def some(waiting: Prefills, rows: np.ndarray) -> Prefills:
    """The same requests in another order, or a part of them."""
    columns = {name: getattr(waiting, name) for name in Prefills.__struct_fields__}
    step = columns.pop("step")
    return Prefills(**{name: column[rows] for name, column in columns.items()}, step=step)


def slack(waiting: Prefills, row: int) -> float:
    due_s = float(waiting.arrival_s[row]) + float(waiting.deadline_s[row])
    return due_s - NOW_S - float(waiting.remaining_s[row])


def over(seconds: float, divisor: float) -> float:
    return seconds / max(float(divisor), 1e-6)


def earned(slack_s: float, deadline_s: float) -> float:
    """Half of the slack until one deadline late, and a two hundredth of what is beyond."""
    if slack_s >= -deadline_s:
        return 0.5 * slack_s
    return -0.5 * deadline_s + 0.005 * (slack_s + deadline_s)


SCALAR = {
    "edf": lambda w, row: w.arrival_s[row] + w.deadline_s[row],
    "fcfs": lambda w, row: w.number[row],
    "fcfs-whole": lambda w, row: w.number[row],
    "lars": lambda w, row: over(slack(w, row), w.work_s[row]) - (0.02 if w.recent[row] else 0.0),
    "lars-lanes": lambda w, row: w.remaining_s[row] + earned(slack(w, row), w.deadline_s[row]),
    "lars-paper": lambda w, row: over(slack(w, row), w.work_s[row]),
    "lrs": lambda w, row: over(slack(w, row), w.deadline_s[row]),
    "slack": slack,
    "slack-remaining": lambda w, row: over(slack(w, row), w.remaining_s[row]),
    "srpt": lambda w, row: w.remaining_s[row],
    "srpt,aging=0.25": lambda w, row: w.remaining_s[row] - 0.25 * (NOW_S - w.arrival_s[row]),
    "threshold": lambda w, row: w.number[row],
}
"""Policies whose key is a formula of one request."""


@pytest.mark.parametrize("spec", SCALAR)
@settings(max_examples=30)
@given(waiting=prefills())
def test_keys_are_the_formula(spec: str, waiting: Prefills) -> None:
    expected = [float(SCALAR[spec](waiting, row)) for row in range(len(waiting))]
    # one rounding of a clock near 1e6, 1e-10, divided by at least 1e-6 where a key divides
    assert rank(spec, waiting).keys == pytest.approx(expected, rel=1e-9, abs=1e-3)


def order(spec: str, waiting: Prefills) -> list[int]:
    """Numbers in the order of a policy."""
    keys = rank(spec, waiting).keys
    return [int(waiting.number[row]) for row in in_order(keys, waiting.number)]


@settings(max_examples=60)
@given(waiting=prefills())
def test_hrrn_serves_started_prompts_and_then_the_highest_ratio(waiting: Prefills) -> None:
    rows = range(len(waiting))
    started = sorted(int(waiting.number[row]) for row in rows if waiting.started[row])
    ratios = {
        int(waiting.number[row]): int(waiting.served_tokens[row]) / int(waiting.missing_tokens[row])
        for row in rows
        if not waiting.started[row]
    }
    fresh = sorted(ratios, key=lambda number: (-ratios[number], number))
    assert order("hrrn", waiting) == started + fresh


def test_hrrn_is_first_come_first_served_when_more_than_128_wait() -> None:
    for rows in (128, 129):
        number = np.arange(rows)
        waiting = Prefills(
            number=number,
            arrival_s=np.zeros(rows),
            deadline_s=np.ones(rows),
            work_s=np.ones(rows),
            remaining_s=np.ones(rows),
            prompt_tokens=np.full(rows, 100),
            missing_tokens=np.full(rows, 100),
            started=np.zeros(rows, dtype=np.bool_),
            recent=np.zeros(rows, dtype=np.bool_),
            long=np.zeros(rows, dtype=np.bool_),
            served_tokens=number,  # the last to arrive has the highest ratio
            step=0,
        )
        assert (order("hrrn", waiting) == number.tolist()) == (rows > 128)


@settings(max_examples=60)
@given(waiting=prefills())
def test_turns_give_the_long_prompt_every_fourth_step(waiting: Prefills) -> None:
    rows = range(len(waiting))
    shorts = [row for row in rows if waiting.missing_tokens[row] <= 8192]
    longs = [row for row in rows if waiting.missing_tokens[row] > 8192]
    shorts.sort(key=lambda row: (waiting.missing_tokens[row], waiting.number[row]))

    def place(row: int) -> tuple[float, ...]:
        chunks = math.ceil(waiting.missing_tokens[row] / 8192)
        credit = math.floor((NOW_S - waiting.arrival_s[row]) / 2)
        if waiting.started[row]:
            return (0, 0, 0, waiting.number[row])
        return (1, chunks - credit, chunks, waiting.number[row])

    longs.sort(key=place)
    expected = longs + shorts if waiting.step % 4 == 3 else shorts + longs
    assert order("turns", waiting) == [int(waiting.number[row]) for row in expected]


def test_the_book_counts_the_tokens_served_since_each_arrival() -> None:
    book = Book(make_plan())
    sequences = []
    for number, tokens in enumerate([100, 60, 30]):
        request = Request(number=number, arrival_s=0.0, prompt_tokens=tokens, max_tokens=1)
        sequences.append(book.arrive(request))
        book.grow(sequences[-1], 20)
        book.submit_chunk(sequences[-1], 20)
    waiting = book.prefills()
    assert dict(zip(waiting.number.tolist(), waiting.served_tokens.tolist(), strict=True)) == {
        0: 60,
        1: 40,
        2: 20,
    }
    sequences[0].in_flight = 0
    book.evict(sequences[0])
    assert book.prefills().served_tokens[book.waiting.row(0)] == 60, "its arrival does not move"


SPECS = [*POLICIES, *ENGINES, "srpt,aging=1.5"]


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=30)
@given(waiting=prefills(), data=st.data())
def test_every_request_gets_one_finite_key_whatever_stands_beside_it(
    spec: str, waiting: Prefills, data: st.DataObject
) -> None:
    ranked = rank(spec, waiting)
    shape = (len(waiting),)
    assert ranked.keys.shape == ranked.yields.shape == ranked.demoted.shape == shape
    assert np.isfinite(ranked.keys).all()
    assert ((ranked.yields >= 0) & (ranked.yields <= SCHEDULER.max_yield)).all()
    assert not ranked.yields[~waiting.long].any()
    mixed = np.array(data.draw(st.permutations(range(len(waiting)))), dtype=np.int64)
    assert (rank(spec, some(waiting, mixed)).keys == ranked.keys[mixed]).all()


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=20)
@given(waiting=prefills())
def test_ranking_is_pure(spec: str, waiting: Prefills) -> None:
    before = some(waiting, np.arange(len(waiting)))
    policy = load_policy(spec, SCHEDULER).policy
    first = policy.rank(waiting, now_s=NOW_S)
    policy.rank(waiting, now_s=NOW_S + 5.0)
    again = policy.rank(waiting, now_s=NOW_S)
    for name in ("keys", "yields", "demoted"):
        assert (getattr(first, name) == getattr(again, name)).all()
    for name in Prefills.__struct_fields__:
        assert np.array_equal(getattr(waiting, name), getattr(before, name))


def equal_prefills(numbers: np.ndarray, arrival_s: np.ndarray) -> Prefills:
    """Fresh prompts that differ in number and arrival alone."""
    rows = len(numbers)
    ones = np.ones(rows)
    return Prefills(
        number=numbers,
        arrival_s=arrival_s,
        deadline_s=ones,
        work_s=ones,
        remaining_s=ones,
        prompt_tokens=np.full(rows, 100),
        missing_tokens=np.full(rows, 100),
        started=np.zeros(rows, dtype=np.bool_),
        recent=np.zeros(rows, dtype=np.bool_),
        long=np.zeros(rows, dtype=np.bool_),
        served_tokens=np.zeros(rows, dtype=np.int64),
        step=0,
    )


@pytest.mark.parametrize("spec", sorted({*POLICIES} - {"hrrn", "turns"}))
def test_equal_requests_go_by_arrival_number(spec: str) -> None:
    rows = 200
    numbers = np.random.default_rng(0).permutation(rows)
    waiting = equal_prefills(numbers, np.ones(rows))
    assert order(spec, waiting) == list(range(rows))


def test_arrivals_a_millisecond_apart_keep_their_order_at_a_large_clock() -> None:
    """In single precision, clocks near 1.7e9 s are 128 s apart."""
    rows = 50
    waiting = equal_prefills(np.arange(rows)[::-1].copy(), 1.7e9 + 1e-3 * np.arange(rows)[::-1])
    for spec in ("edf", "slack", "slack-remaining", "lrs", "lars"):
        keys = rank(spec, waiting, 1.7e9 + 1).keys
        assert (np.diff(keys) < 0).all(), spec


def test_lars_demotes_what_cannot_be_met_and_lanes_what_is_not_express() -> None:
    waiting = Prefills(
        number=np.arange(2),
        arrival_s=np.zeros(2),
        deadline_s=np.array([2.0, 2.0]),
        work_s=np.array([1.0, 0.5]),
        remaining_s=np.array([1.0, 0.5]),
        prompt_tokens=np.full(2, 100),
        missing_tokens=np.full(2, 100),
        started=np.zeros(2, dtype=np.bool_),
        recent=np.zeros(2, dtype=np.bool_),
        long=np.zeros(2, dtype=np.bool_),
        served_tokens=np.zeros(2, dtype=np.int64),
        step=0,
    )
    for spec in POLICIES:
        expected = [True, False] if spec in {"lars", "lars-lanes"} else [False, False]
        assert rank(spec, waiting, 1.25).demoted.tolist() == expected, spec


# --- names and options --------------------------------------------------------------------------


def test_names_and_options_give_what_they_say() -> None:
    scheduler = Scheduler(max_step_tokens=4096)
    assert load_policy("lars", scheduler).chunk_tokens is None
    assert load_policy("lars,chunk=512", scheduler).chunk_tokens == 512
    whole = load_policy("fcfs-whole", scheduler)
    assert (whole.chunk_tokens, whole.one_prompt) == (4096, True)
    assert load_policy("threshold", scheduler).request_tokens == 1024
    assert load_policy("threshold,threshold=64", scheduler).request_tokens == 64
    assert load_policy("fcfs@vllm", scheduler).chunk_tokens == 4096, (
        "8192, but the plan allows less"
    )
    assert load_policy("fcfs@vllm", scheduler).request_tokens is None
    tuned = load_policy("threshold@vllm", scheduler)
    assert (tuned.chunk_tokens, tuned.request_tokens) == (2048, 1024)
    assert load_policy("hrrn@sglang,mixed,chunk=64", scheduler).options == {"mixed": 1, "chunk": 64}


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("fcfs,chunk=0", "not chunk=N with N >= 1"),
        ("fcfs,chunk=-5", "not chunk=N"),
        ("fcfs,chunk=1.5", "not chunk=N"),
        ("fcfs,chunk", "not chunk=N"),
        ("fcfs,chunk=", "not chunk=N"),
        ("fcfs,chunk=²", "not chunk=N"),  # a digit to str.isdigit
        ("fcfs,", "'' is no option; fcfs takes chunk=N"),
        ("fcfs,chunk=8,chunk=8", "chunk is given twice"),
        ("fcfs,chunk=8193", "nearest: chunk=8192"),
        ("fcfs,aging=1", "'aging=1' is no option; fcfs takes chunk=N with N >= 1"),
        ("fcfs-whole,chunk=8", "fcfs-whole takes no options"),
        ("srpt,aging=-1", "not aging=R with R >= 0"),
        ("srpt,aging=nan", "not aging=R"),
        ("srpt,aging=inf", "not aging=R"),
        ("srpt,aging=fast", "not aging=R"),
        ("threshold,threshold=0", "not threshold=N"),
        ("fcfs@vllm,threshold=8", "'threshold=8' is no option"),
        ("hrrn@sglang,mixed=1", "not mixed"),
        ("hrrn@sglang,mixed=", "not mixed"),
    ],
)
def test_wrong_options_are_refused_with_the_rule(spec: str, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_policy(spec, SCHEDULER)
    assert text in str(caught.value)
    assert spec in str(caught.value)


def test_an_unknown_name_is_refused_with_near_ones() -> None:
    for spec, near in [("lar", "lars"), ("fcfs@vlm", "fcfs@vllm"), ("turns@vllm", "turns")]:
        with pytest.raises(UnknownName, match=near):
            load_policy(spec, SCHEDULER)


def test_options_belong_to_names_that_exist() -> None:
    assert set(OPTIONS) <= {*POLICIES, *ENGINES}

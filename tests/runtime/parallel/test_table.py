"""The table of requests that every rank keeps."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.executor.base import NewPages, Step
from runtime.parallel.table import RequestTable, Totals
from runtime.sampling_params import SamplingParams

NONE = np.array([], dtype=np.int64)
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["add", "append", "grow", "evict", "end"]),
        st.integers(0, 3),
        st.integers(1, 9),
    ),
    max_size=40,
)


def change(step_id: int, **fields: object) -> Step:
    return Step(step_id=step_id, decodes=NONE, decode_prefix=NONE, decode_home=NONE, **fields)


@given(EVENTS)
def test_totals_are_the_sums_over_what_is_known(events):
    """Whatever happens in whatever order, ends of requests that are not known included."""
    table = RequestTable()
    tokens: dict[int, int] = {}
    pages: dict[int, int] = {}
    for number, (event, request, count) in enumerate(events):
        if event == "add" and request not in tokens:
            table.add(request, [0] * count, SamplingParams())
            tokens[request], pages[request] = count, 0
        elif event == "append":
            table.append([(request, 7)] * count)
            tokens[request] = tokens[request] + count if request in tokens else 0
            if not tokens[request]:
                del tokens[request]
        elif event == "grow" and request in tokens:
            new = NewPages(request=request, shard=count % 2, pages=tuple(range(count)))
            table.apply(change(number, pages=(new,)))
            pages[request] += count
        elif event == "evict":
            table.apply(change(number, evicted=(request,)))
            if request in pages:
                pages[request] = 0
        elif event == "end":
            table.apply(change(number, ended=(request,)))
            tokens.pop(request, None)
            pages.pop(request, None)
        assert table.totals() == Totals(len(tokens), sum(tokens.values()), sum(pages.values()))


def test_a_request_may_lose_its_pages_and_start_again_in_one_step():
    table = RequestTable()
    table.add(0, [1, 2, 3], SamplingParams())
    table.apply(change(0, pages=(NewPages(request=0, shard=0, pages=(5, 6)),)))
    table.apply(change(1, evicted=(0,), pages=(NewPages(request=0, shard=0, pages=(9,)),)))
    assert table.totals() == Totals(1, 3, 1)

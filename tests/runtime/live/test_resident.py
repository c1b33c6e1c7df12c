"""What a device keeps of requests between steps, against plain lists."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bundles import toy_plan

from plans.errors import MedhaError
from runtime.executor.base import NewPages, Step
from runtime.parallel.resident import Residents
from runtime.parallel.transfers import ALIGNED_BYTES, overwrite, to_device, to_host

CPU = torch.device("cpu")
NONE = np.zeros(0, dtype=np.int64)


def step(*, pages=(), evicted=(), ended=()) -> Step:
    return Step(
        step_id=0,
        decodes=NONE,
        decode_prefix=NONE,
        decode_home=NONE,
        pages=tuple(NewPages(request=r, shard=0, pages=tuple(p)) for r, p in pages),
        evicted=tuple(evicted),
        ended=tuple(ended),
    )


def residents(sequences: int = 3) -> Residents:
    plan = toy_plan()
    limits = type(plan.limits)(context_tokens=plan.limits.context_tokens, sequences=sequences)
    return Residents(toy_plan(limits=limits), CPU)


REQUESTS = st.integers(0, 9)


@settings(max_examples=100)
@given(data=st.data())
def test_tables_hold_every_request_s_pages_in_order(data):
    """A request may lose its place and take another one in the same step."""
    kept, held = residents(), {}
    for _ in range(data.draw(st.integers(1, 12))):
        gone = data.draw(st.sets(st.sampled_from(sorted(held)))) if held else set()
        evicted = {each for each in gone if data.draw(st.booleans())}
        held = {number: pages for number, pages in held.items() if number not in gone}
        pages = []
        for number in data.draw(st.lists(REQUESTS, max_size=3, unique=True)):
            new = data.draw(st.lists(st.integers(0, 79), min_size=1, max_size=3))
            if number not in held and len(held) == kept.nobody:
                continue
            if len(held.get(number, [])) + len(new) <= 16:
                held.setdefault(number, []).extend(new)
                pages.append((number, new))
        kept.apply(step(pages=pages, evicted=evicted, ended=gone - evicted))
        kept.write()
        places = kept.places(held).tolist()
        assert len(set(places)) == len(places)
        assert kept.nobody not in places
        for place, (number, numbers) in zip(places, held.items(), strict=True):
            assert kept.table_UP[place, : len(numbers)].tolist() == numbers, number


def test_more_requests_than_the_limit_are_an_error_that_names_it():
    kept = residents(sequences=2)
    with pytest.raises(MedhaError, match=r"more than limits.sequences \(2\)"):
        kept.apply(step(pages=[(0, [1]), (1, [2]), (2, [3])]))


def test_tokens_that_only_the_host_knows_are_named_until_they_are_sent():
    kept = residents()
    kept.apply(step(pages=[(4, [1]), (7, [2])]))
    assert kept.unfed([4, 7]) == [4, 7]
    kept.feed([7], [55])
    assert kept.unfed([4, 7]) == [4]
    assert kept.newest_U[kept.places([7])].tolist() == [55]
    kept.apply(step(evicted=[7], pages=[(7, [3])]))
    assert kept.unfed([7]) == [7]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_arrays_of_several_types_travel_in_one_copy_and_back(device):
    arrays = [
        np.arange(5, dtype=np.int32),
        np.zeros(0, dtype=np.int64),
        np.arange(6.0).reshape(2, 3),
        np.arange(3, dtype=np.int64),
    ]
    sent = to_device(arrays, torch.device(device))
    for array, tensor in zip(arrays, sent, strict=True):
        assert tensor.device.type == device
        back = to_host(tensor)
        if device == "cuda":
            assert tensor.numel() == 0 or tensor.data_ptr() % ALIGNED_BYTES == 0
            torch.cuda.synchronize()
        assert np.array_equal(back.numpy(), array)
        assert back.dtype == torch.from_numpy(array).dtype
    overwrite(sent[3], np.array([7, 8]))
    assert sent[3].tolist() == [7, 8, 2]

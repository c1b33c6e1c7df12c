"""One rank by itself: what warms it up, what its errors say, what its stopwatch waits for."""

from types import SimpleNamespace

import pytest
import torch
from builders import make_plan

from plans.errors import MedhaError
from plans.mesh import Parallelism, coordinates
from runtime.parallel.rank import Alone, Rank
from runtime.parallel.stopwatch import Stopwatch
from runtime.parallel.table import row_groups


def rank_of(number: int, *, shard_rows: tuple[tuple[int, int], ...], page_tokens: int) -> Rank:
    plan = make_plan(parallelism=Parallelism(kvp=4), rows=shard_rows, page_tokens=page_tokens)
    place = coordinates(plan.parallelism, number)
    device = torch.device("cpu")
    return Rank(plan, place, program=None, weights={}, comm=Alone(), device=device)  # type: ignore[arg-type]


@pytest.mark.parametrize("context", [64, 128, 256, 1024])
def test_a_warm_up_asks_nothing_of_other_groups_however_small_a_shard_is(context):
    for number in range(4):
        rank = rank_of(number, shard_rows=((context, 16),), page_tokens=16)
        chunk, decode = (rows[0] for rows in rank.warm_up_rows())
        assert chunk.tokens > 1
        assert decode.tokens == 1
        for row in (chunk, decode):
            assert row_groups(rank.plan, row) == [rank.place.group]
            assert rank.rows([row]) == [row]


def test_a_gpu_warms_up_on_steps_as_large_as_the_plan_has_them():
    rank = rank_of(0, shard_rows=((8192, 512), (65536, 128)), page_tokens=16)
    rank.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    *chunks, decode = [rows[0] for rows in rank.warm_up_rows()]
    assert rank.plan.scheduler.max_step_tokens >= 512
    most = min(rank.plan.scheduler.max_step_tokens, 8192)
    sizes = [row.tokens for row in chunks]
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[0] == most
    assert {size for size in (1, 8, 63, 64, 255, 256, 1023, 1024) if size <= most} <= set(sizes)
    assert decode.prefix == chunks[0].tokens
    rank.device = torch.device("cpu")
    for row in (*chunks, decode):
        assert row_groups(rank.plan, row) == [0]
        assert int(rank.inputs([row]).kv_lens_B[0]) == row.prefix + row.tokens


class OutOfResources(Exception):
    """As Triton's, which is no RuntimeError."""


@pytest.mark.parametrize(
    ("raised", "text"),
    [
        (OutOfResources("shared memory"), "step 3 failed on cpu: OutOfResources: shared memory"),
        (RuntimeError("no kernel"), "step 3 failed on cpu: no kernel"),
        (MedhaError("says enough"), "says enough"),
    ],
)
def test_whatever_a_step_raises_is_an_error_that_says_where(raised, text):
    rank = rank_of(0, shard_rows=((256, 16),), page_tokens=16)
    with pytest.raises(MedhaError) as caught, rank.explained("step 3"):
        raise raised
    assert str(caught.value) == text


class Event:
    """An event of a device that is not there yet."""

    def __init__(self) -> None:
        self.reached = False

    def synchronize(self) -> None:
        self.reached = True

    def elapsed_time(self, last: "Event") -> float:
        assert last.reached, "both events must be completed"
        return 2000.0


def test_the_time_to_a_mark_is_told_when_the_device_is_there():
    first, last = Event(), Event()
    assert Stopwatch(torch.device("cpu")).seconds(first, last) == 2.0  # type: ignore[arg-type]

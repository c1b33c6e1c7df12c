"""Collectives between processes: every row of every rank, and an end in time whatever happens."""

import os
import time

import pytest
from torch._C._distributed_c10d import TCPStore

from codegen import links
from codegen.links import GRACE_S, measure_links

OPS = ("all_reduce", "all_gather", "send_recv", "all_to_all")
START_S = 60.0
"""More than two processes take to import torch and to meet, on a busy machine."""


def test_all_kinds_are_timed_by_all_ranks_in_processes_of_their_own():
    rows = [(op, size) for size in (64, 4096) for op in OPS]
    found = measure_links(rows, 2, limit_s=START_S, backend="gloo")
    assert list(found) == rows
    assert all(timing.us > 0 for timing in found.values())


def leaves(*_: object) -> None:
    os._exit(3)


def sleeps(*_: object) -> None:
    time.sleep(60)


@pytest.mark.parametrize(("rank", "limit_s"), [(leaves, START_S), (sleeps, 0.5)])
def test_a_rank_that_ends_or_hangs_does_not_hold_the_call(monkeypatch, rank, limit_s):
    monkeypatch.setattr(links, "_rank", rank)
    began_s = time.monotonic()
    assert measure_links([("all_reduce", 64)], 2, limit_s=limit_s, backend="gloo") == {}
    # far less than the hanging rank sleeps, far more than processes take to start
    assert time.monotonic() - began_s < limit_s + GRACE_S + 30


class Sent(list):
    """Stands in for the queue to the parent."""

    put = list.append


@pytest.mark.parametrize(("left_s", "rows"), [(-1.0, 0), (START_S, 3)])
def test_a_rank_begins_no_row_beyond_the_limit(left_s, rows):
    store = TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    wanted, sent = [("all_reduce", 64 << at) for at in range(3)], Sent()
    links._rank(0, 1, store.port, wanted, time.time() + left_s, "gloo", sent)  # noqa: SLF001
    assert [row for _, row, _ in sent] == [*wanted[:rows], None]

"""What a profile measures and how: no point twice, nothing lost, checks apart from fits."""

import pytest

from planner.profile import FUSED, TABLES, Point, link_points, points, take
from planner.profiles import KEYS, About, read_profile, read_table

ABOUT = About(device="x", driver="x", torch="x", triton="x", made="x", command="x")
SOME = [Point(table="copy", key=(1 << at,)) for at in range(4)] + [
    Point(table="sampling", key=(100, at)) for at in range(1, 4)
]


def test_points_are_those_of_the_tables_once_each_and_always_the_same():
    found = points()
    assert {each.table for each in found} == set(TABLES)
    assert len({(each.table, each.key) for each in found}) == len(found)
    assert all(len(each.key) == len(KEYS[each.table]) for each in found)
    assert found == points()
    assert points(["copy", "step"]) == points(["copy"]) + points(["step"])


@pytest.mark.parametrize("table", ["attention_chunk", "attention_decode", "gemm", "rows"])
def test_a_good_part_of_each_table_is_held_out(table):
    roles = [each.role for each in points([table])]
    assert 0.1 < roles.count("check") / len(roles) < 0.4


def test_products_with_an_epilogue_are_measured_where_codegen_has_them():
    ops = {each.key[0] for each in points(["gemm"], fused=FUSED)}
    assert ops == {"linear", *FUSED}
    assert {each.key[0] for each in points(["gemm"])} == {"linear"}


def test_transfers_are_between_two_whatever_the_node_has():
    assert {each.key[1] for each in link_points(4) if each.key[0] == "send_recv"} == {2}
    assert {each.key[1] for each in link_points(4) if each.key[0] == "all_reduce"} == {4}


def test_results_are_written_by_table_and_read_back(tmp_path):
    taken = take(SOME, lambda point: (float(len(point.key)), 0.5), tmp_path, ABOUT, limit_s=9)
    assert (taken.measured, taken.kept, taken.left, taken.failed) == (7, 0, 0, ())
    profile = read_profile(tmp_path)
    assert [row.key for row in profile.rows("copy")] == [(1,), (2,), (4,), (8,)]
    assert {row.us for row in profile.rows("sampling")} == {2.0}


def test_a_second_run_measures_only_what_is_missing(tmp_path):
    take(SOME[:5], lambda point: (1.0, 0.0), tmp_path, ABOUT, limit_s=9)
    taken = take(SOME, lambda point: (2.0, 0.0), tmp_path, ABOUT, limit_s=9)
    assert (taken.measured, taken.kept) == (2, 5)
    assert [row.us for row in read_table(tmp_path / "sampling.csv")] == [1.0, 2.0, 2.0]


def test_time_that_is_over_leaves_the_rest_and_loses_nothing(tmp_path):
    clock = iter(range(100))
    taken = take(
        SOME, lambda point: (1.0, 0.0), tmp_path, ABOUT, limit_s=3, now_s=lambda: next(clock)
    )
    assert (taken.measured, taken.left) == (3, 4)
    assert len(read_table(tmp_path / "copy.csv")) == 3
    assert not (tmp_path / "sampling.csv").exists()


def test_a_point_that_fails_loses_no_other(tmp_path):
    def measure(point):
        if point.key == (2,):
            raise RuntimeError("out of memory")
        return 1.0, 0.0

    taken = take(SOME, measure, tmp_path, ABOUT, limit_s=9)
    assert taken.measured == 6
    assert taken.failed == ("copy (2,): RuntimeError: out of memory",)

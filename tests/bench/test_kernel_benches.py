"""The parts of the kernel benches that need no GPU: figures put together, another Triton's gate."""

import csv
from pathlib import Path

import pytest

from bench.kernels import attention_plot, gate_triton
from bench.kernels.attention_plot import BEGIN, DISTURBED, END, goals, merged, table, with_table

FIGURES = Path(__file__).resolve().parents[2] / "bench/results/attention_peers_h100_202611.csv"


def figures(**changes: str) -> dict[str, str]:
    """A row of ours: 32 queries on 128K."""
    row = {"case": "chunk", "queries": "32", "keys": "131072", "batch": "1", "heads": "32/8",
           "page": "128", "graph": "False", "candidate": "ours", "us": "220.8", "tflops": "311",
           "tb_s": "2.43", "floor_us": "177.8", "of_floor": "0.805", "of_fa3": "0.939",
           "of_decode": "", "measured": "2026-11-27 23:32", "card": "H100"}  # fmt: skip
    return {**row, **changes}


def test_a_later_row_takes_the_place_of_the_same_case_and_candidate_alone():
    peer = figures(candidate="fa3", us="208.3")
    other = figures(heads="64/8", us="216.0")
    later = figures(us="200.1", measured="2026-11-28 04:00")
    assert merged([figures(note=DISTURBED), peer, other], [later]) == [later, peer, other]


def test_a_later_row_that_was_wrong_replaces_nothing():
    assert merged([figures()], [figures(us="wrong")]) == [figures()]


@pytest.mark.parametrize(
    ("row", "reached"),
    [
        (figures(), []),  # nothing measured beside it
        (figures(of_decode="1.29"), [("1.3 x decode", True)]),
        (figures(of_decode="1.31"), [("1.3 x decode", False)]),
        (figures(queries="512", of_fa3="1.03"), [("1.03 of FA3", True)]),
        (figures(case="prefill", of_fa3="0.999"), [("1.00 of FA3", False)]),
        (
            figures(case="decode", keys="4096", of_fa3="1.4", us="10.1"),
            [("1.05 of FA3", True), ("10 us", False)],
        ),
        (figures(case="decode", keys="4096", batch="32", of_fa3="1.0"), [("1.05 of FA3", False)]),
    ],
)
def test_a_goal_is_met_or_missed_by_what_was_measured(row, reached):
    assert goals(row) == reached


def test_disturbed_rows_have_a_star_until_they_are_measured_again():
    old = table([figures(note=DISTURBED)])
    assert "32 on 128K \\*" in old
    assert "Disturbed" in old
    new = table(merged([figures(note=DISTURBED)], [figures(us="200.1")]))
    assert "\\*" not in new
    assert "200.1" in new


def test_the_page_shows_what_the_figures_are():
    rows = attention_plot.read(FIGURES)
    assert table(rows) in FIGURES.with_suffix(".md").read_text()
    with FIGURES.open(newline="") as file:
        assert all(row["measured"] and row["card"] for row in csv.DictReader(file))


def test_a_table_is_written_between_its_marks_and_nowhere_else():
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert with_table(page, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(AssertionError, match="marks"):
        with_table("no marks", "new")


def test_python_of_the_gate_imports_the_triton_that_was_installed(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("__version__ = '0.0.1'\n")
    asked = gate_triton.gated(
        tmp_path, tmp_path / "cache", ["-c", "import triton; print(triton.__version__)"]
    )
    assert asked.stdout == "0.0.1\n"


def test_triton_is_installed_alone_and_from_pips_own_index_or_a_folder(tmp_path):
    line = gate_triton.installing("3.6.0", tmp_path, None)
    assert line[-1] == "triton==3.6.0"
    assert "--no-deps" in line
    assert not any("index" in each for each in line)
    assert "--no-index" in gate_triton.installing("3.6.0", tmp_path, tmp_path)

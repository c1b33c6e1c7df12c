"""Figures of products and of row-wise kernels: floors, tables and plots, without a GPU."""

from pathlib import Path

import pytest

from bench.kernels import rates_plot
from bench.kernels.rates_plot import BEGIN, END, cases, ratio, read, table, with_table
from bench.kernels.rowwise_rates import moved_bytes, with_floors

RESULTS = Path(__file__).resolve().parents[2] / "bench/results"
FIGURES = [RESULTS / "gemm_h100_202611.csv", RESULTS / "rowwise_h100_202611.csv"]
PRODUCT = {"model": "8B", "product": "o", "tokens": "16", "candidate": "ours", "us": "10.0",
           "floor_us": "9.0", "of_floor": "0.9", "of_peer": "1.2"}  # fmt: skip


def timed(op: str, tokens: int, candidate: str, us: float) -> dict[str, object]:
    return {"op": op, "tokens": tokens, "candidate": candidate, "us": us}


def test_floors_count_an_ops_bytes_at_the_rate_of_the_fastest_copy():
    """1 token of rms_norm moves 32 KiB, 16 of silu_mul 1344 KiB; no rate of an op counts."""
    assert moved_bytes("rms_norm", 1) == 2 * 2 * 8192
    assert moved_bytes("silu_mul", 16) == 16 * (2 + 1) * 14336 * 2
    rows = [
        timed("rms_norm", 1, "ours", 0.5),
        timed("rms_norm", 1, "copy", 2.0),  # 16384 bytes a microsecond
        timed("silu_mul", 16, "ours", 168.0),
        timed("silu_mul", 16, "copy", 42.0),  # 32768
    ]
    found = with_floors(rows)
    assert [row["floor_us"] for row in found] == [1.0, 1.0, 42.0, 42.0]
    assert [row["of_floor"] for row in found] == [2.0, 0.5, 0.25, 1.0]


def test_a_ratio_is_above_1_where_ours_is_shorter():
    assert ratio({"us": "12.0"}, {"us": "10.0"}) == "1.20"


def test_a_case_has_its_candidates_side_by_side_and_wrong_values_have_no_place():
    rows = [
        PRODUCT,
        {**PRODUCT, "candidate": "library", "us": "12.5"},
        {**PRODUCT, "tokens": "32", "us": "wrong"},
    ]
    assert list(cases(rows)) == [("8B o", 16)]
    assert table(rows).splitlines()[2:] == [
        "| 8B o | 16 | 10.0 | 9.0 | 0.9 |  |  | 12.5 | 1.25 |  |"
    ]


@pytest.mark.parametrize("figures", FIGURES, ids=lambda path: path.stem)
def test_a_page_shows_what_the_figures_are(figures):
    rows = read(figures)
    assert table(rows) in figures.with_suffix(".md").read_text()
    assert all(row["of_floor"] for row in rows if row["us"] != "wrong")


@pytest.mark.parametrize("figures", FIGURES, ids=lambda path: path.stem)
def test_a_plot_stands_beside_its_figures_and_is_made_of_them(figures, tmp_path):
    """Panels by name; the same figures give the same bytes."""
    made = [tmp_path / name for name in ("one.svg", "other.svg")]
    for path in made:
        rates_plot.plot(read(figures), path)
    assert made[0].read_bytes() == made[1].read_bytes()
    text = made[0].read_text()
    kept = figures.with_suffix(".svg").read_text()
    for what, _ in cases(read(figures)):
        assert f">{what}</text>" in text
        assert f">{what}</text>" in kept


def test_a_table_is_written_between_its_marks_and_nowhere_else():
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert with_table(page, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(AssertionError, match="marks"):
        with_table("no marks", "new")

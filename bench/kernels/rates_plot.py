"""The table and the plot of products or of row-wise kernels, from the figures of their benches.

    PYTHONPATH=. python bench/kernels/rates_plot.py bench/results/gemm_....csv [MORE.csv ...]

Of gemm_rates.py: times over the floor, by tokens, of ours and of cuBLAS; of rowwise_rates.py: bytes
a second beside those of a copy. Writes the plot beside the figures, as .svg, and the table
into the page beside them, .md, between its two marks. Needs no GPU.
"""

import argparse
import csv
import math
from importlib.util import find_spec
from pathlib import Path

BEGIN, END = "<!-- table: rates_plot.py writes it -->", "<!-- end of the table -->"
COLOURS = {
    "ours": "#0b5fa5",
    "streamed": "#7db8e8",
    "separate": "#edae49",
    "cuBLAS": "#d1495b",
    "torch": "#d1495b",
    "copy": "#66a182",
}
NAMES = {"library": "cuBLAS", "library alone": "cuBLAS"}
"""Of candidates whose name in the figures says less; alone: without what follows the product."""
Row = dict[str, str]
Case = tuple[str, int]


def read(path: Path) -> list[Row]:
    """A file of figures."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cases(rows: list[Row]) -> dict[Case, dict[str, Row]]:
    """The candidates of each case, by (what runs, tokens), in the order of the file.

    Rows without a time, whose values were wrong, are left out.
    """
    found: dict[Case, dict[str, Row]] = {}
    for row in rows:
        if row["us"] == "wrong":
            continue
        what = row["op"] if "op" in row else f"{row['model']} {row['product']}"
        name = NAMES.get(row["candidate"], row["candidate"])
        found.setdefault((what, int(row["tokens"])), {})[name] = row
    return found


def copy_rate(rows: list[Row]) -> float:
    """TB/s of the fastest copy among row-wise figures, with which their floors count."""
    return max(float(row["tb_s"]) for row in rows if row["candidate"] == "copy")


def ratio(peer: Row, own: Row) -> str:
    """Of two times, above 1 where ours is shorter."""
    return f"{float(peer['us']) / float(own['us']):.2f}"


def table(rows: list[Row]) -> str:
    """Markdown, a line a case."""
    if "op" in rows[0]:
        head = ["op", "tokens", "us", "TB/s", "floor, us", "of floor", "copy of as many bytes, us",
                "of copy", "torch, us", "error of tolerance"]  # fmt: skip
        lines = [_rowwise(case, found) for case, found in cases(rows).items()]
    else:
        head = ["model, product", "tokens", "ours, us", "floor, us", "of floor", "separate, us",
                "of separate", "cuBLAS, us", "of cuBLAS", "streamed, us"]  # fmt: skip
        lines = [_gemm(case, found) for case, found in cases(rows).items()]
    both = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in both)


def _rowwise(case: Case, found: dict[str, Row]) -> list[str]:
    own = found["ours"]
    return [
        *(case[0], str(case[1]), own["us"], own["tb_s"], own["floor_us"], own["of_floor"]),
        *(found["copy"]["us"], own["of_copy"], found["torch"]["us"], own["of_tolerance"]),
    ]


def _gemm(case: Case, found: dict[str, Row]) -> list[str]:
    own = found["ours"]
    cells = [case[0], str(case[1]), own["us"], own["floor_us"], own["of_floor"]]
    for name in ("separate", "cuBLAS"):
        there = name in found
        cells += [found[name]["us"], ratio(found[name], own)] if there else ["", ""]
    return [*cells, found["streamed"]["us"] if "streamed" in found else ""]


def plot(rows: list[Row], path: Path) -> None:
    """A panel for all that is the same but for its tokens."""
    import matplotlib as mpl  # noqa: PLC0415 - a machine that measures need not have it
    import matplotlib.pyplot as plt  # noqa: PLC0415

    mpl.rcParams["svg.hashsalt"] = "rates"  # the same figures give the same file
    mpl.rcParams["svg.fonttype"] = "none"
    plt.switch_backend("svg")
    rowwise = "op" in rows[0]
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for (what, tokens), found in cases(rows).items():
        for name, row in found.items():
            if name in COLOURS:
                height = float(row["tb_s"]) if rowwise else 1 / float(row["of_floor"])
                lines.setdefault(what, {}).setdefault(name, []).append((tokens, height))
    columns = 3 if rowwise else 4
    count = math.ceil(len(lines) / columns)
    figure, axes = plt.subplots(
        count, columns, figsize=(4 * columns, 2.8 * count), squeeze=False, sharey=rowwise
    )
    for axis, (what, candidates) in zip(axes.flat, lines.items(), strict=False):
        for name, points in candidates.items():
            places, heights = zip(*sorted(points), strict=True)
            axis.plot(places, heights, "o-", color=COLOURS[name], label=name, markersize=3)
        axis.axhline(copy_rate(rows) if rowwise else 1.0, color="black", linewidth=0.8,
                     linestyle=":", label="floor")  # fmt: skip
        axis.set_xscale("log", base=2)
        steps = sorted({tokens for points in candidates.values() for tokens, _ in points})
        axis.set_xticks(steps, list(map(str, steps)), fontsize=7)
        axis.minorticks_off()
        axis.set_ylim(0, 1.08 * axis.dataLim.y1)
        axis.set_title(what, fontsize=9)
        axis.grid(linewidth=0.3)
        axis.legend(fontsize=6)
        axis.set_xlabel("tokens", fontsize=8)
        axis.set_ylabel("TB/s" if rowwise else "time over the floor", fontsize=8)
    for axis in axes.flat[len(lines) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def with_table(page: str, text: str) -> str:
    """The page with another table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"the page lacks its marks, {BEGIN} and {END}"
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def write(figures: Path) -> None:
    """The plot beside a file of figures, where there is matplotlib; the table into its page."""
    rows = read(figures)
    page = figures.with_suffix(".md")
    page.write_text(with_table(page.read_text(), table(rows)))
    if find_spec("matplotlib") is None:
        print(f"no matplotlib here: rates_plot.py {figures.name} makes the plot elsewhere")
        return
    plot(rows, figures.with_suffix(".svg"))


def main() -> None:
    """Reads the figures named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path, nargs="+")
    for each in parser.parse_args().figures:
        write(each)


if __name__ == "__main__":
    main()

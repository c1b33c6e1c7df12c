"""The table and the plot of attention beside its peers, from the figures of attention_peers.py.

    PYTHONPATH=. python bench/kernels/attention_plot.py bench/results/attention_peers_....csv
                                                        [--with NEW/attention_peers.csv]

Writes the plot beside the figures, as .svg, and the table into the page beside them, .md, between
its two marks. `--with` first puts a later, partial run into the figures: each of its rows takes the
place of the same case's and candidate's; dates and cards stand in each row. Needs no GPU.
"""

import argparse
import csv
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

COLOURS = {
    "ours": "#0b5fa5",
    "portable Triton": "#7db8e8",
    "fa3": "#d1495b",
    "flashinfer": "#edae49",
    "sdpa cudnn": "#66a182",
    "sdpa flash": "#9a9a9a",
}
KEY = ("case", "queries", "keys", "batch", "heads", "page", "graph", "candidate")
BEGIN, END = "<!-- table: attention_plot.py writes it -->", "<!-- end of the table -->"
DISTURBED = "disturbed"
"""In the column `note`: something else ran beside the row."""
Row = dict[str, str]


def title(row: Row) -> str:
    """What a case is, in a few characters."""
    keys, queries = int(row["keys"]), int(row["queries"])
    length = f"{keys >> 20}M" if keys >= 1 << 20 else f"{keys >> 10}K"
    if row["case"] == "prefill":
        return f"prefill {length}"
    if row["case"] == "decode":
        return f"decode {row['batch']} x {length}"
    return f"{queries} on {length}"


def merged(rows: list[Row], later: list[Row]) -> list[Row]:
    """The rows, of which later ones take the place of the same case's and candidate's."""
    found = {tuple(row[name] for name in KEY): row for row in rows}
    good = [row for row in later if row["candidate"] and row["us"] != "wrong"]
    found |= {tuple(row[name] for name in KEY): row for row in good}
    return list(found.values())


def groups(rows: list[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """The candidates of each case, by (heads, case), in the order of the file."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["heads"], title(row)), {})[row["candidate"]] = row
    return found


def goals(row: Row) -> list[tuple[str, bool]]:
    """What the row was to reach, and whether it does; nothing where a figure is missing.

    Ratios to FA3 in the same rounds: decode 1.05, chunks from 128 on 1.03, prefill 1.00. A decode
    of one request on 4K in 10 us; a chunk of 32 in 1.3 times our decode of the same keys.
    """
    asked = {"decode": 1.05, "prefill": 1.0, "chunk": 1.03}[row["case"]]
    found = []
    if row["case"] == "chunk" and row["queries"] == "32":
        if row.get("of_decode"):
            found.append(("1.3 x decode", float(row["of_decode"]) <= 1.3))
    elif row["of_fa3"]:
        found.append((f"{asked:.2f} of FA3", float(row["of_fa3"]) >= asked))
    if row["case"] == "decode" and (row["keys"], row["batch"]) == ("4096", "1"):
        found.append(("10 us", float(row["us"]) <= 10.0))
    return found


def table(rows: list[Row]) -> str:
    """Markdown: times of each candidate; ours beside the floor, FA3, our decode, the goal."""
    names = [name for name in COLOURS if any(row["candidate"] == name for row in rows)]
    head = ["heads", "case", *(f"{name}, us" for name in names), "rate", "floor, us", "of floor",
            "of FA3", "of our decode", "goal", "measured, UTC"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (heads, case), found in groups(rows).items():
        own = found["ours"]
        bound = f"{own['tb_s']} TB/s" if "decode" in case else f"{own['tflops']} TFLOP/s"
        times = [found[name]["us"] if name in found else "" for name in names]
        mark = " \\*" if own.get("note") == DISTURBED else ""
        reached = "; ".join(f"{goal}: {'met' if met else 'missed'}" for goal, met in goals(own))
        cells = [heads, case + mark, *times, bound, own["floor_us"], own["of_floor"],
                 own["of_fa3"], own.get("of_decode", ""), reached, own["measured"]]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    if any(row.get("note") == DISTURBED for row in rows):
        lines += ["", "\\* Disturbed: a compiler ran on all cores of the machine beside it."]
    cards = sorted({row["card"] for row in rows})
    return "\n".join([*lines, "", f"Card of all rows: {', '.join(cards)}."])


def plot(rows: list[Row], path: Path) -> None:
    """Each candidate's share of the floor: 1 is the chip's own rate."""
    mpl.rcParams["svg.hashsalt"] = "attention"  # the same figures give the same file
    all_groups = groups(rows)
    heads = list(dict.fromkeys(head for head, _ in all_groups))
    figure, axes = plt.subplots(len(heads), 1, figsize=(13, 4.2 * len(heads)), squeeze=False)
    for axis, head in zip(axes[:, 0], heads, strict=True):
        cases = [case for each, case in all_groups if each == head]
        width = 0.8 / len(COLOURS)
        for at, (name, colour) in enumerate(COLOURS.items()):
            places, shares = [], []
            for place, case in enumerate(cases):
                row = all_groups[head, case].get(name)
                if row is not None and row["of_floor"]:
                    places.append(place + (at - len(COLOURS) / 2 + 0.5) * width)
                    shares.append(float(row["of_floor"]))
            axis.bar(places, shares, width, color=colour, label=name)
        axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        axis.set_xticks(range(len(cases)), cases, rotation=35, ha="right", fontsize=8)
        axis.set_ylabel("share of the floor")
        axis.set_ylim(0, 1.1)
        axis.set_title(f"{head} heads", fontsize=10)
        axis.grid(axis="y", linewidth=0.3)
    axes[0, 0].legend(ncols=len(COLOURS), fontsize=8, loc="upper center")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def read(path: Path) -> list[Row]:
    """A file of figures."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def with_table(page: str, text: str) -> str:
    """The page with another table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"the page lacks its marks, {BEGIN} and {END}"
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> None:
    """Reads the figures named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path)
    parser.add_argument("--with", dest="later", type=Path, help="a later run of some of the rows")
    options = parser.parse_args()
    plt.switch_backend("svg")
    rows = read(options.figures)
    if options.later:
        rows = merged(rows, read(options.later))
        with options.figures.open("w", newline="") as file:
            names = list(dict.fromkeys(name for row in rows for name in row))
            writer = csv.DictWriter(file, fieldnames=names, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    plot(rows, options.figures.with_suffix(".svg"))
    page = options.figures.with_suffix(".md")
    if page.exists() and BEGIN in page.read_text():
        page.write_text(with_table(page.read_text(), table(rows)))
    print(table(rows))


if __name__ == "__main__":
    main()

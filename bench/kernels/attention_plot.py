"""The table and the plot of attention beside its peers, from the figures of attention_peers.py.

    PYTHONPATH=. python bench/kernels/attention_plot.py bench/results/attention_peers_....csv

Writes the plot beside the figures, as .svg, and prints the table. Needs no GPU.
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


def groups(rows: list[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """The candidates of each case, by (heads, case), in the order of the file."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["heads"], title(row)), {})[row["candidate"]] = row
    return found


def table(rows: list[Row]) -> str:
    """Markdown: microseconds of each candidate, ours as a share of the floor and of FA3's time."""
    names = [name for name in COLOURS if any(row["candidate"] == name for row in rows)]
    head = ["heads", "case", *(f"{name}, us" for name in names), "rate", "of floor", "of FA3"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (heads, case), found in groups(rows).items():
        own = found["ours"]
        bound = f"{own['tb_s']} TB/s" if "decode" in case else f"{own['tflops']} TFLOP/s"
        times = [found[name]["us"] if name in found else "" for name in names]
        cells = [heads, case, *times, bound, own["of_floor"], own["of_fa3"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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


def main() -> None:
    """Reads the figures named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path)
    options = parser.parse_args()
    plt.switch_backend("svg")
    with options.figures.open(newline="") as file:
        rows = list(csv.DictReader(file))
    plot(rows, options.figures.with_suffix(".svg"))
    print(table(rows))


if __name__ == "__main__":
    main()

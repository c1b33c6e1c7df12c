"""Result rows on disk: one line of CSV a run, with what is needed to make it again."""

import csv
import datetime as dt
import math
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from msgspec import Struct, structs

from bench.paper_run import CLASSES, QUANTITIES, Case, Outcome

CASE_FIELDS = Case.__struct_fields__
RUN_FIELDS = ("offered", "sent", "load", "gaps_p99_s", "steps", "evictions", "wall_s")
FIGURES = (
    "requests",
    "finished",
    "attained",
    "met",
    *(
        f"{quantity}_{figure}"
        for quantity in QUANTITIES
        for figure in ("p50", "p90", "p99", "mean")
    ),
)
ORIGIN_FIELDS = ("date", "commit", "python", "numpy", "plan_hash")
COLUMNS = (
    *CASE_FIELDS,
    *RUN_FIELDS,
    *(f"{name}_{figure}" for name in CLASSES for figure in FIGURES),
    *ORIGIN_FIELDS,
)


class Origin(Struct, frozen=True, kw_only=True):
    """Where a number comes from; all of them are simulated."""

    date: str
    commit: str
    python: str
    numpy: str
    plan_hash: str


class Row(Struct, frozen=True, kw_only=True):
    """One run read back: its case, and every other column that holds a number."""

    case: Case
    figures: dict[str, float]
    origin: Origin

    def __getitem__(self, column: str) -> float:
        """A number of the run; NaN where the class is empty."""
        return self.figures.get(column, math.nan)


def origin(plan_hash: str, commit: str | None) -> Origin:
    """Of a run made now; without a commit that of the checkout, `+` where packages are changed."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    if commit is None:
        changed = git("status", "--porcelain", "--", "plans", "planner", "runtime")
        commit = git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    return Origin(
        date=dt.datetime.now(dt.UTC).date().isoformat(),
        commit=commit,
        python=platform.python_version(),
        numpy=np.__version__,
        plan_hash=plan_hash,
    )


def append(path: Path, outcome: Outcome, made: Origin) -> None:
    """Adds a line, and the header where the file is new."""
    cells: dict[str, object] = structs.asdict(outcome.case)
    cells |= {name: getattr(outcome, name) for name in RUN_FIELDS}
    for name in CLASSES:
        cells |= {f"{name}_{key}": value for key, value in outcome.classes[name].items()}
    cells |= structs.asdict(made)
    shown = {
        key: f"{value:.6g}" if isinstance(value, float) else value for key, value in cells.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(shown)


def read(paths: Iterable[Path]) -> list[Row]:
    """All runs of the files; later lines of one case replace earlier ones."""
    rows: dict[Case, Row] = {}
    for path in paths:
        if not path.exists():
            continue
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                case = Case(
                    protocol="fair" if line["protocol"] == "fair" else "harness",
                    mix=int(line["mix"]),
                    qps=float(line["qps"]),
                    policy=line["policy"],
                    seed=int(line["seed"]),
                    window_s=float(line["window_s"]),
                )
                rows[case] = Row(
                    case=case,
                    figures={
                        key: float(value)
                        for key, value in line.items()
                        if value and key not in {*CASE_FIELDS, *ORIGIN_FIELDS}
                    },
                    origin=Origin(**{key: line[key] for key in ORIGIN_FIELDS}),
                )
    return list(rows.values())

"""Rows of a measurement, written after each part as one CSV and one table a part; its steps too."""

import csv
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.engine_load import write_steps
from bench.parallel_gpus import about, shown
from plans.codec import content_hash, dump_file
from plans.plan import Plan

Row = dict[str, Any]


class Report:
    """Rows so far, written after each part."""

    def __init__(self, out: Path, plan: Plan) -> None:
        self.rows: list[Row] = []
        self.steps: list[Row] = []
        """Every step of the loads."""
        self._out = out
        self._plan = plan
        out.mkdir(parents=True, exist_ok=True)
        dump_file(out / "plan.yaml", plan)

    def part(self, name: str, body: Callable[[], Row | Iterator[Row]]) -> None:
        """Adds what a part yields, or why it failed."""
        began_s = time.monotonic()
        try:
            found = body()
            for row in [found] if isinstance(found, dict) else found:
                self.rows.append(row)
        except Exception as error:  # noqa: BLE001 - a failed part is a row, not the end
            self.rows.append({"part": name, "failed": repr(error)[:300]})
            print(f"{name} failed: {error!r}", file=sys.stderr, flush=True)
        print(f"{name}: {time.monotonic() - began_s:.1f} s", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        """One CSV, one table a part, and the steps."""
        write_steps(self._out / "engine_steps.csv", self.steps)
        fields = list(dict.fromkeys(key for row in self.rows for key in row))
        with (self._out / "engine_gpu.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(self.rows)
        lines = [
            f"`python -m bench.engine_gpu {' '.join(sys.argv[1:])}`",
            "",
            f"{about()}; plan {content_hash(self._plan)[:12]}",
        ]
        for part in dict.fromkeys(row["part"] for row in self.rows):
            rows = [row for row in self.rows if row["part"] == part]
            names = list(dict.fromkeys(key for row in rows for key in row if key != "part"))
            lines += ["", f"## {part}", "", "| " + " | ".join(names) + " |"]
            lines.append("|" + "---|" * len(names))
            lines += [
                "| " + " | ".join(shown(row.get(name, "")) for name in names) + " |" for row in rows
            ]
        (self._out / "engine_gpu.md").write_text("\n".join(lines) + "\n")

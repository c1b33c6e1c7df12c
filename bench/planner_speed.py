"""How fast the planner answers; writes a dated result.

    python -m bench.planner_speed --out bench/results

Each question is asked as users ask it: a fresh `medha-plan --no-kernels` in a process of its own,
limited to one thread, replays included. Where others share the machine, the seconds of the process
itself say more than the wall clock. What the answer was is kept beside the time.
"""

import csv
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = (
    "--model llama3-70b --gpus 16",
    "--model llama3-70b --gpus 64",
    "--model llama3-70b --gpus 256",
    "--model llama3-70b --gpus 1024",
    "--model llama3-8b --gpus 8 --workload chat",
    "--model deepseek-v3 --gpus 32 --hardware h200 --workload chat",
    "--model llama3-70b --gpus 64 --objective min-gpus --rate 0.2",
    "--model llama3-70b --gpus 16 --objective max-context",
)
FULL = "--model llama3-70b --gpus 16 --effort full"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
COLUMNS = ("question", "process_s", "process_s_max", "wall_s", "repeats", "answer", "candidates")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder of results.")],
    repeats: Annotated[int, typer.Option(help="Of each question; the median counts.")] = 3,
    full: Annotated[bool, typer.Option(help="Also one question at full effort.")] = False,  # noqa: FBT002
) -> None:
    """Asks every question and writes planner-speed-DATE.csv and .md."""
    rows = [ask(question, repeats) for question in QUESTIONS]
    if full:
        rows.append(ask(FULL, 1))
    now = datetime.now(UTC)
    stem = out / f"{now:%Y-%m-%d}-planner-speed"
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    stem.with_suffix(".md").write_text(report(rows, now, repeats))
    print(stem.with_suffix(".md").read_text())


def ask(question: str, repeats: int) -> dict[str, object]:
    """Median seconds of the process and on the wall, and what was answered."""
    used, waited, answer = [], [], {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            flags = [*question.split(), "--no-kernels", "--format", "json", "--out", f"{folder}/p"]
            before, start_s = _children_s(), time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", "from planner.cli_plan import main; main()", *flags],
                cwd=ROOT,
                env=os.environ | ONE_THREAD,
                capture_output=True,
                text=True,
                check=True,
            )
            waited.append(time.perf_counter() - start_s)
            used.append(_children_s() - before)
            answer = json.loads(done.stdout)
    return {
        "question": question,
        "process_s": round(statistics.median(used), 2),
        "process_s_max": round(max(used), 2),
        "wall_s": round(statistics.median(waited), 2),
        "repeats": repeats,
        "answer": answer["arithmetic"],
        "candidates": f"{answer['feasible']} priced, {sum(answer['rejected'].values())} rejected, "
        f"{answer['pruned']} pruned",
    }


def _children_s() -> float:
    """Processor seconds of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def report(rows: list[dict[str, object]], now: datetime, repeats: int) -> str:
    """The result as a page."""
    lines = [
        "# Speed of the planner",
        "",
        (
            f"{now:%Y-%m-%d}, `python -m bench.planner_speed --out bench/results`: each question"
            f" {repeats} times, median; {platform.machine()}, {os.cpu_count()} cores, Python"
            f" {platform.python_version()}, numpy {np.__version__}, one thread. Replays are"
            f" included. Load average at the end {os.getloadavg()[0]:.1f}: where others share the"
            " machine, the seconds of the process count, and even they are high."
        ),
        "",
        "| question | process s | largest | wall s | answer | candidates |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{row['question']}` | {row['process_s']} | {row['process_s_max']} | {row['wall_s']} |"
        f" {row['answer']} | {row['candidates']} |"
        for row in rows
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    app()

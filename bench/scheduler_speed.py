"""How fast the scheduler decides and the simulator simulates; writes a dated result.

    python -m bench.scheduler_speed --out bench/results

Two measurements: bench_scheduler.py (one decision with 10,000 requests waiting and 256 decoding),
and medha-sim of an hour of the paper's 5 % mix at 0.75 requests/s, as users run it, in one thread.
The same hour runs once more in this process to count what was decided in it.
Where others share the machine, the seconds of the process itself say more than the wall clock.
"""

import csv
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from bench.paper import TRACES
from bench.paper_setup import WINDOW_S, mix_file, paper_plan
from bench.paper_table import Origin, origin
from plans.codec import content_hash, dump_file
from runtime.arrivals import Load, offer
from runtime.executor.base import Step, StepResult
from runtime.request import Record, Sequence
from runtime.simulate import simulate

ROOT = Path(__file__).resolve().parents[1]
RATE = 0.75
HOUR = ("--qps", str(RATE), "--duration", str(WINDOW_S))
COLUMNS = ("what", "policy", "unit", "median", "least", "p90", "samples")
Line = dict[str, object]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder of results.")],
    policy: Annotated[list[str], typer.Option(help="Of the hour.")] = ["lars"],  # noqa: B006
    repeats: Annotated[int, typer.Option(help="Hours of each policy.")] = 1,
    traces: Path = TRACES,
) -> None:
    """Measures both and writes scheduler-speed-DATE.csv and .md."""
    made = origin(content_hash(paper_plan()), None)
    lines = decisions()
    for name in policy:
        lines += hour(name, repeats, traces)
        lines += floor(name, traces)
    stem = out / f"{made.date}-scheduler-speed"
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    stem.with_suffix(".md").write_text(_text(made, lines))


def decisions() -> list[Line]:
    """One line a policy from pytest-benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.json"
        command = ["-m", "pytest", "bench/bench_scheduler.py", "-q", f"--benchmark-json={path}"]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        found = json.loads(path.read_text())["benchmarks"]
    return [
        _line(
            f"one decision, KV pools: {each['params']['pool']}",
            each["params"]["policy"],
            "us",
            1e6 * np.array(each["stats"]["data"]),
        )
        for each in found
    ]


def hour(policy: str, repeats: int, traces: Path) -> list[Line]:
    """Wall and process seconds of medha-sim."""
    wall_s, own_s = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.yaml"
        dump_file(path, paper_plan())
        command = [str(Path(sys.executable).parent / "medha-sim"), str(path)]
        command += ["--trace", str(mix_file(traces, 5)), *HOUR, "--policy", policy, "--json", "-"]
        for _ in range(repeats):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            started_s = time.perf_counter()
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            wall_s.append(time.perf_counter() - started_s)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            own_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    what = "medha-sim, an hour of the 5 % mix at 0.75 requests/s"
    return [
        _line(f"{what}, wall", policy, "s", np.array(wall_s)),
        _line(f"{what}, processor", policy, "s", np.array(own_s)),
    ]


class _Count:
    """Engine observer that counts."""

    def __init__(self) -> None:
        self.steps = self.chunks = self.decodes = self.without_chunks = 0

    def arrived(self, sequence: Sequence, now_s: float) -> None:
        """Nothing to count."""

    def submitted(self, step: Step, now_s: float) -> None:
        """One step."""
        self.steps += 1
        self.chunks += len(step.chunks)
        self.decodes += len(step.decodes)
        self.without_chunks += not step.chunks

    def collected(self, result: StepResult) -> None:
        """Nothing to count."""

    def ended(self, record: Record, now_s: float) -> None:
        """Nothing to count."""


def floor(policy: str, traces: Path) -> list[Line]:
    """What the hour is made of, and the processor time of each step."""
    plan, count = paper_plan(), _Count()
    load = Load(qps=RATE, duration_s=WINDOW_S)
    offered = offer(mix_file(traces, 5), load, context_tokens=plan.limits.context_tokens)
    started_s = time.process_time()
    simulate(plan, offered.requests, policy, observe=lambda _: count)
    seconds = time.process_time() - started_s
    figures = {
        "requests": ("count", len(offered.requests)),
        "steps": ("count", count.steps),
        "steps without a chunk": ("count", count.without_chunks),
        "chunks": ("count", count.chunks),
        "decodes a step": ("mean", count.decodes / count.steps),
        "a step, processor": ("us", 1e6 * seconds / count.steps),
    }
    return [
        _line(f"that hour, {what}", policy, unit, np.array([value]))
        for what, (unit, value) in figures.items()
    ]


def _line(
    what: str, policy: str, unit: str, samples: "np.ndarray[tuple[int], np.dtype[np.float64]]"
) -> Line:
    return {
        "what": what,
        "policy": policy,
        "unit": unit,
        "median": _shown(np.median(samples)),
        "least": _shown(samples.min()),
        "p90": _shown(np.quantile(samples, 0.9)),
        "samples": len(samples),
    }


def _shown(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _text(made: Origin, lines: list[Line]) -> str:
    processor = platform.processor() or platform.machine()
    table = ["| " + " | ".join(str(line[column]) for column in COLUMNS) + " |" for line in lines]
    shown = "\n".join(table)
    return f"""# Speed of the scheduler and of the simulator

Measured on {made.date}, code {made.commit}, Python {made.python}, numpy {made.numpy}, {processor},
{os.cpu_count()} cores that other work shares (load average {os.getloadavg()[0]:.1f}), one thread.
Plan {made.plan_hash[:12]}: 8B on 16 A100 at TP8 x SPP2. Command: `python -m bench.scheduler_speed`.
A decision packs one step with 10,000 requests waiting and 256 decoding; `full` leaves six pages.

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}
{shown}
"""


if __name__ == "__main__":
    app()

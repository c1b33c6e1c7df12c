"""`make demo`: plans for 16 GPUs, serves mixed traffic in virtual time, runs a tiny model here.

Needs no GPU and no download. Every step prints the command that a user would type and runs it;
whatever it writes goes to demo-out/, which git ignores and the next demo replaces.
"""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from plans.check import load_plan
from plans.plan import Plan
from runtime.request import Request
from runtime.simulate import simulate

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "demo-out"
SHORT_PROMPTS = 16
LONG_TOKENS = 8192
POLICIES = ("fcfs", "lars-lanes")
WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Waiting threads let go of their core: where others share the machine, spinning costs 6 x."""

console = Console(soft_wrap=True)


def main() -> None:
    """Runs the three parts and says where the results are."""
    started_s = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    big, tiny = "llama3-70b-16xh100", "tiny-llama-cpu"

    heading(
        "1. Plan llama3-70b for 16 GPUs",
        "How to spread the model, how to cut prompts, what to expect: by formula, in a second.",
    )
    run("medha-plan --model llama3-70b --gpus 16")

    plan = load_plan(OUT / big / "plan.yaml")
    qps = 0.8 * plan.predicted.capacity_rps
    heading(
        "2. Serve five minutes of mixed traffic in virtual time",
        f"The plan's own workload, {plan.workload.name}, at 80 % of the predicted capacity:"
        " chats of a few thousand tokens, and 5 % documents of 100 thousand to a million."
        " The engine loop is the one that runs live; only time is virtual.",
    )
    policies = " ".join(f"--policy {name}" for name in POLICIES)
    run(f"medha-sim {big} --qps {qps:.2g} --duration 300 {policies} --plot ttft.png")

    heading(
        "3. Plan, compile and run a tiny model on this CPU",
        f"{SHORT_PROMPTS} short prompts and one of {LONG_TOKENS} tokens at once, random weights.",
    )
    run(
        "medha-plan --model tiny-llama --gpus 1 --hardware cpu --workload chat --max-context 16k"
        f" --out {tiny}"
    )
    requests = write_requests(OUT / "requests.jsonl")
    run(f"medha-run {tiny} --weights random --requests requests.jsonl --out answers.jsonl")
    compare(load_plan(OUT / tiny / "plan.yaml"), requests, OUT / "answers.jsonl")

    heading(
        f"Done in {time.perf_counter() - started_s:.0f} s",
        f"Plans, programs, figures and answers are in {OUT.name}/. To go on, in that folder:",
    )
    console.print(f"  medha-sim {big} --qps {qps:.2g} --duration 60 --timeline timeline.json")
    console.print(f"  medha-plan {big}/plan.yaml --prompt-tokens 300k")
    console.print()


def heading(title: str, text: str) -> None:
    """A part of the demo."""
    console.rule(f"[bold]{title}", align="left")
    console.print(text, style="dim", soft_wrap=False)
    console.print()


def run(command: str) -> None:
    """Prints and runs a command of this project; ends the demo with its status where it fails."""
    console.print(f"[bold green]$[/] [bold]{command}[/]", highlight=False)
    sys.stdout.flush()
    name, *arguments = shlex.split(command)
    command_path = Path(sys.executable).parent / name
    status = subprocess.run(
        [command_path, *arguments], cwd=OUT, env={**WAITING, **os.environ}, check=False
    ).returncode
    console.print()
    if status:
        console.print(f"{name} ended with status {status}", style="bold red")
        raise SystemExit(status)


def write_requests(path: Path) -> list[Request]:
    """Writes the batch for medha-run, the long prompt first; returns the same for the simulator."""
    lengths = [LONG_TOKENS, *(64 + 8 * number for number in range(SHORT_PROMPTS))]
    with path.open("w") as file:
        for number, tokens in enumerate(lengths):
            ids = [(31 * number + 7 * place) % 2048 for place in range(tokens)]
            line = {"id": number, "token_ids": ids, "max_tokens": 24, "ignore_eos": True}
            file.write(json.dumps(line) + "\n")
    return [
        Request(number=number, arrival_s=0.0, prompt_tokens=tokens, max_tokens=24)
        for number, tokens in enumerate(lengths)
    ]


def compare(plan: Plan, requests: list[Request], answers: Path) -> None:
    """The same batch in virtual time beside what was measured."""
    predicted = simulate(plan, requests, plan.scheduler.policy)
    ttft_s = {record.request.number: record.ttft_s for record in predicted.records}
    gaps_s = [*predicted.short_gaps_s.tolist(), *predicted.long_gaps_s.tolist()]
    measured = {row["id"]: row for row in map(json.loads, answers.read_text().splitlines())}
    rows = [
        (
            f"TTFT, prompt of {LONG_TOKENS:,} tokens, s",
            ttft_s[0],
            measured[0]["ttft_s"],
        ),
        (
            f"TTFT, {SHORT_PROMPTS} short prompts, median, s",
            statistics.median(ttft_s[number] for number in range(1, len(requests))),
            statistics.median(measured[number]["ttft_s"] for number in range(1, len(requests))),
        ),
        (
            "time between tokens, median, s",
            statistics.median(gaps_s),
            statistics.median(row["tbt_s"]["p50"] for row in measured.values()),
        ),
    ]
    table = Table(
        box=box.SIMPLE_HEAD, title="the same batch, predicted and measured", title_justify="left"
    )
    for column in ("", "predicted", "measured", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for label, expected, seen in rows:
        table.add_row(label, f"{expected:.4f}", f"{seen:.4f}", f"{seen / expected:.1f}")
    console.print(table)
    console.print(
        "Predicted: the batch in virtual time, step times by a roofline with the figures of one"
        " idle 2-core machine (planner/catalog/devices/cpu.yaml), not of this one. No profile yet:"
        " expect a factor of a few, and more while other work shares the cores.",
        style="dim",
        soft_wrap=False,
    )
    console.print()


if __name__ == "__main__":
    main()

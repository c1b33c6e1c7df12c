"""compute-sanitizer over every kernel, a process for each case and tool, several at once.

    PYTHONPATH=. python bench/kernels/sanitize.py [--out DIR] [--tools memcheck,racecheck,...]

First all cases run without a tool, which fills Triton's cache and compares values with the
references; then under each tool, beside kernels that are wrong on purpose (sanitize_controls.py): a
tool that misses one is called blind. A stress of what no tool sees, results handed from block to
block through global memory, runs beside them (merge_stress.py). Writes sanitizer.md, .csv and the
first lines of each log that reports anything; ends within --seconds.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.kernels.sanitize_logs import Report, read, spans

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
PLAIN = "values"
"""The run without a tool."""
STRESS = "stress"
OPTIONS = {
    "memcheck": ("--padding", "4096"),
    "racecheck": ("--racecheck-report", "all"),
    "synccheck": (),
    "initcheck": (),
}
UNCACHED = {"memcheck", "initcheck"}
"""Tools that need an allocation a tensor: in PyTorch's cache one lies right behind another. The
driver's lie so, too, if they are multiples of 512 bytes: memcheck has to put a gap between them."""
NOTES = """## How to read it

- memcheck, initcheck: an allocation of the driver a tensor, and for memcheck 4096 bytes between
  any two, so that the end of one is not the start of the next. Copies by TMA are checked by the
  hardware against the bounds of their descriptor.
- initcheck does not see what the library's product writes (on Hopper presumably by TMA): the
  control above shows it. So in the case behind the library its result is NaN beforehand, written by
  a kernel that the tool sees; what the library then leaves out shows in the values.
- racecheck knows shared memory only, and orders accesses by barriers that it recognises; what
  wgmma reads and TMA writes is no access of a thread, so it sees none there. The control without a
  handover has hazards in the bytes of its buffer, the one with an mbarrier none there.
- The dispatch of `warp_specialize`, in the PTX of Triton 3.6.0: the first four warps store a byte
  a worker warp, which says what it runs, as one word behind the last mbarrier; all threads meet
  (`barrier.sync 1`); each worker reads its byte; all meet again before and behind
  its work. At the end the first four
  warps store the word that ends the workers, all meet, and the workers read it. So between any two
  accesses of a byte, one of them a write, all threads of the block have met, and a hazard between
  them is a false alarm. The addresses are those of the PTX plus 1024 bytes that the driver keeps.
- Nothing here looks at races in global memory; the stress is what there is of that.
"""
NO_CACHE = "PYTORCH_NO_CUDA_MEMORY_CACHING"
CHILD_S = 75.0
CONTROL_S = 40.0
WARM_S = 70.0
LOG_LINES = 60


@dataclass(frozen=True, kw_only=True)
class Job:
    """A process."""

    tool: str
    name: str
    control: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of it."""

    job: Job
    seconds: float
    report: Report | None = None
    share: float | None = None
    """Error of the values, as a share of what is allowed."""
    launched: tuple[str, ...] = ()
    note: str = ""
    log: str = ""


# --- child ----------------------------------------------------------------------------------------


def child(name: str, *, control: bool, device_name: str) -> None:
    """Runs one case and prints what it found, as a line of JSON."""
    import torch  # noqa: PLC0415 - the parent goes without
    from triton import knobs  # noqa: PLC0415

    from bench.kernels.sanitize_cases import CASES  # noqa: PLC0415
    from bench.kernels.sanitize_controls import CONTROLS  # noqa: PLC0415

    torch.set_num_threads(1)
    device = torch.device(device_name)
    launched: set[str] = set()

    def entered(metadata: Any) -> None:
        with suppress(AttributeError, KeyError, TypeError):  # the form of a version of Triton
            launched.add(str(metadata.get()["name"]))

    if control:
        CONTROLS[name].run(device)
        share = 0.0
    else:
        knobs.runtime.launch_enter_hook.add(entered)
        share = CASES[name].run(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
    if device.type == "cuda" and os.environ.get(NO_CACHE) and torch.cuda.memory_reserved():
        sys.exit(f"this PyTorch caches memory in spite of {NO_CACHE}")
    print(json.dumps({"share": share, "launched": sorted(launched)}), flush=True)


# --- parent ---------------------------------------------------------------------------------------


def command(job: Job, log: Path, *, device: str, plainly: bool = False) -> list[str]:
    """The command line of a job; `plainly` without options that a version may not know."""
    own = [sys.executable, str(Path(__file__))]
    if job.tool == STRESS:
        stress = str(ROOT / "bench/kernels/merge_stress.py")
        return [sys.executable, stress, "--device", device, "--launches", job.name]
    own += ["--child", job.name, "--device", device, *(["--control"] if job.control else [])]
    if job.tool == PLAIN:
        return own
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    front = [tool, "--tool", job.tool, "--log-file", str(log)]
    if not plainly:
        front += ["--print-limit", "400", "--target-processes", "application-only"]
        front += OPTIONS[job.tool]
    return [*front, *own]


def environment_of(job: Job) -> dict[str, str]:
    """Of a child."""
    found = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    found["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    if job.tool in UNCACHED:
        found[NO_CACHE] = "1"
    return found


def finished(line: Sequence[str], job: Job, seconds: float) -> tuple[int | None, str]:
    """Status and output of a process; None, and what it had printed, where it had to be ended."""
    try:
        process = subprocess.Popen(
            line, cwd=ROOT, env=environment_of(job), text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except OSError as error:
        return 127, str(error)
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the group is this process's own
        text, _ = process.communicate()
        return None, text
    return process.returncode, text


def run(job: Job, *, deadline: float, device: str, limit_s: float) -> Outcome:
    """Runs a job within its time and what is left of all."""
    began = time.monotonic()
    left = min(CONTROL_S if job.control else limit_s, deadline - began)
    if left < 5:
        return Outcome(job=job, seconds=0.0, note="not run: no time left")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        status, text = finished(command(job, log, device=device), job, left)
        report = read(written) if (written := _text(log)) else None
        unread = job.tool in TOOLS and (report is None or report.errors is None)
        if unread and status is not None and time.monotonic() - began < left / 3:
            again = command(job, log, device=device, plainly=True)
            status, text = finished(again, job, max(deadline - time.monotonic(), 5))
            report = read(written) if (written := _text(log)) else None
    outcome = Outcome(job=job, seconds=time.monotonic() - began, report=report, log=written or text)
    if status is None:
        return replace(outcome, note=f"ended after {left:.0f} s")
    answers = [each for each in text.splitlines() if each.startswith("{")]
    if answers:
        answer = json.loads(answers[-1])
        outcome = replace(outcome, share=answer["share"], launched=tuple(answer["launched"]))
    elif job.tool == STRESS:
        return replace(outcome, note=text.strip() if status in {0, 1} else _last(text))
    elif not job.control or NO_CACHE in text:
        return replace(outcome, note=f"status {status}: {_last(text)}")
    return outcome


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _last(text: str) -> str:
    lines = [each for each in text.strip().splitlines() if each.strip()]
    return lines[-1][:200] if lines else "no output"


def all_of(jobs: Sequence[Job], *, at_once: int, **options: Any) -> list[Outcome]:
    """Outcomes in the order of the jobs; prints each as it ends."""

    def one(job: Job) -> Outcome:
        outcome = run(job, **options)
        verdict = outcome.report.verdict if outcome.report else outcome.share
        print(f"{job.tool:10} {job.name:36} {verdict} {outcome.seconds:.0f} s "
              f"{outcome.note.splitlines()[0] if outcome.note else ''}", flush=True)  # fmt: skip
        return outcome

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, jobs))


def chosen(only: str, tools: Sequence[str], names: Sequence[str]) -> list[Job]:
    """Cases under tools: all, or those of `memcheck,initcheck:part of a name`."""
    parts = [each.partition(":") for each in only.split(",") if each]
    return [
        Job(tool=tool, name=name)
        for tool in tools
        for name in names
        if not only or any(tool == asked and part in name for asked, _, part in parts)
    ]


# --- tables ---------------------------------------------------------------------------------------


def cell(outcome: Outcome | None) -> str:
    """Errors and seconds."""
    if outcome is None:
        return ""
    if outcome.job.tool == PLAIN:
        value = "failed" if outcome.share is None else f"{outcome.share:.2f}"
    else:
        value = outcome.report.verdict if outcome.report else "no verdict"
    return f"{value}, {outcome.seconds:.0f} s" + (f" ({outcome.note})" if outcome.note else "")


def launches(outcome: Outcome, kernels: Sequence[str]) -> str:
    """What a case launched, and what it should have launched but did not."""
    missing = {each.partition(":")[2] for each in kernels} - set(outcome.launched)
    parts = [", ".join(outcome.launched), *(f"**NOT {each}**" for each in sorted(missing))]
    return " ".join(filter(None, parts))


def control_verdict(outcome: Outcome, *, wrong: bool) -> str:
    """Whether the tool sees what it should."""
    if outcome.report is None or outcome.report.errors is None:
        return f"no verdict {outcome.note}".strip()
    reported = outcome.report.errors > 0
    if wrong:
        return f"reported ({outcome.report.verdict})" if reported else "**TOOL BLIND**"
    return f"false alarm ({outcome.report.verdict})" if reported else "silent, as it should be"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def races(outcome: Outcome) -> list[list[str]]:
    """A row for each pair of accesses that racecheck names."""
    assert outcome.report is not None
    found = []
    for one, other in outcome.report.races:
        sides = [f"{each.kind} {each.place or each.function}: `{each.text or '?'}`"
                 for each in (one, other)]  # fmt: skip
        found.append([outcome.job.name, *sides])
    return found


def page_of(outcomes: Sequence[Outcome], names: Sequence[str], tools: Sequence[str]) -> str:
    """The page, without its head."""
    from bench.kernels.sanitize_cases import CASES  # noqa: PLC0415 - loads torch
    from bench.kernels.sanitize_controls import CONTROLS  # noqa: PLC0415

    by_job = {(each.job.tool, each.job.name): each for each in outcomes}
    columns = (PLAIN, *tools)
    parts = [
        "## Kernels",
        table(
            ("case", "values: error / allowed", *(f"{tool}: errors" for tool in tools), "launched"),
            (
                (
                    name,
                    *(cell(by_job.get((column, name))) for column in columns),
                    launches(by_job[PLAIN, name], CASES[name].kernels),
                )
                for name in names
            ),
        ),
        "## Controls: what the tools can see",
        table(
            ("tool", "kernel", "wrong?", "verdict", "first words"),
            (
                (
                    each.job.tool,
                    each.job.name,
                    "yes" if CONTROLS[each.job.name].wrong else "no",
                    control_verdict(each, wrong=CONTROLS[each.job.name].wrong),
                    each.report.first if each.report else "",
                )
                for each in outcomes
                if each.job.control
            ),
        ),
    ]
    alarmed = [each for each in outcomes if each.job.tool == "racecheck" and each.report is not None
               and each.report.errors]  # fmt: skip
    if alarmed:
        parts += [
            "## Hazards of shared memory",
            table(
                ("case", "kinds", "bytes of shared memory", "all in the dispatch?"),
                (
                    (
                        each.job.name,
                        ", ".join(f"{n} {kind}" for kind, n in each.report.kinds.items()),
                        spans(each.report.addresses),
                        "yes" if each.report.only_dispatch else "no",
                    )
                    for each in alarmed
                    if each.report is not None
                ),
            ),
            table(("case", "one access", "other access"), (row for each in alarmed
                                                           for row in races(each))),
        ]  # fmt: skip
    stress = [each for each in outcomes if each.job.tool == STRESS]
    parts += [f"## Results handed from block to block\n\n```\n{each.note}\n```" for each in stress]
    return "\n\n".join([*parts, NOTES])


def logs(outcomes: Sequence[Outcome]) -> str:
    """The first lines of what reports something, or failed."""
    parts = []
    for each in outcomes:
        clean = each.report is not None and each.report.errors == 0
        if (each.job.tool in TOOLS and not clean) or each.note:
            head = "\n".join(each.log.splitlines()[:LOG_LINES])
            parts.append(f"##### {each.job.tool} {each.job.name} {each.note[:80]}\n{head}\n")
    return "\n".join(parts)


def main() -> None:
    """Runs all, or one child."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--name", default="sanitizer", help="of the files written")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--cases", default="", help="those whose names contain this")
    parser.add_argument("--only", default="", help="tools, `tool:part of a case`, stress")
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--at-once", type=int, default=max(2, min(14, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--launches", type=int, default=2000, help="of the stress")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--child", default="")
    parser.add_argument("--control", action="store_true")
    options = parser.parse_args()
    if options.child:
        child(options.child, control=options.control, device_name=options.device)
        return
    from bench.kernels.attention_peers import environment  # noqa: PLC0415 - loads torch
    from bench.kernels.sanitize_cases import CASES  # noqa: PLC0415
    from bench.kernels.sanitize_controls import CONTROLS  # noqa: PLC0415

    deadline = time.monotonic() + options.seconds
    tools = [each for each in options.tools.split(",") if each]
    names = [each for each in CASES if options.cases in each]
    wanted = chosen(options.only, tools, names)
    tools = [each for each in tools if any(job.tool == each for job in wanted)]
    names = [each for each in names if any(job.name == each for job in wanted)]
    if options.device != "cuda":
        names = [each for each in names if not CASES[each].hopper]
    shared = {"deadline": deadline, "device": options.device, "at_once": options.at_once}
    outcomes = all_of([Job(tool=PLAIN, name=each) for each in names], limit_s=WARM_S, **shared)
    jobs = [
        Job(tool=tool, name=name, control=True)
        for tool in tools
        for name, each in CONTROLS.items()
        if each.tool == tool
    ]
    if not options.only or STRESS in options.only.split(","):
        jobs += [Job(tool=STRESS, name=str(options.launches))]
    jobs += [job for job in wanted if job.name in names]
    outcomes += all_of(jobs, limit_s=CHILD_S, **shared)
    options.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(
        ["# Kernels under compute-sanitizer", "", "```", *environment(), "```", "",
         page_of(outcomes, names, tools)]
    )  # fmt: skip
    (options.out / f"{options.name}.md").write_text(text)
    (options.out / f"{options.name}_logs.txt").write_text(logs(outcomes))
    with (options.out / f"{options.name}.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(
            ["tool", "case", "control", "errors", "warnings", "share", "seconds", "note"]
        )
        for each in outcomes:
            report = each.report
            lines.writerow([each.job.tool, each.job.name, each.job.control,
                            report.errors if report else "", report.warnings if report else "",
                            each.share, round(each.seconds, 1),
                            each.note if each.job.tool != STRESS else ""])  # fmt: skip
    print(text)


if __name__ == "__main__":
    main()

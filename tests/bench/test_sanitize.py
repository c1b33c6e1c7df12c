"""The run of compute-sanitizer over all kernels: what it covers, and how it reads the logs."""

import re
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.kernels import sanitize
from bench.kernels.sanitize_cases import CASES
from bench.kernels.sanitize_controls import CONTROLS
from bench.kernels.sanitize_logs import Access, Report, access, read, spans

ROOT = Path(__file__).resolve().parents[2]
KERNEL = re.compile(r"^@(?:triton|gluon)\.jit.*\ndef (\w+_kernel)\(", re.MULTILINE)
SLOW = {"attention fp8", "attention one list, portable", "attention chunks, portable"}
"""Seconds in the interpreter; tests/codegen has the like."""


def kernels_of_the_tree() -> set[str]:
    """`folder/file:function` of every kernel in a file of ours that is not generated on demand."""
    folder = ROOT / "codegen/kernels"
    files = {path: path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py")}
    return {
        f"{name.as_posix()}:{kernel}"
        for path, name in files.items()
        for kernel in KERNEL.findall(path.read_text())
    }


def test_every_kernel_of_the_tree_is_in_a_case():
    assert len(kernels_of_the_tree()) > 10
    assert {each for case in CASES.values() for each in case.kernels} == kernels_of_the_tree()


@pytest.mark.parametrize("name", [name for name, case in CASES.items()
                                  if not case.hopper and name not in SLOW])  # fmt: skip
def test_cases_are_right_in_the_interpreter(name):
    assert CASES[name].run(torch.device("cpu")) <= 1


def test_each_tool_has_a_kernel_that_it_has_to_report():
    assert {each.tool for each in CONTROLS.values() if each.wrong} == set(sanitize.TOOLS)


OUT_OF_BOUNDS = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 8 bytes
=========     at copy_kernel+0x80 in sanitize_controls.py:33
========= ERROR SUMMARY: 63 errors
"""


def raced(tmp_path: Path) -> str:
    """A log of two races, one of which has a side in a line of a kernel's own."""
    file = tmp_path / "kernel.py"
    file.write_text("    gl.warp_specialize(\n    buffer.store(x)\n")
    return f"""\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at attend+0x470 in {file}:1
=========     and Read access at attend+0x9a0 in {file}:1 [8 hazards]
=========
========= Error: Race reported between Write access at attend+0x480 in {file}:2
=========     and Read access at attend+0x9a0 in {file}:1 [1 hazards]
=========
========= Error: Potential RAW hazard detected at __shared__ 0x2851c in block (0,0,0) :
=========     Write Thread (0,0,0) at attend+0x470 in {file}:1
========= Error: Potential WAR hazard detected at __shared__ 0x2851d in block (0,0,0) :
========= RACECHECK SUMMARY: 4 hazards displayed (3 errors, 1 warnings)
"""


def test_errors_and_the_first_words_are_read():
    report = read(OUT_OF_BOUNDS)
    assert report.errors == 63
    assert report.first == "Invalid __global__ write of size 8 bytes"
    assert report.verdict == "63"


def test_races_are_read_with_their_places_and_the_lines_there(tmp_path):
    report = read(raced(tmp_path))
    assert (report.errors, report.warnings, report.verdict) == (4, 1, "4 (1 warnings)")
    assert report.kinds == {"RAW": 1, "WAR": 1}
    assert spans(report.addresses) == "0x2851c-0x2851d"
    (first, _), (own, _) = report.races
    assert first == Access(
        kind="Write", function="attend", place="kernel.py:1", text="gl.warp_specialize("
    )
    assert own.text == "buffer.store(x)"
    assert not report.only_dispatch


def test_races_between_lines_of_the_dispatch_alone_are_told_apart(tmp_path):
    log = raced(tmp_path)
    file = tmp_path / "kernel.py"
    assert read(log.replace(f"{file}:2", f"{file}:1")).only_dispatch
    unknown = read(log.replace(f"{file}:2", f"{file}.gone.py:1"))
    assert not unknown.only_dispatch  # a place that cannot be read proves nothing


def test_a_place_without_its_folders_is_found_by_the_kernel_in_it():
    text = (ROOT / "codegen/kernels/linear/gluon.py").read_text().splitlines()
    number = next(at for at, line in enumerate(text, 1) if line.strip() == "gl.warp_specialize(")
    assert access("Read", f"stream_kernel+0x140 in gluon.py:{number}").text == "gl.warp_specialize("
    assert not access("Read", f"no_kernel+0x140 in gluon.py:{number}").text


def test_a_selection_names_tools_and_parts_of_cases():
    jobs = sanitize.chosen("memcheck,initcheck:rope,stress", sanitize.TOOLS, ("norms", "rope"))
    assert [(each.tool, each.name) for each in jobs] == [
        ("memcheck", "norms"), ("memcheck", "rope"), ("initcheck", "rope"),
    ]  # fmt: skip
    assert len(sanitize.chosen("", sanitize.TOOLS, ("norms", "rope"))) == 8


def test_a_log_without_a_summary_is_no_verdict_and_no_success():
    assert read("========= COMPUTE-SANITIZER\n").errors is None
    assert read("").verdict == "no verdict"


@pytest.mark.parametrize(
    ("errors", "wrong", "verdict"),
    [
        (3, True, "reported (3)"),
        (0, True, "**TOOL BLIND**"),
        (0, False, "silent, as it should be"),
        (2, False, "false alarm (2)"),
        (None, True, "no verdict"),
    ],
)
def test_what_a_tool_says_of_a_control_is_judged(errors, wrong, verdict):
    job = sanitize.Job(tool="racecheck", name="handover by nothing", control=True)
    outcome = sanitize.Outcome(job=job, seconds=1.0, report=Report(errors=errors))
    assert sanitize.control_verdict(outcome, wrong=wrong) == verdict


def test_a_process_that_does_not_end_is_ended_in_its_time():
    job = sanitize.Job(tool=sanitize.PLAIN, name="norms")
    began = time.monotonic()
    status, text = sanitize.finished(
        [sys.executable, "-c", "print('on', flush=True); import time; time.sleep(60)"], job, 2.0
    )
    assert (status, text) == (None, "on\n")
    assert time.monotonic() - began < 30


def test_a_machine_without_the_tool_gives_no_verdict(monkeypatch):
    monkeypatch.setattr(sanitize, "command", lambda job, log, **_: ["/nowhere/compute-sanitizer"])
    job = sanitize.Job(tool="memcheck", name="norms")
    outcome = sanitize.run(job, deadline=time.monotonic() + 20, device="cpu", limit_s=20)
    assert outcome.report is None
    assert "nowhere" in outcome.note
    assert "no verdict" in sanitize.cell(outcome)


def test_a_kernel_that_a_case_did_not_launch_shows():
    outcome = sanitize.Outcome(
        job=sanitize.Job(tool=sanitize.PLAIN, name="norms"), seconds=1.0, launched=("one_kernel",)
    )
    assert sanitize.launches(outcome, ("op/triton:one_kernel",)) == "one_kernel"
    assert sanitize.launches(outcome, ("op/triton:other_kernel",)) == (
        "one_kernel **NOT other_kernel**"
    )

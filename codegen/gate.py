"""The compile gate: every Triton kernel is compiled for sm_90, on any machine, and judged.

Triton brings its own ptxas and disassembler, so registers, spills and shared memory are known
without a GPU. What the gate rejects is never timed and never emitted into a bundle.

    python -m codegen.gate      prints the table; exit status 1 if anything is rejected
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from codegen.kernels import KERNELS, load_spec
from codegen.kernels.base import Compilation
from codegen.rowwise_library import sampled

SHARED_BYTES_MAX = 232_448
"""Shared memory of one block on sm_90 (CUDA programming guide, compute capability 9.0: 227 KB)."""
REGISTERS_OF_SM = 65_536
WGMMA_ROWS = 64
"""Tiles of at least so many rows have to use wgmma, a quarter of whose rate mma.sync reaches."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the compiler made of a kernel."""

    registers: int
    """Per thread."""
    spill_bytes: int
    shared_bytes: int
    warps: int
    wgmma: int
    """Matrix instructions of a warpgroup."""
    serialised: bool
    """ptxas waits after each wgmma."""
    wide_loads: int
    """Loads of 16 bytes a thread."""
    wrong_boxes: list[list[str]]
    """TMA boxes that differ from the buffer they are copied into."""
    buffers: int = 0
    """Tiles of an operand that the pipeline holds at once."""
    overlapped: int = 0
    """exp2 that each thread runs between the wait for one product and that for the next."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A kernel, its report unless it failed to compile, and why it is rejected, if it is."""

    op: str
    compilation: Compilation
    report: Report | None
    reasons: tuple[str, ...]

    @property
    def title(self) -> str:
        """Op and what sets this compilation apart."""
        constants = ", ".join(
            f"{name} {value}" for name, value in self.compilation.constants.items()
        )
        dtype = next(iter(self.compilation.types.values())).removeprefix("*")
        where = "" if self.compilation.module == "triton" else f"{self.compilation.module} "
        return f"{self.op} {where}{dtype} {constants}, {self.compilation.num_warps} warps"


def reasons_to_reject(report: Report, compilation: Compilation) -> tuple[str, ...]:
    """Why a kernel may not be used; empty for a good one."""
    threads = report.warps * 32
    warps = compilation.num_warps + compilation.specialised_warps
    rules = {
        f"shared memory {report.shared_bytes} > {SHARED_BYTES_MAX}": report.shared_bytes
        > SHARED_BYTES_MAX,
        f"spills {report.spill_bytes} bytes": report.spill_bytes > 0,
        f"{report.registers} registers x {threads} threads > {REGISTERS_OF_SM}": report.registers
        * threads
        > REGISTERS_OF_SM,
        "ptxas serialised wgmma": report.serialised,
        f"no wgmma at {compilation.tile_rows} rows": compilation.tile_rows >= WGMMA_ROWS
        and report.wgmma == 0,
        "no 16-byte loads": compilation.streams and report.wide_loads == 0,
        f"TMA boxes {report.wrong_boxes} are not their buffers": bool(report.wrong_boxes),
        f"{report.warps} warps instead of {warps}": report.warps != warps,
        f"{report.buffers} buffers instead of {compilation.buffers}": report.buffers
        < compilation.buffers,
        "no softmax under a matrix product": compilation.overlaps and report.overlapped == 0,
    }
    return tuple(reason for reason, hit in rules.items() if hit)


def check_kernels() -> tuple[Verdict, ...]:
    """Compiles every kernel of the registry, and what the generator makes of some other regions."""
    return judge(
        [
            *((op, each) for op in KERNELS for each in load_spec(op).compilations),
            *sampled(),
        ]
    )


def judge(wanted: Sequence[tuple[str, Compilation]]) -> tuple[Verdict, ...]:
    """Compiles (op, compilation) pairs in a child process; a failed compile is a rejection."""
    rows = []
    for op, each in wanted:
        row = asdict(each)
        folder = row.pop("folder") or op
        for name in ("tile_rows", "streams", "buffers", "specialised_warps", "overlaps"):
            del row[name]
        rows.append({"op": folder, **row})
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "codegen.gate_child"],
        input=json.dumps(rows),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    verdicts = []
    for at, (op, each) in enumerate(wanted):
        answer = answers[at] if at < len(answers) else {"error": _last_words(done.stderr)}
        if "error" in answer:
            reasons: tuple[str, ...] = (f"does not compile: {answer['error']}",)
            verdicts.append(Verdict(op=op, compilation=each, report=None, reasons=reasons))
            continue
        report = Report(**answer)
        reasons = reasons_to_reject(report, each)
        verdicts.append(Verdict(op=op, compilation=each, report=report, reasons=reasons))
    return tuple(verdicts)


def _last_words(stderr: str) -> str:
    lines = stderr.strip().splitlines()
    return f"the compiler ended the process: {lines[-1] if lines else 'no message'}"


def table(verdicts: tuple[Verdict, ...]) -> str:
    """The verdicts as text, one a line."""
    rows = [f"{'registers':>9} {'spills':>6} {'shared':>7} {'wgmma':>5} {'16 B loads':>10}  kernel"]
    for verdict in verdicts:
        report = verdict.report
        numbers = f"{'':41}" if report is None else (
            f"{report.registers:9} {report.spill_bytes:6} {report.shared_bytes:7} "
            f"{report.wgmma:5} {report.wide_loads:10}"
        )  # fmt: skip
        mark = f": REJECTED, {'; '.join(verdict.reasons)}" if verdict.reasons else ""
        rows.append(f"{numbers}  {verdict.title}{mark}")
    return "\n".join(rows)


def main() -> None:
    """Prints the table."""
    verdicts = check_kernels()
    print(table(verdicts))  # noqa: T201 - this is what the command is for
    if any(verdict.reasons for verdict in verdicts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

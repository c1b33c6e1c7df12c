"""medha-tune: tunes the kernels and profiles the device of this machine, for the planner's catalog.

Everything is said before it starts: what, on which device, how long at most. Results are files of
the catalog's own form below --out, tuned/<device>/<op>.yaml and profiles/<device>/<table>.csv;
--install copies them into the catalog, where the next plan finds them.
"""

import datetime as dt
import math
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli_tune_profile import fused, profiled, progress
from plans.errors import MedhaError, UsageError
from runtime.interrupts import INTERRUPTED, loading, started, unwinding

if TYPE_CHECKING:
    from codegen.tune import Outcome

DEFAULT_OUT = Path("medha-tuned")
LIMIT_S = 300.0

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def tune(
    *,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Tune the kernels' parameters.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Measure the terms of step times.")
    ] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")] = DEFAULT_OUT,
    install: Annotated[
        bool, typer.Option("--install", help="Copy the results into the planner's catalog.")
    ] = False,
    effort: Annotated[
        str, typer.Option(help="Of --kernels: none, quick or full; --dry-run explains them.")
    ] = "quick",
    op: Annotated[
        str, typer.Option(metavar="OP,...", help="Tune these ops only. [default: all]")
    ] = "",
    table: Annotated[
        str, typer.Option(metavar="NAME,...", help="Profile these tables only. [default: all]")
    ] = "",
    limit_s: Annotated[
        float, typer.Option(help="Seconds for --profile; what is left is measured the next time.")
    ] = LIMIT_S,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be done; needs no GPU.")
    ] = False,
) -> None:
    """Autotunes emitted kernels and profiles the device; both where no flag says which.

    --op is of the kernels and --table of the profile: one of them alone asks for its half alone.
    """
    try:
        ops, tables = _names("--op", op), _names("--table", table)
        kernels, profile = _parts(kernels, profile, ops, tables)
        with loading():
            from codegen.tune import EFFORTS

        if effort not in EFFORTS:
            raise UsageError(f"--effort {effort}: one of {', '.join(EFFORTS)}")
        if not 0 < limit_s < math.inf:
            raise UsageError(f"--limit-s {limit_s:g}: not a time above 0, such as {LIMIT_S:g}")
        _check_ops(ops)
        _check_tables(tables)
        if dry_run:
            _list(kernels, profile, effort, ops, tables)
            return
        device = _device()
        _check_writable(out, install=install)
        if kernels:
            _tune(device, out, effort, ops, install=install)
        if profile:
            profiled(device, out, tables, limit_s, install=install)
        if not install:
            print(f"not installed: {out} holds the files; --install copies them into the catalog")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _names(flag: str, text: str) -> list[str]:
    """Names of a list with commas; raises UsageError for one that is empty or stands twice."""
    found = [each.strip() for each in text.split(",")] if text else []
    for name in found:
        if not name or found.count(name) > 1:
            raise UsageError(f"{flag} {text}: {name!r} stands twice" if name else f"{flag} {text}")
    return found


def _parts(
    kernels: bool, profile: bool, ops: Sequence[str], tables: Sequence[str]
) -> tuple[bool, bool]:
    """Whether to tune kernels and whether to profile; raises UsageError for a flag of no use."""
    if not kernels and not profile:
        if ops and tables:
            raise UsageError(
                "--op is of the kernels, --table of the profile; nearest: one of them, or"
                " --kernels --profile with both"
            )
        return not tables, not ops
    if ops and not kernels:
        raise UsageError("--op is of --kernels, which --profile alone leaves out")
    if tables and not profile:
        raise UsageError("--table is of --profile, which --kernels alone leaves out")
    return kernels, profile


def _check_ops(ops: Sequence[str]) -> None:
    """Raises UsageError for an op that nothing of can be tuned, and the names of those that can."""
    from codegen.kernels import KERNELS
    from codegen.tune import jobs

    for name in ops:
        found, left = jobs([name])  # raises UnknownName
        if not found:
            tunable = sorted({job.op for job in jobs(tuple(KERNELS))[0]})
            why = left[0].partition(": ")[2] if left else "it has no tunables"
            raise UsageError(f"--op {name}: {why}; ops to tune: {', '.join(tunable)}")


def _check_tables(tables: Sequence[str]) -> None:
    from planner.profile import TABLES
    from plans.errors import UnknownName

    for name in tables:
        if name not in {*TABLES, "links"}:
            raise UnknownName("table", name, (*TABLES, "links"))


def _list(
    kernels: bool, profile: bool, effort: str, ops: Sequence[str], tables: Sequence[str]
) -> None:
    """What would be done, without a device."""
    from collections import Counter

    from codegen.tune import EFFORTS, jobs, space
    from planner.profile import TABLES, link_points, points

    if kernels:
        found, left = jobs(ops)
        for name, text in EFFORTS.items():
            print(f"--effort {name}: {text}{' (chosen)' if name == effort else ''}")
        for job in found:
            print(f"kernel {job.title}: {len(space(job))} candidates")
        for line in left:
            print(f"not tuned: {line}")
    if profile:
        chosen = [each for each in tables or TABLES if each != "links"]
        links = link_points(2) if not tables or "links" in tables else []
        wanted = [*points(chosen, fused=fused()), *links]
        counts = Counter((point.table, point.role) for point in wanted)
        for table in dict.fromkeys(point.table for point in wanted):
            fit, check = counts[table, "fit"], counts[table, "check"]
            where = "; only where there are 2 or more GPUs" if table == "links" else ""
            print(f"profile {table}: {fit} points, {check} more as checks{where}")


def _device() -> dict[str, str]:
    """This machine's device, in words that records carry; raises MedhaError where there is none."""
    from codegen.machine import machine
    from planner.profiles import catalog_device

    found = machine()
    if found is None:
        raise MedhaError(
            "no CUDA device is visible here; medha-tune measures the device it runs on;"
            " nearest: medha-tune --dry-run lists what it would do"
        )
    catalog = catalog_device(found.name, found.memory_bytes)
    if catalog is None:
        print(
            f"{found.name} is not in the catalog; planner/catalog/devices needs its YAML before a"
            " plan can use what is measured",
            file=sys.stderr,
        )
    return {
        "catalog": catalog or "-".join(found.name.lower().split()),
        "name": found.name,
        "capability": found.compute_capability,
        "driver": found.driver,
        "torch": found.torch,
        "triton": found.triton,
        "count": str(found.devices),
        "made": f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
        "command": shlex.join(["medha-tune", *_without_paths(sys.argv[1:])]),
    }


def _without_paths(argv: Sequence[str]) -> list[str]:
    """Flags as a record keeps them: where the results went says nothing about them."""
    found = list(argv)
    while "--out" in found:
        at = found.index("--out")
        del found[at : at + 2]
    return [each for each in found if not each.startswith("--out=")]


# --- kernels ------------------------------------------------------------------------------------


def _tune(
    device: dict[str, str], out: Path, effort: Any, ops: Sequence[str], *, install: bool
) -> None:
    from codegen.clock import GraphClock
    from codegen.machine import first_device
    from codegen.problems import rates, release
    from codegen.tune import Gate, jobs, run
    from planner.tuned import TUNED

    where = first_device()
    found, left = jobs(ops)
    for line in left:
        print(f"not tuned: {line}", file=sys.stderr)
    outcomes: list[Outcome] = []
    failed = []
    gate = Gate(workers=max((os.cpu_count() or 2) - 1, 1))
    folder = out / "tuned" / device["catalog"]
    with progress("kernels", len(found)) as moved:
        gate.prepare(found, effort)
        reached = rates(where.device)
        for job in found:
            moved(job.title)
            try:
                one = run(job, where, GraphClock(), effort=effort, rates=reached, gate=gate)
                outcomes.append(one)
                _write_records(folder, device, effort, [one])
            except (MedhaError, RuntimeError) as error:
                failed.append(f"{job.title}: {error}")
            release()
    for line in _kernel_lines(outcomes, reached):
        print(line)
    if install and outcomes:
        _install(folder, TUNED / device["catalog"])
    if failed:
        raise MedhaError("\n".join(("some kernels could not be tuned:", *failed)))


def _write_records(
    folder: Path, device: dict[str, str], effort: str, outcomes: "Sequence[Outcome]"
) -> None:
    """One file an op; buckets of other shapes in a file of the same source stay."""
    from codegen.tune import source_sha256
    from planner.tuned import load_records
    from plans.codec import dump_file
    from plans.tuned import Tuned

    folder.mkdir(parents=True, exist_ok=True)
    before = load_records(folder.name, folder.parent)
    for op in dict.fromkeys(each.job.op for each in outcomes):
        source = source_sha256(op)
        old = before.get(op)
        kept = old.buckets if old and old.source_sha256 == source else ()
        buckets = {(each.regime, tuple(sorted(each.when.items()))): each for each in kept}
        for each in outcomes:
            if each.job.op == op:
                when = tuple(sorted(each.bucket.when.items()))
                buckets[each.bucket.regime, when] = each.bucket
        record = Tuned(
            op=op,
            device=device["name"],
            compute_capability=device["capability"],
            driver=device["driver"],
            torch=device["torch"],
            triton=device["triton"],
            source_sha256=source,
            effort=effort,
            made=device["made"],
            command=device["command"],
            buckets=tuple(bucket for _, bucket in sorted(buckets.items())),
        )
        dump_file(folder / f"{op}.yaml", record)


def _kernel_lines(outcomes: "Sequence[Outcome]", rates: tuple[float, float]) -> list[str]:
    lines = [f"reached here: {rates[0] / 1e12:.0f} TFLOP/s, {rates[1] / 1e12:.2f} TB/s"]
    for each in outcomes:
        bucket = each.bucket
        gain = bucket.default_us / bucket.us
        share = bucket.floor_us / bucket.us
        params = ", ".join(f"{name}={value}" for name, value in bucket.params.items())
        lines.append(
            f"{each.job.title}: {bucket.us:.2f} us, {share:.0%} of the floor's rate,"
            f" {gain:.3f} x the default; {params}; {len(each.rejected)} rejected"
        )
    return lines


def _check_writable(out: Path, *, install: bool) -> None:
    """Raises UsageError before minutes of measuring whose results could not be written."""
    from planner.profiles import PROFILES
    from planner.tuned import TUNED

    installed = [("--install", PROFILES), ("--install", TUNED)] if install else []
    for flag, folder in (("--out", out), *installed):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UsageError(f"{flag}: {folder} cannot be written: {error.strerror}") from None


def _install(folder: Path, target: Path) -> None:
    """Copies files over the catalog's, each whole or not at all."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("[!.]*")):
        whole = target / f".{path.name}.tmp"
        shutil.copyfile(path, whole)
        whole.replace(target / path.name)
    print(f"installed {folder} as {target}")


def main() -> None:
    """Entry point: errors a user can meet become one message and their exit status."""
    try:
        with unwinding():
            app()
    except MedhaError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_status) from None


if __name__ == "__main__":
    started(lambda: main)

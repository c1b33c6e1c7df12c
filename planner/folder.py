"""Writes a bundle's folder whole or not at all, and its texts that need no compiler.

The files go to a hidden sibling, which is then renamed: whoever looks sees the old folder, none, or
the new one. An old bundle is moved aside first and removed only once the new one stands.
"""

import csv
import io
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from planner.found import Found
from planner.objective import score
from planner.space import degrees, gpus_text
from plans.errors import MedhaError, UsageError
from plans.plan import Plan

PLAN_FILE = "plan.yaml"
COLUMNS = (
    "rank",
    "candidate",
    "tp",
    "spp",
    "kvp",
    "replicas",
    "idle",
    "ttft_longest_s",
    "tbt_full_s",
    "capacity_rps",
    "bound_by",
    "score",
    "status",
    "constraint",
    "need",
    "have",
)


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Raises UsageError where the folder may not be written."""
    try:
        folder.lstat()
        if folder.is_dir() and not any(folder.iterdir()):
            return
    except FileNotFoundError:
        return
    except OSError as error:  # a name too long, a file among the parents, a folder of others
        raise UsageError(f"--out {folder}: {error.strerror}") from None
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder with --out")
    if not overwrite:
        raise UsageError(
            f"{folder} exists and is not empty; --overwrite replaces it, --out moves on"
        )
    if not (folder / PLAN_FILE).is_file():
        raise UsageError(
            f"{folder} holds no {PLAN_FILE}, so it is no bundle and is not replaced;"
            " name another --out"
        )


def check_inputs(folder: Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Raises UsageError where replacing the folder would remove what the plan is made from.

    inputs  by flag, a file, a checkpoint's folder, or a name of the catalog, which is neither
    """
    target = folder.resolve()
    for flag, given in inputs.items():
        if given is None:
            continue
        path = Path(given).expanduser()
        is_input = (path / "config.json").is_file() if path.is_dir() else path.is_file()
        if is_input and target in {path.resolve(), *path.resolve().parents}:
            raise UsageError(
                f"--out {folder}: {flag} {given} is in it and would be replaced; name another --out"
            )


def write_folder(folder: Path, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    """Writes all files, then puts the folder in place; leaves nothing behind when interrupted."""
    check_target(folder, overwrite=overwrite)
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror}") from error
    old = fresh.with_name(f"{fresh.name}-old")
    try:
        for name, content in files.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        fresh.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        check_target(folder, overwrite=overwrite)  # another run may have been faster
        if folder.is_symlink() or (overwrite and folder.exists() and any(folder.iterdir())):
            folder.rename(old)
        fresh.rename(folder)
    except OSError as error:
        raise MedhaError(f"{folder}: cannot be written: {error.strerror}") from error
    finally:
        if old.is_symlink() or old.exists():
            if folder.exists():
                old.unlink() if old.is_symlink() else shutil.rmtree(old)
            else:
                old.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def alternatives_csv(found: Found) -> bytes:
    """Ranked candidates, best first, then the rejected ones with what they broke."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for rank, (each, why) in enumerate(zip(found.ranked, found.verdicts, strict=True), start=1):
        p = each.candidate.parallelism
        numbers = (each.ttft_longest_s, each.tbt_full_s, each.capacity.rps)
        writer.writerow(
            (
                rank,
                each.candidate.label,
                *(p.tp, p.spp, p.kvp, p.replicas, p.idle),
                *(f"{number:.6g}" for number in numbers),
                each.capacity.bound_by,
                f"{score(each.world, each):.6g}",
                "chosen" if rank == 1 else "ranked",
                why,
                "",
                "",
            )
        )
    for row in found.ledger:
        blank = [""] * (COLUMNS.index("status") - 2)
        writer.writerow(("", row.label, *blank, "rejected", row.constraint, row.need, row.have))
    for cut in found.pruned:
        blank = [""] * (COLUMNS.index("status") - 2)
        label = f"{cut.label} ({cut.branches} shapes)"
        writer.writerow(("", label, *blank, "pruned", cut.reason, cut.best, cut.bound))
    return text.getvalue().encode()


def readme(
    plan: Plan, commands: tuple[str, ...], *, program: bool, engine: str | None = None
) -> bytes:
    """What the bundle is, the command that made it, and the commands that run it in this folder."""
    p = plan.parallelism
    idle = f" + {p.idle} idle" if p.idle else ""
    notes = "".join(f"- {note}\n" for note in plan.predicted.notes)
    runs = "".join(f"    {command}\n" for command in commands)
    compiled = (
        "`program/` holds the lowered program of each stage and its kernels, as plain Python."
    )
    if not program:
        why = " and ".join(plan.model.unsupported)
        made = f"{why} cannot be run yet" if why else "this plan was made with --no-kernels"
        compiled = f"There is no program: {made}. The plan can be simulated."
    if engine is not None:
        compiled += (
            f"\n`launch/` starts it with {engine}: `run_<node>.sh` on each node of the plan."
        )
    return f"""# {plan.name}

{gpus_text(plan.topology.devices)} = {degrees(p)}{idle}, for {plan.model.name}
with up to {plan.limits.context_tokens} tokens of context on {plan.topology.device}.

`plan.yaml` is the plan; `report.html` shows it, and why, to a browser; `alternatives.csv` lists
every candidate, ranked, rejected or left out by a bound, and why.
{compiled}

Predicted times are by {plan.step_time.source}, give or take {plan.predicted.error_band:.0%}.

{notes}
Made by

    {plan.made_by.command}

Run it, in this folder:

{runs}""".encode()

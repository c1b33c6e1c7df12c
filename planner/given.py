"""A plan that was given: what is refused in it, what is only stale, and the program beside it."""

from pathlib import Path

from planner.folder import PLAN_FILE
from plans.check import Failure, failures
from plans.check_program import program_problems, read_program
from plans.codec import load_file
from plans.errors import BundleMismatch, InvalidFile
from plans.plan import Plan

DERIVED = ("chunk-seconds", "predicted", "predicted-bounds", "replay")
"""Checks of numbers that an evaluation makes anew."""
LISTED_MAX = 20


def load_given(path: Path) -> tuple[Plan, Path]:
    """Plan of a file or of a bundle's folder, and the file.

    Raises InvalidFile for whatever no new prediction can repair: everything but predicted numbers.
    """
    where = path / PLAN_FILE if path.is_dir() else path
    given = load_file(where, Plan)
    found = [each for each in failures(given) if each.name not in DERIVED]
    if found:
        first, *rest = found
        more = "".join(f"\n{where}: {each.path}: {each.message}" for each in rest)
        raise InvalidFile(str(where), first.path, f"{first.message} [check {first.name}]{more}")
    return given, where


def stale(given: Plan) -> list[Failure]:
    """Predicted numbers for which the other commands refuse the file as it is."""
    return [each for each in failures(given) if each.name in DERIVED]


def has_program(given: Plan, where: Path) -> bool:
    """Whether the plan's program is beside it, each file as planned and made for this plan.

    False where none of its files is there: a plan may be looked at alone. Raises BundleMismatch for
    a program that is not whole, was changed, or was made for another plan.
    """
    folder = where.parent
    if not any((folder / name).exists() for name in given.files):
        return False
    contents, problems = read_program(folder, given.files)
    problems = problems or list(program_problems(given, contents))
    if problems:
        lines = "".join(f"\n  {each}" for each in problems[:LISTED_MAX])
        if len(problems) > LISTED_MAX:
            lines += f"\n  ... and {len(problems) - LISTED_MAX} more"
        raise BundleMismatch(
            f"{where}: the program beside it is not that of this plan:{lines}\n"
            "make the bundle again, or evaluate the plan alone: a copy in another folder"
        )
    return True

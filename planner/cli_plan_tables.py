"""How medha-plan lays out what planner/explain.py says: prose, tables and commands."""

from pathlib import Path
from typing import TYPE_CHECKING

from planner import explain
from planner.given import stale

if TYPE_CHECKING:
    from planner.explain import Table
    from planner.found import Found
    from plans.plan import Plan


def print_found(
    plan: "Plan", found: "Found", folder: Path, commands: tuple[str, ...], top: int
) -> None:
    """The answer to a search."""
    say(explain.arithmetic(plan), f"best by: {found.objective}", "")
    _draw(explain.ranking(found, plan.limits.context_tokens, top))
    say(explain.LEGEND, "")
    _draw(explain.replayed(found))
    say("", *(f"- {sentence}" for sentence in found.why), "")
    _draw(explain.schedule(plan))
    say("", *explain.facts(plan), *explain.sensitivity_lines(found))
    say(explain.rejected_line(found), "")
    say(f"bundle: {folder}")
    listed(commands)


def print_evaluated(
    given: "Plan", plan: "Plan", commands: tuple[str, ...], *, program: bool
) -> None:
    """A plan that was given, evaluated.

    program  whether its program is beside it
    """
    say(explain.arithmetic(plan), "")
    _draw(explain.times(plan))
    say("")
    _draw(explain.schedule(plan))
    say("")
    _draw(explain.replay_of(plan))
    say("", *explain.facts(plan))
    wrong = stale(given)
    others = [each for each in wrong if each.name != "chunk-seconds"]
    if len(others) < len(wrong) or given.prefill != plan.prefill:
        field = "prefill.chunks[].predicted_s"
        say(f"{field} in the file is not what step_time gives; the times above are")
    if others:
        say(*(f"{each.path} in the file: {each.message}" for each in others))
        say("not valid as it stands: medha-sim and medha-run refuse it; the numbers above are new")
    elif given.prefill == plan.prefill:
        alone = given.files and not program
        say(
            "valid: every check of the plan passes; its program is not beside it"
            if alone
            else "valid: every check passes"
        )
    say("")
    listed(commands)


def listed(commands: tuple[str, ...]) -> None:
    """One a line and never wrapped, so that they can be pasted."""
    for command in commands:
        print(command)


def say(*lines: str) -> None:
    """Prose, wrapped at words to the terminal's width (80 columns in a pipe)."""
    from rich.console import Console

    for line in lines:
        Console(highlight=False, markup=False, emoji=False).print(line)


def _draw(table: "Table") -> None:
    from rich.console import Console
    from rich.table import Table as Grid

    grid = Grid(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in table.columns:
        grid.add_column(column, justify="left" if column in {"memory", "bound by"} else "right")
    for row in table.rows:
        grid.add_row(*row)
    Console(highlight=False, markup=False, emoji=False).print(grid)

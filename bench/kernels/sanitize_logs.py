"""What compute-sanitizer wrote, as numbers and places; needs no GPU.

Two forms of racecheck's report are read: hazards one by one (a kind, an address, two threads), and
its summary of them by pairs of instructions.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

ERRORS = re.compile(r"ERROR SUMMARY: (\d+) error")
HAZARDS = re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warn")
HAZARD = re.compile(r"Potential (\w+) hazard detected at __shared__ (0x[0-9a-fA-F]+)")
PAIR = re.compile(r"Race reported between (\w+) access at (.*)")
OTHER = re.compile(r"and (\w+) access at (.*)")
PLACE = re.compile(r"([\w.<>/-]+\.py):(\d+)")
FUNCTION = re.compile(r"([A-Za-z_]\w*)\+0x[0-9a-fA-F]+")
SOURCES = tuple(Path(__file__).resolve().parents[2] / each for each in ("codegen", "bench/kernels"))
"""Where the files of our kernels are: the tool gives a name without its folders."""
FIRST = re.compile(r"=========\s+(?:Error: |Warning: )?((?:Invalid|Uninitialized|Barrier|Divergent|"
                   r"Program hit|Potential|Race).*)")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Access:
    """One side of a race."""

    kind: str
    function: str
    place: str
    """file:line, or nothing where the tool gives none."""
    text: str = ""
    """The line itself."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A log, read."""

    errors: int | None
    """Errors, or for racecheck hazards displayed; None where no summary was reached."""
    warnings: int = 0
    first: str = ""
    """The first thing reported, in the tool's words."""
    kinds: Counter[str] = field(default_factory=Counter)
    addresses: tuple[int, ...] = ()
    """Of shared memory, each once, in order."""
    races: tuple[tuple[Access, Access], ...] = ()

    @property
    def verdict(self) -> str:
        """For a table."""
        if self.errors is None:
            return "no verdict"
        return f"{self.errors} ({self.warnings} warnings)" if self.warnings else str(self.errors)

    @property
    def only_dispatch(self) -> bool:
        """Whether every race has both sides in what Triton makes of `warp_specialize`.

        The compiler has no line of ours for the dispatch, and gives it that of the call or of the
        kernel's head.
        """
        sides = [side for pair in self.races for side in pair]
        return bool(sides) and all(
            side.text.startswith(("gl.warp_specialize", "def ", "@gluon.jit")) for side in sides
        )


def source(name: str, function: str) -> Path | None:
    """The file of that name; the one of ours with that function where it has no folders."""
    if Path(name).is_file():
        return Path(name)
    found = [path for folder in SOURCES for path in folder.rglob(Path(name).name)
             if f"def {function}(" in path.read_text()]  # fmt: skip
    return found[0] if len(found) == 1 else None


def access(kind: str, where: str) -> Access:
    """From `function+0x10 in /path/file.py:12`, and the text of that line if the file is here."""
    place, function = PLACE.search(where), FUNCTION.search(where)
    text = ""
    file = source(place[1], function[1] if function else "") if place else None
    if place is not None and file is not None:
        lines = file.read_text().splitlines()
        text = lines[int(place[2]) - 1].strip() if 0 < int(place[2]) <= len(lines) else ""
    return Access(
        kind=kind,
        function=function[1] if function else "",
        place=f"{Path(place[1]).name}:{place[2]}" if place else "",
        text=text,
    )


def read(log: str) -> Report:
    """The report of one process under one tool."""
    hazards, errors = HAZARDS.search(log), ERRORS.search(log)
    first = FIRST.search(log)
    found = HAZARD.findall(log)
    races = []
    for line, following in pairwise([*log.splitlines(), ""]):
        one, other = PAIR.search(line), OTHER.search(following)
        if one and other:
            races.append((access(one[1], one[2]), access(other[1], other[2])))
    count = warnings = None
    if hazards is not None:
        count, warnings = int(hazards[1]), int(hazards[3])
    elif errors is not None:
        count = int(errors[1])
    return Report(
        errors=count,
        warnings=warnings or 0,
        first=first[1].strip() if first else "",
        kinds=Counter(kind for kind, _ in found),
        addresses=tuple(sorted({int(address, 16) for _, address in found})),
        races=tuple(dict.fromkeys(races)),
    )


def spans(addresses: tuple[int, ...]) -> str:
    """Addresses as ranges of bytes."""
    ranges: list[list[int]] = []
    for each in addresses:
        if ranges and each <= ranges[-1][1] + 1:
            ranges[-1][1] = each
        else:
            ranges.append([each, each])
    return ", ".join(f"{low:#x}" if low == high else f"{low:#x}-{high:#x}" for low, high in ranges)

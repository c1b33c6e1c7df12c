"""The part of medha-tune that profiles: what is measured where, merged into what is there already.

Tables of one device come from codegen/meter.py, links between devices from codegen/links.py.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from plans.errors import MedhaError, UsageError

if TYPE_CHECKING:
    from planner.profile import Point, Taken
    from planner.profiles import About

LINKS_S = 30.0
"""Least time for links, whatever the other tables took."""
HEAT_S = 0.1
"""Of work before what power limits is timed."""


@contextmanager
def progress(what: str, count: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; the function moves it on and says what comes."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=count)

        def moved(text: str) -> None:
            progress.update(task, advance=1, description=text)

        yield moved


def profiled(
    device: dict[str, str], out: Path, tables: Sequence[str], limit_s: float, *, install: bool
) -> None:
    """Measures tables, all where none are named, into a folder below `out`; says what it did."""
    from codegen.clock import GraphClock
    from codegen.machine import first_device
    from codegen.meter import Meter
    from codegen.problems import release
    from planner.profile import TABLES, points, take

    folder = out / "profiles" / device["catalog"]
    about = _about(device, folder, tables)
    count, ends_s = int(device["count"]), time.monotonic() + limit_s
    wanted = points([each for each in tables or TABLES if each != "links"], fused=fused())
    if not wanted:
        if count < 2:
            raise MedhaError(
                "links are measured between two or more CUDA devices and one is visible here;"
                " nearest: medha-tune --profile measures this one"
            )
        _links(folder, about, count, limit_s)
        _end(folder, device["catalog"], install=install)
        return
    meter = Meter(
        first_device(),
        GraphClock(rounds=7, most_s=0.1),
        GraphClock(rounds=7, most_s=0.1, heat_s=HEAT_S),
    )

    def measure(point: "Point") -> tuple[float, float]:
        timing = meter(point.table, point.named())
        return timing.us, timing.spread_us

    print(f"{len(wanted)} points on {device['name']}, at most {limit_s:.0f} s", file=sys.stderr)
    with progress("profile", len(wanted)) as moved:
        taken = take(
            wanted,
            measure,
            folder,
            about,
            limit_s=limit_s,
            note=lambda point: moved(f"{point.table} {point.key}"),
        )
    release()
    _say("profile", taken)
    if count > 1 and (not tables or "links" in tables):
        _links(folder, about, count, max(ends_s - time.monotonic(), LINKS_S))
    elif "links" in tables:
        print("links: not measured, one CUDA device is visible here", file=sys.stderr)
    _end(folder, device["catalog"], install=install)


def _end(folder: Path, catalog: str, *, install: bool) -> None:
    """What the folder holds, and into the catalog with it where that was asked for."""
    from planner.profiles import PROFILES, install_profile, read_profile

    for line in read_profile(folder).ranges():
        print(line)
    if install:
        for line in install_profile(folder, PROFILES / catalog):
            print(line)


def fused() -> tuple[str, ...]:
    """Products with an epilogue that codegen has today."""
    from codegen.kernels import KERNELS
    from planner.profile import FUSED

    return tuple(op for op in FUSED if op in KERNELS)


def _about(device: dict[str, str], folder: Path, tables: Sequence[str]) -> "About":
    """What the profile is measured on; raises UsageError where the folder is of something else.

    Links know no kernels and no one device's software: measured into an older profile they carry
    their own words, and the rest of it stays as it is.
    """
    from codegen.kernels import KERNELS, load_spec
    from codegen.tune import source_sha256
    from planner.profiles import ABOUT, About, said_of
    from plans.codec import load_file

    about = About(
        device=device["name"],
        driver=device["driver"],
        torch=device["torch"],
        triton=device["triton"],
        made=device["made"],
        command=device["command"],
        kernels={op: source_sha256(op) for op in KERNELS if load_spec(op).params},
    )
    if not (folder / ABOUT).exists():
        return about
    before = load_file(folder / ABOUT, About)
    links = set(tables) == {"links"}
    for field in ("device",) if links else ("device", "torch", "triton", "kernels"):
        if getattr(before, field) != getattr(about, field):
            raise UsageError(
                f"{folder} holds a profile of another {field}; nearest: --out with a new folder"
            )
    if links:
        return structs.replace(before, sources=before.sources | {"links": said_of(about)})
    return about


def _links(folder: Path, about: "About", devices: int, limit_s: float) -> None:
    from codegen.links import measure_links
    from planner.profile import Point, link_points, take

    counts = sorted({2, devices})
    print(f"links between {counts} devices, at most {limit_s:.0f} s", file=sys.stderr)
    ends_s = time.monotonic() + limit_s
    wanted: list[Point] = []
    found: dict[tuple[int, str, int], Any] = {}
    for at, count in enumerate(counts):
        mine = [each for each in link_points(count) if each.key[1] == count]
        wanted += mine
        share_s = max(ends_s - time.monotonic(), 1.0) / (len(counts) - at)
        rows = [(str(each.key[0]), int(each.key[2])) for each in mine]
        for (op, size), timing in measure_links(rows, count, limit_s=share_s).items():
            found[count, op, size] = timing

    def measure(point: "Point") -> tuple[float, float]:
        op, count, size = point.key
        timing = found[int(count), str(op), int(size)]
        return timing.us, timing.spread_us

    there = [each for each in wanted if (int(each.key[1]), each.key[0], each.key[2]) in found]
    taken = take(there, measure, folder, about, limit_s=math.inf)
    _say("links", dataclasses.replace(taken, left=len(wanted) - len(there)))


def _say(what: str, taken: "Taken") -> None:
    print(f"{what}: {taken.measured} measured, {taken.kept} there already", file=sys.stderr)
    for line in taken.failed:
        print(f"failed: {line}", file=sys.stderr)
    if taken.left:
        print(
            f"{taken.left} points left for lack of time: the same command goes on", file=sys.stderr
        )

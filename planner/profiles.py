"""Measured times of a device: small CSV files in catalog/profiles/<device>, one a kind of op.

A row is one measurement: its key, its role, the median in microseconds and the spread of the middle
three fifths of the rounds. Rows of role `check` lie between the others or on other shapes; no fit
ever sees them, so that what a fit makes of them is its error (planner/fits.py).

    gemm               op n k tokens                          a matrix product, weights not in L2
    rows               op width tokens                        a row-wise op; width of one token
    attention_chunk    heads kv_heads head_dim tokens prefix  one chunk behind a prefix
    attention_decode   heads kv_heads head_dim batch keys     decodes of so many keys each
    sampling           vocab rows                             greedy tokens from logits
    links              op devices bytes                       a collective, bytes that a rank gives
    fused              op devices width tokens                a collective and an op in one launch
    copy               bytes                                  device to device
    ranks              what devices                           what a replica of several ranks adds
    step               what                                   parts of the host's time

`medha-tune --profile` writes them; a device without a folder is priced by its data sheet. `fused`
and `ranks` are made from what benches of several GPUs write (bench/kernels/all_reduce_rates.py,
bench/parallel_gpus.py); the profile's `sources` say which.
"""

import csv
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from msgspec import Struct, structs

from planner.catalog import CATALOG, load_device, name_key, names
from plans.codec import dump_file, load_file
from plans.errors import InvalidFile, UsageError

PROFILES = CATALOG / "profiles"
ABOUT = "about.yaml"

Key = tuple[int | str, ...]
Role = Literal["fit", "check"]
KEYS: dict[str, tuple[str, ...]] = {
    "attention_chunk": ("heads", "kv_heads", "head_dim", "tokens", "prefix"),
    "attention_decode": ("heads", "kv_heads", "head_dim", "batch", "keys"),
    "copy": ("bytes",),
    "fused": ("op", "devices", "width", "tokens"),
    "gemm": ("op", "n", "k", "tokens"),
    "links": ("op", "devices", "bytes"),
    "ranks": ("what", "devices"),
    "rows": ("op", "width", "tokens"),
    "sampling": ("vocab", "rows"),
    "step": ("what",),
}
NAMES: dict[str, tuple[str, ...]] = {
    "fused": ("all_reduce_add_rms_norm",),
    "gemm": ("gate_up_silu", "linear", "qkv_rope_write"),
    "links": ("all_gather", "all_reduce", "all_to_all", "send_recv"),
    "ranks": ("merge", "round_trip"),
    "rows": ("add_rms_norm", "kv_write", "rms_norm", "rope", "silu_mul"),
    "step": (
        *("chunk_list", "decode_list", "eager add_rms_norm", "eager linear"),
        *("eager paged_attention", "graph_launch", "host_step"),
    ),
}
"""What the first column of a table may hold: all that the planner reads."""
HEATED = ("gemm",)
"""Tables whose times `hot` of about.yaml multiplies."""
TEXTS = ("op", "what")
"""Columns that are no numbers."""
VALUES = ("role", "us", "spread_us")


class About(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a profile was measured on."""

    device: str
    """As torch names it."""
    driver: str
    torch: str
    triton: str
    made: str
    """Day, UTC."""
    command: str
    sources: dict[str, str] = {}
    """Tables that come from elsewhere, and from where."""
    kernels: dict[str, str] = {}
    """sha256 of the sources of each op of ours that was measured."""
    hot: dict[str, float] = {}
    """By table, what times bound by products are multiplied with: 1 where the table is absent. Only
    for tables measured before clocks heated the chip, as a power limit slows it within a tenth of a
    second; `sources` says how the factor was found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measurement."""

    key: Key
    role: Role
    us: float
    spread_us: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """All that was measured on one device."""

    folder: Path
    about: About
    tables: dict[str, tuple[Row, ...]]
    """By name; a table that was not measured is absent."""

    def rows(self, table: str, role: Role | None = "fit") -> tuple[Row, ...]:
        """Rows of a table with a role, or of both."""
        return tuple(each for each in self.tables.get(table, ()) if role in {None, each.role})

    def step_us(self, what: str) -> float | None:
        """One part of the host's time."""
        return next((each.us for each in self.rows("step") if each.key == (what,)), None)

    def gaps(self) -> list[str]:
        """Parts of a step that the profile has no time of although it has others; a line, or none.

        What is not there counts nothing, so a plan has to say it.
        """
        missing = sorted(set(NAMES["step"]) - {str(row.key[0]) for row in self.rows("step")})
        if not missing or not self.rows("step"):
            return []
        return [f"{self.folder.name}/step.csv has no {', '.join(missing)}: no time is counted"]

    def ranges(self) -> list[str]:
        """What each table covers, a line each."""
        return [f"{name}: {range_text(name, rows)}" for name, rows in sorted(self.tables.items())]


def range_text(table: str, rows: Iterable[Row]) -> str:
    """Number of rows and the range of each column."""
    rows = list(rows)
    columns = []
    for at, name in enumerate(KEYS[table]):
        values = sorted(
            {row.key[at] for row in rows}, key=lambda each: (isinstance(each, str), each)
        )
        if name in TEXTS:
            columns.append(f"{name} {', '.join(map(str, values))}")
        else:
            columns.append(f"{name} {values[0]}" + (f" to {values[-1]}" if len(values) > 1 else ""))
    checks = sum(row.role == "check" for row in rows)
    return f"{len(rows)} rows ({checks} kept for checks); {'; '.join(columns)}"


@cache
def load_profile(device: str) -> Profile | None:
    """The profile of a device of the catalog, or None where it was never measured."""
    folder = PROFILES / device
    if not folder.is_dir():
        return None
    profile = read_profile(folder)
    if not _is_of(device, profile.about.device):
        problem = f"{profile.about.device!r} is not {device}, in whose folder it stands"
        raise InvalidFile(str(folder / ABOUT), "device", problem)
    return profile


def _is_of(device: str, torch_name: str) -> bool:
    """Whether a device of the catalog may be what torch names so."""
    known = {
        each: {name_key(text) for text in (each, *load_device(each).aliases)}
        for each in names("devices")
    }
    exact = [each for each, spellings in known.items() if name_key(torch_name) in spellings]
    words = {name_key(word) for word in re.split(r"[^A-Za-z0-9]+", torch_name)}
    return device in exact if exact else bool(known.get(device, set()) & words)


def _check_hot(path: Path, about: About) -> None:
    """Raises InvalidFile for a factor that would change nothing, or nothing a chip can do."""
    for table, factor in about.hot.items():
        if table not in HEATED:
            problem = f"no factor is used for this table; known: {', '.join(HEATED)}"
            raise InvalidFile(str(path), f"hot.{table}", problem)
        if not 1 <= factor < float("inf"):
            problem = f"{factor:g}; heat makes nothing faster, so a factor is 1 or more"
            raise InvalidFile(str(path), f"hot.{table}", problem)


def read_profile(folder: Path) -> Profile:
    """The profile in a folder; raises InvalidFile that names the file for anything wrong in it."""
    about = load_file(folder / ABOUT, About)
    _check_hot(folder / ABOUT, about)
    tables = {}
    for path in sorted(folder.glob("*.csv")):
        if path.stem not in KEYS:
            raise InvalidFile(str(path), "", f"is no table; tables: {', '.join(sorted(KEYS))}")
        tables[path.stem] = read_table(path)
    if not tables:
        raise InvalidFile(str(folder), "", "holds no table; medha-tune --profile writes them")
    return Profile(folder=folder, about=about, tables=tables)


def read_table(path: Path) -> tuple[Row, ...]:
    """Rows of one CSV file, sorted by key; raises InvalidFile."""
    keys = KEYS[path.stem]
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidFile(str(path), "", f"is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InvalidFile(str(path), "", f"cannot be read: {error.strerror}") from None
    if not text.strip():
        raise InvalidFile(str(path), "", "is empty; medha-tune --profile writes it anew")
    if text.startswith("version https://git-lfs"):
        raise InvalidFile(str(path), "", "is a pointer of Git LFS, not the data")
    try:
        lines = list(csv.reader(text.splitlines()))
    except csv.Error as error:
        raise InvalidFile(str(path), "", f"is no CSV: {error}") from None
    if tuple(lines[0]) != (*keys, *VALUES):
        raise InvalidFile(
            str(path),
            "line 1",
            f"columns {', '.join(lines[0])}; must be {', '.join((*keys, *VALUES))}",
        )
    rows = [_row(path, number, keys, line) for number, line in enumerate(lines[1:], 2)]
    if not any(row.role == "fit" for row in rows):
        raise InvalidFile(str(path), "", "holds no row of role fit")
    seen: set[Key] = set()
    for number, row in enumerate(rows, 2):
        if row.key in seen:
            raise InvalidFile(str(path), f"line {number}", f"measures {row.key} again")
        seen.add(row.key)
    return tuple(sorted(rows, key=lambda row: tuple(map(_order, row.key))))


def _order(part: int | str) -> tuple[bool, int, str]:
    return (True, 0, part) if isinstance(part, str) else (False, part, "")


def _row(path: Path, number: int, keys: tuple[str, ...], line: list[str]) -> Row:
    where = f"line {number}"
    if len(line) != len(keys) + len(VALUES):
        raise InvalidFile(
            str(path), where, f"{len(line)} columns instead of {len(keys) + len(VALUES)}"
        )
    key: list[int | str] = []
    for name, text in zip(keys, line, strict=False):
        if name in TEXTS:
            if text not in NAMES[path.stem]:
                raise InvalidFile(str(path), f"{where}: {name}", _unknown(text, NAMES[path.stem]))
            key.append(text)
        elif re.fullmatch(r"[1-9][0-9]{0,17}", text) or (name, text) == ("prefix", "0"):
            key.append(int(text))
        else:
            problem = f"{text[:40]!r} is no whole number from 1 to 1e18"
            raise InvalidFile(str(path), f"{where}: {name}", problem)
    role, us, spread_us = line[len(keys) :]
    if role not in {"fit", "check"}:
        raise InvalidFile(str(path), f"{where}: role", f"{role!r} is neither fit nor check")
    numbers = []
    for name, text in (("us", us), ("spread_us", spread_us)):
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not 0 <= value < float("inf") or (name == "us" and value == 0):
            raise InvalidFile(str(path), f"{where}: {name}", f"{text!r} is no time above 0")
        numbers.append(value)
    return Row(
        key=tuple(key),
        role="fit" if role == "fit" else "check",
        us=numbers[0],
        spread_us=numbers[1],
    )


def _unknown(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"nearest: {near[0]}; " if near else ""
    return f"{name[:40]!r} is no name that is read here; {hint}known: {', '.join(known)}"


def write_table(folder: Path, table: str, rows: Iterable[Row]) -> Path:
    """Writes a table sorted by key, over what was there; returns its path."""
    path = folder / f"{table}.csv"
    ordered = sorted(rows, key=lambda row: tuple(map(_order, row.key)))
    lines = [",".join((*KEYS[table], *VALUES))]
    lines += [
        ",".join((*map(str, row.key), row.role, f"{row.us:.6g}", f"{row.spread_us:.3g}"))
        for row in ordered
    ]
    whole = folder / f".{table}.csv.tmp"  # a reader, or a run cut short, sees no part of it
    whole.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return whole.replace(path)


def said_of(about: About) -> str:
    """Where a table of a run comes from, as the profile that it goes into keeps it."""
    return (
        f"made {about.made} by {about.command}, driver {about.driver}, torch {about.torch},"
        f" Triton {about.triton}"
    )


def install_profile(folder: Path, target: Path) -> list[str]:
    """Copies the tables of a folder over those of a profile; returns what was done, a line each.

    Tables that the folder does not have stay, and then each new one says in the profile's `sources`
    where it comes from. Raises InvalidFile for either, and UsageError for profiles of two devices.
    """
    new = read_profile(folder)
    about, stays = new.about, set[str]()
    if target.is_dir() and (target / ABOUT).exists():
        old = read_profile(target)
        stays = set(old.tables) - set(new.tables)
        if old.about.device != new.about.device:
            raise UsageError(f"{target} is of {old.about.device}, {folder} of {new.about.device}")
        if stays:
            about = merged(old.about, new)
    target.mkdir(parents=True, exist_ok=True)
    for table, rows in new.tables.items():
        write_table(target, table, rows)
    whole = target / f".{ABOUT}.tmp"
    dump_file(whole, about)
    whole.replace(target / ABOUT)
    lines = [f"installed {', '.join(sorted(new.tables))} of {folder} in {target}"]
    return [*lines, f"as they were: {', '.join(sorted(stays))}"] if stays else lines


def merged(old: About, new: Profile) -> About:
    """What a profile says of itself once the tables of another are in it."""
    ops = {str(row.key[0]) for table in ("gemm", "rows") for row in new.rows(table, None)}
    if any(table.startswith("attention") for table in new.tables):
        ops.add("paged_attention")
    measured = {op: sha for op, sha in new.about.kernels.items() if op in ops}
    return structs.replace(
        old,
        sources=old.sources
        | {table: new.about.sources.get(table, said_of(new.about)) for table in new.tables},
        kernels=old.kernels | measured,
        hot={table: factor for table, factor in old.hot.items() if table not in new.tables}
        | {table: new.about.hot[table] for table in new.tables if table in new.about.hot},
    )


def catalog_device(torch_name: str, memory_bytes: int) -> str | None:
    """The catalog's name of a device as torch names it, or None where there is none like it.

    An alias has to be a part of the name, and the memory has to agree within a tenth.
    """
    words = {name_key(word) for word in re.split(r"[^A-Za-z0-9]+", torch_name)}
    for name in names("devices"):
        device = load_device(name)
        spellings = {name_key(each) for each in (name, *device.aliases)}
        if spellings & words and abs(device.memory_bytes / memory_bytes - 1) < 0.1:
            return name
    return None

"""Reads request traces: CSV or JSON lines, plain or gzipped, in any of the usual column names.

A file holds rows (one request each, with or without arrivals) or a quantile table of lengths. Rows
become a `Trace`, a quantile table becomes a `Workload`; runtime/arrivals.py makes requests of
either. The archives of ServeGen are read by runtime/servegen.py.

The first row of COLUMNS whose length columns are all there decides how a file is read. Every rule
that a file breaks is an InvalidFile with the file, the line and the column.
"""

import csv
import gzip
import itertools
import math
import zlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

import msgspec
from msgspec import Struct

from plans.errors import InvalidFile
from plans.workload import Quantile, RequestClass, Workload

CHARS_PER_TOKEN = 4
"""Where a trace counts characters; a usual ratio of English text under BPE vocabularies."""


class TraceRow(Struct, frozen=True, kw_only=True):
    """One request of a trace."""

    line: int
    """Line of the file, the first being 1; 0 where the row was drawn and not read."""
    input_tokens: int
    output_tokens: int
    arrival_s: float | None = None
    """Relative to the earliest row; None in a trace of lengths alone."""
    ttft_target_s: float | None = None
    tbt_target_s: float | None = None
    class_name: str | None = None


class Trace(Struct, frozen=True, kw_only=True):
    """Rows of one source, in its order, at least one."""

    source: str
    rows: tuple[TraceRow, ...]
    timed: bool
    """Whether every row has its arrival; otherwise none has."""
    notes: tuple[str, ...] = ()
    """What a reader of the results must know of how the file was read."""


class Columns(Struct, frozen=True, kw_only=True):
    """One naming of columns. Names are matched exactly; other columns are ignored."""

    input: str
    output: str
    arrival: str | None = None
    unit: Literal["date", "ms", "s"] = "s"
    """`date` is an ISO date and time, UTC where it names no zone."""
    needs_arrival: bool = False
    """Without its arrival column the file is not of this naming."""
    chars: bool = False
    """Lengths are characters, taken as CHARS_PER_TOKEN to a token and rounded up."""


COLUMNS = (
    # Ours: the only one with targets (ttft_target_s, tbt_target_s) and class_name.
    Columns(input="input_tokens", output="output_tokens", arrival="arrival_s"),
    # Azure public data set, 2023 and 2024.
    Columns(
        input="ContextTokens",
        output="GeneratedTokens",
        arrival="TIMESTAMP",
        unit="date",
        needs_arrival=True,
    ),
    # Mooncake, and what borrowed its form.
    Columns(input="input_length", output="output_length", arrival="timestamp", unit="ms"),
    # Vidur and the length mixes of the Medha authors.
    Columns(input="num_prefill_tokens", output="num_decode_tokens", arrival="arrived_at"),
    # BurstGPT.
    Columns(input="Request tokens", output="Response tokens", arrival="Timestamp"),
    # Recorded agent sessions of LMCache: times are of each session, so they are no arrivals.
    Columns(input="input_chars", output="output_chars", chars=True),
)
QUANTILE = "quantile"
"""A file with this column beside input_tokens and output_tokens is a quantile table."""
TARGETS = ("ttft_target_s", "tbt_target_s")
SUFFIXES = (".csv", ".jsonl")


def read_trace(path: Path) -> Trace | Workload:
    """Rows of a trace, or the one-class workload of a quantile table.

    errors    InvalidFile with file, line, column and rule
    """
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    if plain.suffix not in SUFFIXES:
        raise InvalidFile(
            str(path), "", f"a trace ends in {', '.join(SUFFIXES)}, or these with .gz"
        )
    try:
        with _opened(path) as file:
            records = _csv_records(path, file) if plain.suffix == ".csv" else _json(path, file)
            first = next(records, None)
            if first is None:
                raise InvalidFile(str(path), "", "the trace is empty: it has no row")
            rows = itertools.chain([first], records)
            names = set(first[1])
            if {QUANTILE, "input_tokens", "output_tokens"} <= names:
                return _quantile_workload(path, rows)
            return _trace(path, rows, _columns(path, names))
    except FileNotFoundError:
        raise InvalidFile(str(path), "", "no such file") from None
    except UnicodeDecodeError:
        line = _undecodable(path)
        raise InvalidFile(str(path), f"line {line}", "is not UTF-8 text") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidFile(str(path), "", f"cannot be read: {error}") from None


Line = tuple[int, dict[str, Any]]
"""Line number and the values by column: text in CSV, anything in JSON."""


def _opened(path: Path) -> IO[str]:
    # utf-8-sig: spreadsheets write a byte order mark, which would become part of the first name.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _undecodable(path: Path) -> int:
    """The first line that is not UTF-8; readers decode ahead, so they do not know."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise AssertionError(f"{path} is UTF-8 text after all")


def _csv_records(path: Path, file: IO[str]) -> Iterator[Line]:
    reader = csv.DictReader(file, strict=True)
    try:
        names = reader.fieldnames or ()
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InvalidFile(str(path), "line 1", f"column {twice!r} stands twice")
        for record in reader:
            columns = len(reader.fieldnames or ())
            if None in record or None in record.values():
                found = sum(value is not None for name, value in record.items() if name is not None)
                found += len(record.get(None) or ())
                raise InvalidFile(
                    str(path),
                    f"line {reader.line_num}",
                    f"{found} values under {columns} columns",
                )
            yield reader.line_num, record
    except csv.Error as error:
        # of the inner reader: the outer one counts a line once it has been read without an error
        raise InvalidFile(str(path), f"line {reader.reader.line_num}", str(error)) from None


def _json(path: Path, file: IO[str]) -> Iterator[Line]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            yield line, msgspec.json.decode(text, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidFile(
                str(path), f"line {line}", f"not one JSON object a line: {error}"
            ) from None


def _columns(path: Path, names: set[str]) -> Columns:
    for columns in COLUMNS:
        if {columns.input, columns.output} <= names and (
            not columns.needs_arrival or columns.arrival in names
        ):
            return columns
    known = "; ".join(
        ", ".join(filter(None, (row.arrival, row.input, row.output))) for row in COLUMNS
    )
    raise InvalidFile(
        str(path),
        "",
        f"missing columns: none of the known namings is among {', '.join(sorted(names))}"
        f"\nknown: {known}",
    )


def _trace(path: Path, records: Iterable[Line], columns: Columns) -> Trace:
    reader = _RowReader(path, columns)
    rows = [reader.row(line, record) for line, record in records]
    times = [row.arrival_s for row in rows if row.arrival_s is not None]
    if times:
        if len(times) < len(rows):
            line = next(row.line for row in rows if row.arrival_s is None)
            raise reader.error(line, columns.arrival, "has no value here but has in other rows")
        # Absolute stamps become relative; traces that start late have nothing to say before.
        start = min(times)
        rows = [
            msgspec.structs.replace(row, arrival_s=at - start)
            for row, at in zip(rows, times, strict=True)
        ]
    notes: tuple[str, ...] = ()
    if columns.chars:
        notes = (
            f"lengths are characters / {CHARS_PER_TOKEN}; each step counts as a request of its own",
        )
    return Trace(source=str(path), rows=tuple(rows), timed=bool(times), notes=notes)


class _RowReader:
    """Turns records of one file into rows; knows where it is when a rule is broken."""

    def __init__(self, path: Path, columns: Columns) -> None:
        self._path = path
        self._columns = columns

    def error(self, line: int, column: str | None, problem: str) -> InvalidFile:
        """The error for one value."""
        return InvalidFile(str(self._path), f"line {line}: {column}", problem)

    def row(self, line: int, record: dict[str, Any]) -> TraceRow:
        """One request."""
        columns = self._columns
        name = record.get("class_name")
        targets = {field: self._target(line, record, field) for field in TARGETS}
        return TraceRow(
            line=line,
            input_tokens=self._length(line, record, columns.input),
            output_tokens=self._length(line, record, columns.output),
            arrival_s=self._arrival(line, record),
            class_name=str(name) if name else None,
            **targets,
        )

    def _length(self, line: int, record: dict[str, Any], column: str) -> int:
        value = self.number(line, record, column)
        if value != int(value):
            raise self.error(line, column, f"{record[column]!r} is no whole number")
        if self._columns.chars:
            return max(1, math.ceil(value / CHARS_PER_TOKEN))
        if value < 1:
            raise self.error(line, column, f"{int(value)} is below 1 token")
        return int(value)

    def number(self, line: int, record: dict[str, Any], column: str) -> float:
        """A finite number that is not negative."""
        given = record.get(column)
        if given is None:
            raise self.error(line, column, "has no value")
        try:
            value = math.nan if isinstance(given, bool) else float(given)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise self.error(line, column, f"{given!r} is no finite number")
        if value < 0:
            raise self.error(line, column, f"{given} is negative")
        return value

    def _arrival(self, line: int, record: dict[str, Any]) -> float | None:
        column = self._columns.arrival
        # compared one by one: JSON may hold a list, which no set takes
        if column is None or record.get(column) in (None, ""):
            return None
        if self._columns.unit == "date":
            try:
                stamp = datetime.fromisoformat(str(record[column]))
            except ValueError:
                raise self.error(line, column, f"{record[column]!r} is no ISO date") from None
            return (stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)).timestamp()
        value = self.number(line, record, column)
        return value / 1000 if self._columns.unit == "ms" else value

    def _target(self, line: int, record: dict[str, Any], column: str) -> float | None:
        if record.get(column) in (None, ""):
            return None
        value = self.number(line, record, column)
        if value == 0:
            raise self.error(line, column, "a target is above 0 s")
        return value


def _quantile_workload(path: Path, records: Iterable[Line]) -> Workload:
    """A workload of one class. Tables of real traffic have rows of 0 tokens; they count as 1."""
    numbers = _RowReader(path, COLUMNS[0])
    tables: dict[str, list[Quantile]] = {"input_tokens": [], "output_tokens": []}
    below = -1.0
    line = 0
    for line, record in records:
        quantile = numbers.number(line, record, QUANTILE)
        if quantile <= below or (below < 0 and quantile != 0) or quantile > 1:
            raise numbers.error(
                line, QUANTILE, f"{quantile} breaks the rule: rising from 0 to 1 without repetition"
            )
        below = quantile
        for name, table in tables.items():
            tokens = max(1, math.ceil(numbers.number(line, record, name)))
            if table and tokens < table[-1][1]:
                raise numbers.error(line, name, f"{tokens} is below the row before it")
            table.append((quantile, tokens))
    if below != 1:
        raise numbers.error(line, QUANTILE, f"the last row is {below}, not 1")
    lengths = RequestClass(
        name="all",
        share=1.0,
        input_tokens=tuple(tables["input_tokens"]),
        output_tokens=tuple(tables["output_tokens"]),
    )
    return Workload(name=path.name.split(".")[0], classes=(lengths,), source=str(path))

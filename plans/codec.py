"""Strict YAML to frozen structs and back: one canonical text for each value.

Reading takes plain data only. YAML's holes are closed: duplicate keys, anchors and aliases, tags,
several documents, keys that are not text, and the words that YAML 1.1 guesses at. A bare scalar is
`null`, `true`, `false`, a decimal integer, a number with a point or an exponent (`1e-3` counts, a
plain YAML 1.1 reader would take it for text), and otherwise text: `no`, `1:30`, `0o17`, `010`,
`1_000` and `2024-01-01` are text, so a field that wants anything else refuses them. An integer is
taken where a float is wanted; nothing else is converted.

Writing puts every field in field order (a struct with omit_defaults without those), dicts by key,
floats in their shortest exact form with a point (so that every YAML reader sees a float), text in
quotes where it could be read as anything else, and what fits on a line of 100 columns on that line.
Loading what was written and writing it again gives the same bytes.
"""

import hashlib
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from plans.errors import InvalidFile
from plans.fields import Path as FieldPath
from plans.fields import explain, field_docs, path_text, shown, structs_of
from plans.plan import Plan

T = TypeVar("T")

WIDTH = 100
DEPTH_MAX = 32
"""Nesting of the deepest value that is read; plans need 6."""

INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?")
WORDS = {"null": None, "~": None, "": None, "true": True, "false": False}
# Plain without quotes for every reader: no indicator, no leading digit, no blank at an end.
PLAIN = re.compile(r"[A-Za-z_/](?:[A-Za-z0-9_./+@%=~ -]*[A-Za-z0-9_./+@%=~-])?")
GUESSED = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}  # YAML 1.1, any case
ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # only its events are used


# --- reading ------------------------------------------------------------------------------------


def load_file(path: str | Path, type_: type[T]) -> T:
    """Value of a YAML file; raises InvalidFile for anything that is not exactly a `type_`."""
    where = str(path)
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise InvalidFile(where, "", "no such file") from None
    except IsADirectoryError:
        raise InvalidFile(where, "", "is a folder, a YAML file is wanted") from None
    except UnicodeDecodeError as error:
        raise InvalidFile(where, "", f"is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InvalidFile(where, "", f"cannot be read: {error.strerror}") from None
    return loads(text, type_, where=where)


def loads(text: str, type_: type[T], *, where: str = "text") -> T:
    """Value of YAML text; `where` names its origin in errors.

    Raises InvalidFile with the path of the field, its line, the value found and the rule.
    """
    data = _Reader(text, where).document()
    try:
        return msgspec.convert(data, type_)
    except msgspec.ValidationError as error:
        problem = explain(str(error), data, type_)
        place = f"{problem.text} (line {_line(text, where, problem.path)})"
        raise InvalidFile(where, path_text(problem.path), place) from None


class _Reader:
    """Builds plain data from the events of a parser, refusing what YAML has beyond plain data."""

    def __init__(self, text: str, where: str, lines: dict[FieldPath, int] | None = None) -> None:
        """Fills `lines`, path to line number, where given: only errors pay for a second pass."""
        self._text = text
        self._where = where
        self._lines = lines

    def document(self) -> Any:
        """The only document."""
        try:
            self._parser = LOADER(self._text)
            self._parser.get_event()  # start of the stream
            if self._parser.check_event(yaml.StreamEndEvent):
                raise InvalidFile(self._where, "", "is empty")
            self._parser.get_event()
            data = self._value(self._parser.get_event(), ())
            self._parser.get_event()
            if not self._parser.check_event(yaml.StreamEndEvent):
                line = self._parser.get_event().start_mark.line + 1
                raise InvalidFile(self._where, "", f"holds a second document (line {line})")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
            raise InvalidFile(self._where, "", f"is not YAML: {error.problem}{place}") from None
        except (yaml.YAMLError, UnicodeEncodeError) as error:  # characters that YAML forbids
            raise InvalidFile(self._where, "", f"is not YAML: {error}") from None
        if data is None:
            raise InvalidFile(self._where, "", "is empty")
        return data

    def _fail(self, event: Any, path: FieldPath, problem: str) -> InvalidFile:
        line = event.start_mark.line + 1
        return InvalidFile(self._where, path_text(path), f"{problem} (line {line})")

    def _value(self, event: Any, path: FieldPath) -> Any:
        if isinstance(event, yaml.AliasEvent):
            raise self._fail(event, path, f"alias *{event.anchor} is not allowed; write it out")
        if event.anchor is not None:
            raise self._fail(event, path, f"anchor &{event.anchor} is not allowed; write it out")
        if event.tag is not None:
            raise self._fail(event, path, f"tag {event.tag} is not allowed; write a plain value")
        if self._lines is not None:
            self._lines.setdefault(path, event.start_mark.line + 1)
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event.value) if event.implicit[0] else event.value
        if len(path) >= DEPTH_MAX:
            raise self._fail(event, path, f"nests deeper than {DEPTH_MAX} levels")
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(path)
        return self._mapping(path)

    def _sequence(self, path: FieldPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := self._parser.get_event(), yaml.SequenceEndEvent):
            items.append(self._value(event, (*path, len(items))))
        return items

    def _mapping(self, path: FieldPath) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        while not isinstance(event := self._parser.get_event(), yaml.MappingEndEvent):
            key = self._value(event, path)
            if not isinstance(key, str):
                hint = f'; write "{event.value}"' if isinstance(event, yaml.ScalarEvent) else ""
                raise self._fail(event, path, f"key {key!r} is not text{hint}")
            if key in fields:
                raise self._fail(event, (*path, key), "stands twice, each key is allowed once")
            if self._lines is not None:
                self._lines[*path, key] = event.start_mark.line + 1
            fields[key] = self._value(self._parser.get_event(), (*path, key))
        return fields


def _line(text: str, where: str, path: FieldPath) -> int:
    """Line of a path, or of its nearest parent that has one."""
    lines: dict[FieldPath, int] = {}
    _Reader(text, where, lines).document()
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


def _scalar(text: str) -> Any:
    """Value of a scalar without quotes."""
    if text in WORDS:
        return WORDS[text]
    if INTEGER.fullmatch(text):
        # Python refuses to convert thousands of digits; as text it fails where a number is wanted.
        return int(text) if len(text) <= 40 else text
    if FLOAT.fullmatch(text):
        number = float(text)
        return text if number in (float("inf"), float("-inf")) else number
    return text


# --- writing ------------------------------------------------------------------------------------


def dumps(value: Any) -> str:
    """Canonical YAML of a struct, or of dicts, lists and structs of them.

    Raises InvalidFile where the value breaks the limits of its own types, so that whatever is
    written can be read.
    """
    plain = _plain(normalised(value))
    lines = _block(plain, WIDTH) if isinstance(plain, dict | list) and plain else [_flow(plain)]
    return "\n".join(lines) + "\n"


def dump_file(path: str | Path, value: Any) -> None:
    """Writes canonical YAML; a reader sees the old file or the new one, never a part."""
    target = Path(path)
    text = dumps(value)
    descriptor, temporary = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"
    )
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def normalised(value: T, *, where: str = "value") -> T:
    """The value as reading its text would give it: types converted, limits checked.

    A struct built in Python takes anything; this is where an integer in a float field becomes a
    float and a number outside its limits raises InvalidFile.
    """
    if isinstance(value, msgspec.Struct):
        plain = msgspec.to_builtins(value)
        try:
            return msgspec.convert(plain, type(value))
        except msgspec.ValidationError as error:
            problem = explain(str(error), plain, type(value))
            raise InvalidFile(where, path_text(problem.path), problem.text) from None
    if isinstance(value, dict):
        return {key: normalised(item, where=where) for key, item in value.items()}  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        return [normalised(item, where=where) for item in value]  # type: ignore[return-value]
    return value


def content_hash(plan: Plan) -> str:
    """sha256 of the canonical form of what changes tokens or timing; the name does not."""
    return hashlib.sha256(dumps(normalised(plan).hashed()).encode()).hexdigest()


def plan_error(plan: Plan, path: FieldPath, rule: str, *, where: str = "plan") -> InvalidFile:
    """Error about one field of a plan: its path, the value it has, and the rule that it breaks."""
    value: Any = plan
    for step in path:
        value = getattr(value, str(step)) if isinstance(value, msgspec.Struct) else value[step]
    return InvalidFile(where, path_text(path), f"{shown(value)}: {rule}")


def json_schema(type_: type) -> dict[str, Any]:
    """JSON schema of a struct with the docstring of each field, for editors to complete by."""
    schema = msgspec.json.schema(type_)
    for name, struct in structs_of(type_).items():
        properties = schema["$defs"][name]["properties"]
        for field, text in field_docs(struct).items():
            properties[field] = {"description": text} | properties[field]
    return schema


def _key_order(key: str) -> tuple[bool, int, str]:
    number = key.isascii() and key.isdecimal() and len(key) <= 40
    return not number, int(key) if number else 0, key


def _plain(value: Any, path: FieldPath = ()) -> Any:
    """Dicts, lists and scalars of a value: struct fields in their order, dicts by key."""
    if isinstance(value, msgspec.Struct):
        fields = value.__struct_fields__
        if value.__struct_config__.omit_defaults:
            given = msgspec.to_builtins(value)
            fields = tuple(each for each in fields if each in given)
        return {each: _plain(getattr(value, each), (*path, each)) for each in fields}
    if isinstance(value, dict):
        keys = sorted(value, key=_key_order)
        return {each: _plain(value[each], (*path, each)) for each in keys}
    if isinstance(value, list | tuple):
        return [_plain(item, (*path, row)) for row, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidFile("value", path_text(path), f"{value} is not allowed: numbers are finite")
    return value


def _block(value: dict[str, Any] | list[Any], width: int) -> list[str]:
    """Lines of a non-empty mapping or sequence, without indentation, for a width."""
    if isinstance(value, list):
        return [line for item in value for line in _entry("-", item, width)]
    return [line for key, item in value.items() for line in _entry(f"{_text(key)}:", item, width)]


def _entry(head: str, item: Any, width: int) -> list[str]:
    """`head item` on one line where it fits, else the item below, indented by 2."""
    line = f"{head} {_flow(item)}"
    if not isinstance(item, dict | list) or not item or len(line) <= width:
        return [line]
    below = [f"  {each}" for each in _block(item, width - 2)]
    if head == "-":
        return [f"- {below[0][2:]}", *below[1:]]
    return [head, *below]


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_text(key)}: {_flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(_flow(item) for item in value)}]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _float(value)
    return str(value) if isinstance(value, int) else _text(value)


def _float(value: float) -> str:
    mantissa, exponent, power = repr(value).partition("e")
    return mantissa + ("" if "." in mantissa else ".0") + exponent + power


def _text(value: str) -> str:
    if PLAIN.fullmatch(value) and value.lower() not in GUESSED:
        return value
    return f'"{"".join(_character(each) for each in value)}"'


def _character(value: str) -> str:
    if value in ESCAPES:
        return ESCAPES[value]
    if value.isprintable():
        return value
    code = ord(value)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

"""Fields of structs as people name them: paths, nearest names, units, and their docstrings.

`explain` turns a complaint of msgspec about a value into where, what was found, and the rule.
"""

import ast
import difflib
import inspect
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

Path = tuple[str | int, ...]
"""Field names, dict keys and row numbers from the root."""

UNITS = {
    "bytes_per_s": "bytes a second",
    "flops_per_s": "FLOPs a second",
    "bytes": "bytes",
    "layers": "layers",
    "rps": "requests a second",
    "s": "seconds",
    "tokens": "tokens",
}
# What the same things are called elsewhere: never accepted, only understood well enough to help.
FOREIGN = "ms us ns sec secs seconds k kb kib mb mib gb gib tb tib gbps gb_s gb_per_s tflops tokens"

_STEP = re.compile(r"\.(?P<field>\w+)|\[(?P<row>\d+)\]|\[\.\.\.\]")
_COMPLAINT = re.compile(r"(?P<rule>.*?)(?: - at `(?P<path>\$[^`]*)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Where a value breaks a rule, and which."""

    path: Path
    text: str


def path_text(path: Path) -> str:
    """A path as people write it: prefill.chunks[2].until_tokens, files["program/stage_0.py"]."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif step.isidentifier():
            text += f".{step}" if text else step
        else:
            text += f'["{step}"]'
    return text


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearest_field(name: str, known: tuple[str, ...]) -> str:
    """The known field that was meant, with its unit; a quantity in another unit counts first."""
    stem, unit = _stem(name)
    same = [field for field in known if unit and _stem(field)[0] == stem]
    near = same or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not near:
        return f"known: {', '.join(known)}"
    meaning = UNITS.get(_stem(near[0])[1])
    return f"nearest: {near[0]}" + (f", in {meaning}" if meaning else "")


def explain(complaint: str, data: Any, type_: Any) -> Problem:
    """Place and text of the first complaint of msgspec.convert(data, type_)."""
    match = _COMPLAINT.fullmatch(complaint)
    rule = match["rule"] if match else complaint
    path, found, wanted = _walk((match and match["path"]) or "$", data, type_)
    if unknown := _UNKNOWN.fullmatch(rule):
        known = next((_names(each) for each in _structs(wanted)), ())
        hint = nearest_field(unknown[1], known)
        return Problem(path=(*path, unknown[1]), text=f"unknown field; {hint}")
    if missing := _MISSING.fullmatch(rule):
        return Problem(path=(*path, missing[1]), text="is missing, the field is required")
    rule = rule.replace("`", "")
    words = [word for part in _members(wanted) if get_origin(part) is Literal
             for word in get_args(part)]  # fmt: skip
    if words:
        near = difflib.get_close_matches(str(found), map(str, words), n=1, cutoff=0.4)
        rule = f"expected one of {', '.join(map(repr, words))}"
        rule += f"; nearest: {near[0]}" if near else ""
    else:
        rule = rule[:1].lower() + rule[1:] + _spelling(found, wanted)
    return Problem(path=path, text=f"{shown(found)} is not allowed: {rule}")


def field_docs(struct: type[msgspec.Struct]) -> dict[str, str]:
    """The docstring under each field of a struct; a field without one has no entry."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(struct)))
    docs = {}
    body = next(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    for field, below in pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            docs[field.target.id] = inspect.cleandoc(below.value.value)
    return docs


def structs_of(type_: Any) -> dict[str, type[msgspec.Struct]]:
    """Every struct that a type reaches, itself included, by class name."""
    found: dict[str, type[msgspec.Struct]] = {}
    todo = [type_]
    while todo:
        for struct in _structs(todo.pop()):
            if struct.__name__ not in found:
                found[struct.__name__] = struct
                todo += [field.type for field in msgspec.structs.fields(struct)]
    return found


def _stem(name: str) -> tuple[str, str]:
    """A name without its unit, and the unit."""
    for unit in (*UNITS, *FOREIGN.split()):
        if name.endswith(f"_{unit}"):
            return name.removesuffix(f"_{unit}"), unit
    return name, ""


def _names(struct: type[msgspec.Struct]) -> tuple[str, ...]:
    return struct.__struct_fields__


def _members(type_: Any) -> Iterator[Any]:
    """The types of a union, without annotations; any other type alone."""
    if get_origin(type_) is Annotated:
        yield from _members(get_args(type_)[0])
    elif get_origin(type_) in (Union, types.UnionType):
        for each in get_args(type_):
            yield from _members(each)
    else:
        yield type_


def _structs(type_: Any) -> Iterator[type[msgspec.Struct]]:
    """Structs named in a type, inside containers too."""
    for member in _members(type_):
        if isinstance(member, type) and issubclass(member, msgspec.Struct):
            yield member
        elif get_origin(member) is not Literal:
            for each in get_args(member):
                if each is not Ellipsis:
                    yield from _structs(each)


def _inner(type_: Any, step: str | int) -> Any:
    """Type of what a step leads to; Any where it is not known."""
    for member in _members(type_):
        arguments = get_args(member)
        if isinstance(member, type) and issubclass(member, msgspec.Struct):
            for field in msgspec.structs.fields(member):
                if field.name == step:
                    return field.type
        elif get_origin(member) is dict:
            return arguments[1]
        elif get_origin(member) in (tuple, list) and isinstance(step, int):
            uniform = get_origin(member) is list or arguments[-1] is Ellipsis
            return arguments[0 if uniform else step]
    return Any


def _walk(text: str, data: Any, type_: Any) -> tuple[Path, Any, Any]:
    """Path, value and type at msgspec's path; `[...]` becomes the first key that is wrong."""
    path: Path = ()
    for match in _STEP.finditer(text.removeprefix("$")):
        step: str | int = match["field"] or int(match["row"] or 0)
        if match[0] == "[...]":
            step = next((key for key in data if not _fits(data[key], _inner(type_, key))), "...")
        type_ = _inner(type_, step)
        data = data.get(step) if isinstance(data, Mapping) else data[step]
        path = (*path, step)
    return path, data, type_


def _fits(data: Any, type_: Any) -> bool:
    try:
        msgspec.convert(data, type_)
    except msgspec.ValidationError:
        return False
    return True


def _spelling(found: Any, wanted: Any) -> str:
    """What to write instead, where YAML's reading of the value is the likely surprise."""
    kinds = set(_members(wanted))
    if str in kinds and isinstance(found, bool | int | float):
        return "; put it in quotes"
    if not isinstance(found, str):
        return ""
    if bool in kinds:
        return "; write true or false"
    if int in kinds:
        return "; write decimal digits, without quotes, blanks, _ or leading 0"
    return "; write it as 0.001 or 1e-3, without quotes" if float in kinds else ""

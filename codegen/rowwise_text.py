"""Names and line breaks of the sources that are printed of a row-wise region."""

from collections.abc import Sequence

from codegen.rowwise import Input, Region, Step

WIDTH = 100
INDENT = "    "


def letters(value: Input | Step) -> str:
    """Name of a tensor in Python."""
    if isinstance(value, Input) and value.kind == "scalar":
        return value.name
    if isinstance(value, Input) and "_" in value.name:
        return value.name
    if not value.classes:
        return f"{value.name}_T1"
    vector = isinstance(value, Input) and value.kind == "vector"
    return f"{value.name}_{'D' if vector else 'TD'}"


def stem_of(value: Input | Step) -> str:
    """Name of a tile in Triton: without the letters of its shape."""
    head, _, letters = value.name.rpartition("_")
    return head if head and letters.isupper() else value.name


def call_text(
    head: str, args: Sequence[str], tail: str, depth: int, *, trailing: bool = True
) -> str:
    """A call as ruff formats it: on one line, else its arguments on one, else one a line."""
    pad = INDENT * depth
    line = f"{pad}{head}{', '.join(args)}{tail}"
    if len(line) <= WIDTH:
        return line
    inner = f"{pad}{INDENT}{', '.join(args)}"
    if len(inner) <= WIDTH and not trailing:
        return f"{pad}{head}\n{inner}\n{pad}{tail}"
    return "\n".join([f"{pad}{head}", *(f"{pad}{INDENT}{arg}," for arg in args), f"{pad}{tail}"])


def tag_of(groups: Sequence[object], at: int) -> str:
    return f"_{at}" if len(groups) > 1 else ""


def sum_text(region: Region, classes: Sequence[int], name: str) -> str:
    """Columns of some segments, such as `2 * width_0 + width_1`; "" for none."""
    terms = []
    for group in dict.fromkeys(classes):
        count = list(classes).count(group)
        one = f"{name}{tag_of(region.widths, group)}"
        terms.append(one if count == 1 else f"{count} * {one}")
    return " + ".join(terms)


def folded(line: str) -> str:
    """A statement as ruff formats it, where it is longer than a line."""
    if len(line) <= WIDTH:
        return line
    text = line.lstrip()
    pad = line[: len(line) - len(text)]
    head, opened, rest = text.partition("tl.store(" if text.startswith("tl.store") else "tl.load(")
    if opened:
        tail = ").to(tl.float32)" if rest.endswith(").to(tl.float32)") else ")"
        inner = rest.removesuffix(tail)
        if len(f"{pad}{INDENT}{inner}") <= WIDTH:
            return f"{pad}{head}{opened}\n{pad}{INDENT}{inner}\n{pad}{tail}"
    return line

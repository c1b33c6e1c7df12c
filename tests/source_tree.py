"""Reads the tree as text: its files, its modules and who imports whom. Imports none of it."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("codegen", "planner", "plans", "runtime")


@dataclass(frozen=True)
class Import:
    """One import of one module by one of ours."""

    module: str
    target: str
    """Of ours the exact module, of others the dotted name."""
    line: int
    on_load: bool
    """Whether it runs when the module is loaded, not in a function nor for the type checker."""

    def __str__(self) -> str:
        return f"{module_files()[self.module].relative_to(ROOT)}:{self.line}: {self.target}"


@functools.cache
def tree_files() -> tuple[Path, ...]:
    """Every file that git tracks or would track, by path."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = {ROOT / name for name in listed.split("\0") if name}
    return tuple(sorted(path for path in paths if path.is_file()))


@functools.cache
def module_files() -> dict[str, Path]:
    """Dotted name to file, for the four packages."""
    found = {}
    for path in tree_files():
        parts = path.relative_to(ROOT).with_suffix("").parts
        if path.suffix == ".py" and parts[0] in PACKAGES:
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@functools.cache
def imports() -> tuple[Import, ...]:
    """All imports of the four packages: in functions, for types, by import_module too."""
    return tuple(
        Import(module, target, node.lineno, on_load)
        for module, path in module_files().items()
        for node, on_load in _statements(syntax(path), on_load=True)
        for target in _targets(node, module, path)
    )


def top_of(module: str) -> str:
    return module.partition(".")[0]


def third_party(target: str) -> str | None:
    """The top-level name of a module that is neither in the tree nor in the standard library."""
    top = top_of(target)
    here = (ROOT / top).is_dir() or (ROOT / "tests" / f"{top}.py").exists()
    return None if here or top in PACKAGES or top in sys.stdlib_module_names else top


def _statements(node: ast.AST, *, on_load: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Imports and calls below a node, each with whether it runs when the module is loaded."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                late = True
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                late = True
            case _:
                late = False
        if isinstance(child, ast.Import | ast.ImportFrom | ast.Call):
            yield child, on_load
        yield from _statements(child, on_load=on_load and not late)


def _targets(node: ast.AST, module: str, path: Path) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (name.name for name in names)
        case ast.ImportFrom(module=base, names=names, level=level):
            if level:
                parts = [*module.split("."), *(["__init__"] if path.name == "__init__.py" else [])]
                base = ".".join([*parts[:-level], *([base] if base else [])])
            for name in names:
                full = f"{base}.{name.name}"
                yield full if full in module_files() else str(base)
        case ast.Call(func=function, args=[ast.Constant(value=str(target)), *_]):
            called = getattr(function, "attr", None) or getattr(function, "id", None)
            if called in {"import_module", "__import__"}:
                yield target

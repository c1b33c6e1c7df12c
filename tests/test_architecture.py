"""The rules that keep the tree readable: who imports what, what starts light, how files are laid.

Each test walks what is there and lists every violation it finds, with its place. ZONES is the
table; a module belongs to the zone that names the longest prefix of its dotted name.
"""

import ast
import fnmatch
import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from source_tree import (
    PACKAGES,
    ROOT,
    imports,
    module_files,
    syntax,
    third_party,
    top_of,
    tree_files,
)


@dataclass(frozen=True, kw_only=True)
class Zone:
    """Modules under one rule."""

    modules: tuple[str, ...]
    """Prefixes of dotted names."""
    zones: tuple[str, ...] = ()
    """Other zones that these modules may import; their own is always allowed."""
    third_party: tuple[str, ...] = ()
    """Top-level modules from outside that they may import, besides the standard library."""


LIVE = ("jinja2", "msgspec", "numpy", "safetensors", "tokenizers", "torch", "triton", "zmq")
SERVER = ("fastapi", "prometheus_client", "uvicorn")
COMMAND = ("rich", "typer")

ZONES = {
    "plans": Zone(modules=("plans",), third_party=("msgspec", "yaml")),
    # numpy: lists that a step's launches wait for are built on the host.
    "codegen": Zone(
        modules=("codegen",), zones=("plans",), third_party=("numpy", "torch", "triton")
    ),
    # msgspec besides numpy: the core writes the decision log and the step messages.
    "core": Zone(modules=("runtime",), zones=("plans",), third_party=("msgspec", "numpy")),
    "live": Zone(
        modules=(
            "runtime.executor.live",
            "runtime.offline",
            "runtime.parallel",
            "runtime.program",
            "runtime.sampling",
            "runtime.tokenizer",
            "runtime.weights",
        ),
        zones=("core", "plans"),
        third_party=LIVE,
    ),
    "server": Zone(
        modules=("runtime.server",),
        zones=("core", "live", "plans"),
        third_party=(*LIVE, *SERVER),
    ),
    "planner": Zone(
        modules=("planner",), zones=("core", "plans"), third_party=("msgspec", "networkx", "numpy")
    ),
    "report": Zone(
        modules=("planner.report",), zones=("planner", "plans"), third_party=("matplotlib", "numpy")
    ),
    "bundle": Zone(
        modules=("planner.bundle",),
        zones=("codegen", "planner", "plans", "report"),
        third_party=("msgspec",),
    ),
    "planner-commands": Zone(modules=("planner.cli",), zones=("core", "medha-plan", "medha-tune")),
    "runtime-commands": Zone(modules=("runtime.cli",), zones=("core", "medha-run", "medha-sim")),
    "medha-plan": Zone(
        modules=("planner.cli_plan", "planner.cli_plan_tables"),
        zones=("bundle", "core", "planner", "plans", "report"),
        third_party=COMMAND,
    ),
    "medha-tune": Zone(
        modules=("planner.cli_tune", "planner.cli_tune_profile"),
        zones=("codegen", "core", "planner", "plans"),
        third_party=(*COMMAND, "msgspec"),
    ),
    "plot": Zone(
        modules=("runtime.plot",), zones=("core", "plans"), third_party=("matplotlib", "numpy")
    ),
    "medha-sim": Zone(
        modules=("runtime.cli_sim", "runtime.cli_sim_tables"),
        zones=("core", "plans", "plot"),
        third_party=(*COMMAND, "msgspec", "numpy"),
    ),
    "medha-run": Zone(
        modules=("runtime.cli_run",), zones=("core", "live", "plans"), third_party=COMMAND
    ),
    "medha-serve": Zone(
        modules=("runtime.cli_serve",),
        zones=("core", "live", "plans", "server"),
        third_party=COMMAND,
    ),
}

TORCH_FREE = ("core", "medha-plan", "medha-sim", "planner", "plans", "plot", "report")
# Allowed inside functions only: each costs a good part of a second, and few calls need it.
LATE = ("matplotlib", "networkx")
# What a command may not have loaded when it has printed its help.
HEAVY = ("matplotlib", "networkx", "numpy", "torch", "transformers", "triton")
LIGHT_COMMANDS = ("medha-plan", "medha-sim")

MODULE_OF = {  # where a distribution's import name is not its own
    "flash-attn": "flash_attn",
    "prometheus-client": "prometheus_client",
    "pyyaml": "yaml",
    "pyzmq": "zmq",
}

REGISTRIES = ("KERNELS", "MODELS", "POLICIES")
REGISTRY_ENTRY = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)*:\w+")

LINES_MAX = 450
LINES_EXEMPT = ("codegen/kernels/*", "tests/*/golden/*")  # kernel bodies; generated sources

# Docs also name files of a bundle and of a checkpoint, which the tree does not hold.
ELSEWHERE = (
    *("alternatives.csv", "plan.yaml", "program", "program/*", "report.html", "stage_*.py"),
    *("config.json", "tokenizer.json", "tokenizer_config.json"),
)
FILE_NAME = re.compile(r"[\w<>*./-]+\.(?:py|md|yaml|csv|toml|txt|json|jsonl|html|sh)")

# The escapes keep this file from holding what it looks for.
MACHINE_TEXT = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs\.org|deb\.debian\.org"
    r"|(?:index-url|find-links|trusted-host)[= ]+\S*[/.]"
    r"|(?<![\w./])/(?:work|root|home|Users|mnt|opt)/[\w.-]+"
)


def zone_of(module: str) -> str:
    matches = [
        (len(prefix), name)
        for name, zone in ZONES.items()
        for prefix in zone.modules
        if f"{module}.".startswith(f"{prefix}.")
    ]
    return max(matches)[1]


def import_graph() -> nx.DiGraph:
    """Who imports whom among our modules."""
    graph = nx.DiGraph()
    graph.add_nodes_from(module_files())
    graph.add_edges_from(
        (found.module, found.target) for found in imports() if found.target in module_files()
    )
    return graph


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def child(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a fresh interpreter that sees this tree."""
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def lines_of(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except UnicodeDecodeError:  # a picture
        return []


# --- imports ------------------------------------------------------------------------------------


def test_modules_import_only_what_their_zone_allows():
    wrong = []
    for found in imports():
        name = zone_of(found.module)
        outside, top = third_party(found.target), top_of(found.target)
        if outside:
            allowed = outside in ZONES[name].third_party
        elif top in PACKAGES:
            allowed = zone_of(found.target) in {name, *ZONES[name].zones}
        else:  # bench and tests, which nothing imports, are in the tree too
            allowed = top in sys.stdlib_module_names
        if not allowed:
            wrong.append(f"{found} (zone {name})")
    assert wrong == []


def test_codegen_and_runtime_do_not_reach_each_other():
    graph = import_graph()
    reached = [
        f"{module} reaches {other}"
        for module in graph
        for other in nx.descendants(graph, module)
        if {top_of(module), top_of(other)} == {"codegen", "runtime"}
    ]
    assert reached == []


def test_imports_have_no_cycle():
    parts = nx.strongly_connected_components(import_graph())
    assert [sorted(part) for part in parts if len(part) > 1] == []


def test_every_import_of_ours_names_a_module_that_exists():
    """A missing one inside a function would come to light only when a user calls it."""
    missing = [
        str(found)
        for found in imports()
        if top_of(found.target) in PACKAGES and found.target not in module_files()
    ]
    assert missing == []


def test_imports_from_outside_are_declared_dependencies():
    """In the base set or a user's extra: what only `dev` brings is missing where people run it."""
    extras = project()["optional-dependencies"]
    users = [row for name, rows in extras.items() if name != "dev" for row in rows]
    names = [re.split(r"[^\w-]", row)[0].lower() for row in [*project()["dependencies"], *users]]
    declared = {MODULE_OF.get(name, name) for name in names}
    outside = [(third_party(found.target), found) for found in imports()]
    assert [str(found) for name, found in outside if name and name not in declared] == []


def test_costly_imports_stand_inside_functions():
    early = [found for found in imports() if found.on_load and third_party(found.target) in LATE]
    assert [str(found) for found in early] == []


def test_the_torch_free_half_imports_without_torch():
    code = """
import importlib, json, sys
sys.modules["torch"] = sys.modules["triton"] = None
failed = []
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except Exception as error:
        failed.append(f"{module}: {error!r}")
print(json.dumps(failed))
"""
    result = child(code, *[name for name in module_files() if zone_of(name) in TORCH_FREE])
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == []


@pytest.mark.parametrize("command", LIGHT_COMMANDS)
def test_help_loads_nothing_heavy(command):
    target = project()["scripts"][command]
    if target.split(":")[0] not in module_files():
        pytest.skip(f"{target} is not there")
    code = """
import json, pkgutil, sys
target, heavy = sys.argv[1], json.loads(sys.argv[2])
sys.argv = ["command", "--help"]
try:
    pkgutil.resolve_name(target)()
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps([name for name in heavy if name in sys.modules]), file=sys.stderr)
"""
    result = child(code, target, json.dumps(HEAVY))
    assert result.returncode == 0, result.stderr
    assert "--help" in result.stdout
    assert json.loads(result.stderr.splitlines()[-1]) == []


def test_console_scripts_name_a_function_that_exists():
    missing = []
    for script, target in project()["scripts"].items():
        module, function = target.split(":")
        if not (ROOT / top_of(module)).is_dir():
            continue
        body = syntax(module_files()[module]).body if module in module_files() else []
        if function not in [getattr(node, "name", None) for node in body]:
            missing.append(f"{script}: {target}")
    assert missing == []


# --- registries ---------------------------------------------------------------------------------


def registries() -> Iterator[tuple[str, ast.expr]]:
    """Place and value of each registry: known by its name, or by entries that look like one's."""
    for path in module_files().values():
        for node in syntax(path).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    pass
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    pass
                case _:
                    continue
            entries = value.values if isinstance(value, ast.Dict) else []
            texts = [str(entry.value) for entry in entries if isinstance(entry, ast.Constant)]
            if name in REGISTRIES or any(REGISTRY_ENTRY.fullmatch(text) for text in texts):
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {name}", value


def test_registries_are_sorted_literals_whose_entries_resolve():
    wrong = []
    for place, value in registries():
        try:
            entries = dict(ast.literal_eval(value))
        except (TypeError, ValueError):
            wrong.append(f"{place} is not a literal dict")
            continue
        if list(entries) != sorted(entries):
            wrong.append(f"{place} is not sorted")
        for name, target in entries.items():
            try:
                if not REGISTRY_ENTRY.fullmatch(target):
                    wrong.append(f"{place}: {name}: {target!r} is not 'package.module:Name'")
                else:
                    pkgutil.resolve_name(target)
            except (AttributeError, ImportError, TypeError) as error:
                wrong.append(f"{place}: {name}: {error}")
    assert wrong == []


# --- files --------------------------------------------------------------------------------------


def test_no_file_is_called_utils():
    paths = [path.relative_to(ROOT) for path in tree_files()]
    assert [str(path) for path in paths if {"utils", "utils.py"} & set(path.parts)] == []


def test_tests_are_no_packages():
    """A lone tests/planner/__init__.py would make `import planner` find the tests."""
    assert [str(path) for path in (ROOT / "tests").rglob("__init__.py")] == []


def test_files_can_be_read_in_one_sitting():
    sources = [path for path in tree_files() if path.suffix == ".py"]
    lengths = {path.relative_to(ROOT).as_posix(): len(lines_of(path)) for path in sources}
    long = [f"{name}: {lines} lines" for name, lines in lengths.items() if lines > LINES_MAX]
    assert [
        row for row in long if not any(fnmatch.fnmatch(row, f"{rule}*") for rule in LINES_EXEMPT)
    ] == []


def test_git_ignores_no_data_that_the_wheel_needs():
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    shipped = [str(path) for path in files if path.suffix in {".csv", ".html", ".py", ".yaml"}]
    result = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        cwd=ROOT,
        input="\n".join(shipped),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stdout + result.stderr  # git's answer for: none


def test_paths_named_in_docs_exist():
    known = [path.relative_to(ROOT).as_posix() for path in tree_files()]
    missing = [
        f"{doc.relative_to(ROOT)}:{line}: {name}"
        for doc in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
        if doc.exists()
        for line, name in named_paths(lines_of(doc))
        if not is_there(name, doc.parent, known)
    ]
    assert missing == []


def named_paths(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Line and text of each path in backticks, in a fenced block, or behind a relative link."""
    fenced = False
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        for span in [line] if fenced else re.findall(r"`([^`]+)`", line):
            for word in span.split():
                name = word.strip("()[],;.\"'").split(":")[0]
                if is_path(name, in_tree=fenced):
                    yield number, name
        links = [] if fenced else re.findall(r"\]\(([^)#\s]+)", line)
        yield from ((number, link) for link in links if ":" not in link)


def is_path(word: str, *, in_tree: bool) -> bool:
    """Whether a word names a file or folder; `in_tree`: only if it starts with a folder of ours."""
    top, slash, _ = word.partition("/")
    if slash and top and (ROOT / top).is_dir():
        return True
    placeholder = Path(word).stem.isupper() and Path(word).stem != "README"  # FILE.jsonl
    if in_tree or placeholder or word.startswith(("/", "-", "~", "$")):
        return False
    return bool(FILE_NAME.fullmatch(word)) or (word.endswith("/") and word != "/")


def is_there(name: str, folder: Path, known: list[str]) -> bool:
    """Whether a path exists from the root, from the doc's folder, or as the end of a longer path.

    In a path, `<name>` stands for any text, as `*` does.
    """
    pattern = re.sub(r"<[^>]*>", "*", name).removeprefix("./").rstrip("/")
    if any(fnmatch.fnmatch(pattern, other) for other in ELSEWHERE):
        return True
    if (ROOT / pattern).exists() or (folder / pattern).exists():
        return True
    ends = (pattern, f"{pattern}/*", f"*/{pattern}", f"*/{pattern}/*")
    return any(fnmatch.fnmatch(path, end) for path in known for end in ends)


def test_no_text_names_a_registry_or_a_path_of_one_machine():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {hit.group()}"
        for path in tree_files()
        for number, line in enumerate(lines_of(path), 1)
        if (hit := MACHINE_TEXT.search(line))
    ]
    assert found == []

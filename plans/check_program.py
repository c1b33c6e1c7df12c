"""Whether the program beside a plan is the plan's: its files, its ops, and what it was made for.

A plan shows by itself which files it names (plans/check_layout.py); here their bytes are read, by
the runtime before it imports them and by the planner before it calls a plan valid. No file is run.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from plans.plan import Kernel, Plan

MADE_FOR = "program/made_for.json"
"""File that says what a program depends on; bundles made before it have none."""
STAGE = re.compile(r"program/stage_\d+\.py")
IMPORT = re.compile(r"(?m)^from \.(\w+) import ")
ENDS = re.compile(
    r'"name": "(model\.embed_tokens\.weight|lm_head\.weight)",\s*"shape": \((\d+), (\d+)\),'
    r'\s*"shard_dim"'
)
"""A whole matrix of a checkpoint in a stage's PARAMETERS, whatever its ranks share."""
UNSEEN = ("name", "context_limit")
"""Fields of a model that no program depends on."""


def made_for(plan: Plan) -> bytes:
    """Content of MADE_FOR: whatever of a plan decides the text of its program, as JSON."""
    return (json.dumps(_depends_on(plan), indent=1, sort_keys=True) + "\n").encode()


def _depends_on(plan: Plan) -> dict[str, Any]:
    model = msgspec.to_builtins(plan.model)
    return {
        "model": {name: value for name, value in model.items() if name not in UNSEEN},
        "parallelism": {"tp": plan.parallelism.tp, "kvp": plan.parallelism.kvp},
        "stages": [list(each) for each in plan.stages],
        "kv": {"dtype": plan.kv.dtype},
    }


def read_program(folder: Path, files: Mapping[str, str]) -> tuple[dict[str, bytes], list[str]]:
    """Contents of the files of a plan that are what it records, and what is wrong with the rest."""
    contents: dict[str, bytes] = {}
    problems = []
    for name, digest in sorted(files.items()):
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute():
            problems.append(f"{name}: leaves the bundle")
            continue
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            problems.append(f"{name}: missing ({error.strerror})")
            continue
        found = hashlib.sha256(content).hexdigest()
        if found != digest:
            problems.append(f"{name}: changed (sha256 {found[:12]}…, planned {digest[:12]}…)")
        else:
            contents[name] = content
    return contents, problems


def program_problems(plan: Plan, contents: Mapping[str, bytes]) -> Iterator[str]:
    """What does not fit between a plan and its program, of which every file is there unchanged."""
    texts = {name: content.decode("utf-8", "replace") for name, content in contents.items()}
    yield from _other_plan(plan, texts)
    stages = [name for name in texts if STAGE.fullmatch(name)]
    wanted = {f"program/stage_{stage}.py" for stage in range(len(plan.stages))}
    if missing := sorted(wanted - set(stages)):
        yield f"{', '.join(missing)}: not part of the program, the plan has stages that need them"
    called = {op for name in stages for op in IMPORT.findall(texts[name])}
    rows = {each.op for each in plan.kernels}
    for op in sorted(called - rows):
        yield f"kernels: no row of {op}, which the stages call"
    for row, each in enumerate(plan.kernels):
        if each.op not in called:
            yield f"kernels[{row}].op: {each.op!r} is called by no stage"
        else:
            yield from _other_params(row, each, texts.get(each.file, ""))


def _other_params(row: int, kernel: Kernel, text: str) -> Iterator[str]:
    """Tunables of a row that its file does not have, or has with another value."""
    constants = {
        name: int(value) for name, value in re.findall(r"(?m)^([A-Z][A-Z0-9_]*) = (\d+)$", text)
    }
    for name, value in kernel.params.items():
        if name not in constants:
            yield f"kernels[{row}].params.{name}: no constant of {kernel.file}"
        elif constants[name] != value:
            yield (
                f"kernels[{row}].params.{name}: {value}, {kernel.file} was made with"
                f" {constants[name]}"
            )


def _other_plan(plan: Plan, texts: Mapping[str, str]) -> Iterator[str]:
    """Fields of the plan that are not those that the program was made for."""
    if MADE_FOR not in texts:
        yield from _other_ends(plan, texts)
        return
    try:
        made = json.loads(texts[MADE_FOR])
    except json.JSONDecodeError as error:
        yield f"{MADE_FOR}: is no JSON: {error}"
        return
    yield from _differences("", json.loads(made_for(plan)), made)


def _other_ends(plan: Plan, texts: Mapping[str, str]) -> Iterator[str]:
    """Embeddings and heads of another shape, where a program does not say what it is made for."""
    wanted = (plan.model.vocab, plan.model.hidden)
    for name, text in texts.items():
        for matrix, rows, columns in ENDS.findall(text) if STAGE.fullmatch(name) else ():
            if (int(rows), int(columns)) != wanted:
                yield (
                    f"{name}: {matrix} has {rows} x {columns} numbers, model.vocab x model.hidden"
                    f" are {wanted[0]} x {wanted[1]}"
                )


def _differences(path: str, ours: Any, made: Any) -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(made, dict):
        for name in sorted({*ours, *made}):
            yield from _differences(f"{path}.{name}", ours.get(name), made.get(name))
    elif ours != made:
        yield f"{path[1:]}: {ours}, the program was made for {made}"

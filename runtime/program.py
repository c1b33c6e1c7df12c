"""Opens a bundle: the plan, and the stage programs whose every byte is the one that was planned.

A program is trusted code, so it is hashed, compiled from the very bytes that were hashed and
imported under a package name of its own. Nothing is read from or written to a bytecode cache, and
the bundle's folder never enters sys.path: its files can shadow nothing.
"""

import hashlib
import importlib
import importlib.util
import linecache
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec, all_suffixes
from pathlib import Path, PurePosixPath
from types import CodeType, ModuleType
from typing import Any

import msgspec

from plans.check import load_plan
from plans.check_program import program_problems, read_program
from plans.errors import BundleMismatch, InvalidFile
from plans.ops import Comm, KvCache, Parameter, StepInputs, Tensor
from plans.plan import Plan

PLAN_FILE = "plan.yaml"
PROGRAM_FOLDER = "program"
LISTED_MAX = 20
"""Problems that one error names; more would not fit a screen."""

Sampler = Callable[[Tensor, Tensor], Tensor]
"""(logits_RV, controls_R5) to int64 [2, R]: tokens, and 1 where a row's best logit is finite."""
Exchanger = tuple[
    Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor],
]
"""(out_TNH, lse_TN, rows_E, places_3E) to bytes for all peers; and (out_TNH, lse_TN, rows_S,
shares_GS, places_3E, bytes of all peers) to out_TNH, whose shared rows are merged in place."""
Forward = Callable[[dict[str, Tensor], StepInputs, KvCache, Comm], Tensor]
"""A stage: (weights, inputs, kv, comm) to hidden_TD, or to logits_RV on the last stage."""


@dataclass(frozen=True, kw_only=True)
class StageProgram:
    """One pipeline stage, ready to call."""

    parameters: tuple[Parameter, ...]
    forward: Forward
    recordable: bool = False
    """Steps may be recorded as CUDA graphs: nothing in them waits for the device, and other ranks
    are spoken to through `comm` alone. All of a step of decodes; of another step what is not in
    `apart`."""
    apart: tuple[str, ...] = ()
    """Ops whose launches follow the lengths of a step's sequences."""
    selects: str | None = None
    """Op behind which only the sampled rows are left."""
    sample: Sampler | None = None
    """Draws as `draw` of runtime/sampling.py, whose argument it is; None where nothing is faster
    than that, or where the stage has no logits."""
    exchange: Exchanger | None = None
    """On a GPU, packs and merges what kvp groups exchange (runtime/parallel/kvp.py)."""
    namespace: dict[str, Any] = field(default_factory=dict)
    """The module's own, in which `forward` finds its ops."""

    @contextmanager
    def replacing(self, ops: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
        """Inside, `forward` calls these in place of the ops of their names."""
        kept = {name: self.namespace[name] for name in ops}
        try:
            self.namespace.update(ops)
            yield
        finally:
            self.namespace.update(kept)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A plan and the verified sources of its program."""

    folder: Path
    plan: Plan
    sources: dict[str, bytes]
    """Python files of the program by path inside the bundle."""

    def load_stage(self, stage: int) -> StageProgram:
        """Imports a stage; raises BundleMismatch where it does not load here."""
        path = f"{PROGRAM_FOLDER}/stage_{stage}.py"
        name = f"{_register(self)}.stage_{stage}"
        try:
            module = importlib.import_module(name)
        except Exception as error:  # whatever its torch and triton calls raise on this machine
            raise BundleMismatch(
                f"{self.folder / path} does not load here: {error!r}; "
                "plan again on this machine, or install what the program was made with"
            ) from error
        return StageProgram(
            parameters=_parameters(self.folder / path, module),
            forward=_export(self.folder / path, module, "forward"),
            recordable=bool(getattr(module, "RECORDABLE", False)),
            apart=tuple(getattr(module, "APART", ())),
            selects=getattr(module, "SELECTS", None),
            sample=getattr(module, "SAMPLE", None),
            exchange=getattr(module, "EXCHANGE", None),
            namespace=vars(module),
        )


def listed(problems: Sequence[str]) -> str:
    """Problems one a line, as many as fit a screen, and how many more there are."""
    lines = [f"  {problem}" for problem in problems[:LISTED_MAX]]
    if len(problems) > LISTED_MAX:
        lines.append(f"  ... and {len(problems) - LISTED_MAX} more")
    return "\n".join(lines)


def load_bundle(path: str | Path) -> Bundle:
    """Reads and verifies a bundle; its programs are imported by `load_stage`, later.

    Raises InvalidFile for a folder or plan that is none, and BundleMismatch, naming every file,
    where the program is not the one that the plan records.
    """
    folder = Path(path).resolve()
    if not (folder / PLAN_FILE).is_file():
        raise InvalidFile(str(path), "", f"is no bundle: it holds no {PLAN_FILE}")
    plan = load_plan(folder / PLAN_FILE)
    if not plan.files:
        raise BundleMismatch(
            f"{path}: the bundle has no program (planned with --no-kernels); make it again without "
            f"that flag:\n  {plan.made_by.command.replace(' --no-kernels', '')} "
            f"--out {shlex.quote(str(path))} --overwrite"
        )
    sources, problems = _verify(folder, plan)
    if problems:
        raise BundleMismatch(
            f"{path}: the program is not the one that {PLAN_FILE} records:\n{listed(problems)}\n"
            "make the bundle again, or take an unchanged copy"
        )
    return Bundle(folder=folder, plan=plan, sources=sources)


def _verify(folder: Path, plan: Plan) -> tuple[dict[str, bytes], list[str]]:
    """Contents of the recorded Python files, and what is wrong with the rest."""
    contents, problems = read_program(folder, plan.files)
    for extra in _importable(folder / PROGRAM_FOLDER):
        name = extra.relative_to(folder).as_posix()
        if name not in plan.files:
            problems.append(f"{name}: not part of the plan")
    if not problems:
        problems += program_problems(plan, contents)
    return {name: each for name, each in contents.items() if name.endswith(".py")}, problems


def _importable(program: Path) -> Iterable[Path]:
    """Files of the program that Python could import; caches are never read, so they do no harm."""
    for path in sorted(program.rglob("*")):
        if path.name.endswith(tuple(all_suffixes())) and "__pycache__" not in path.parts:
            yield path


def _parameters(path: Path, module: ModuleType) -> tuple[Parameter, ...]:
    rows = _export(path, module, "PARAMETERS")
    try:
        return msgspec.convert(rows, tuple[Parameter, ...], from_attributes=True)
    except msgspec.ValidationError as error:
        raise BundleMismatch(f"{path}: PARAMETERS: {error}") from None


def _export(path: Path, module: ModuleType, name: str) -> Any:
    value = getattr(module, name, None)
    if value is None:
        raise BundleMismatch(f"{path} exports no {name}; make the bundle again")
    return value


class _Finder(MetaPathFinder, InspectLoader):
    """Finds and loads the modules of one bundle from the bytes that were verified."""

    def __init__(self, package: str, bundle: Bundle) -> None:
        self._package = package
        self._folder = bundle.folder
        self._sources: dict[str, tuple[str, bytes]] = {package: (PROGRAM_FOLDER, b"")}
        for path, content in bundle.sources.items():
            parts = PurePosixPath(path).with_suffix("").parts
            if parts[0] == PROGRAM_FOLDER:
                self._sources[".".join((package, *parts[1:]))] = (path, content)

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Spec of a module of this bundle; None for every other name."""
        if fullname not in self._sources:
            return None
        origin = str(self._folder / self._sources[fullname][0])
        spec = ModuleSpec(fullname, self, origin=origin, is_package=fullname == self._package)
        spec.has_location = fullname != self._package
        return spec

    def get_source(self, fullname: str) -> str:
        """Text of a module; tracebacks and Triton, which compiles from source, read it."""
        return importlib.util.decode_source(self._sources[fullname][1])

    def get_code(self, fullname: str) -> CodeType:
        """Code compiled from the verified bytes."""
        path, content = self._sources[fullname]
        # the text that inspect shows must be the text that runs, even if the file changes later
        text = self.get_source(fullname)
        file = str(self._folder / path)
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        return compile(content, file, "exec", dont_inherit=True)


def _register(bundle: Bundle) -> str:
    """Package name under which the bundle's modules are found; the same bytes give the same."""
    digest = hashlib.sha256(str(bundle.folder).encode())
    for path, content in sorted(bundle.sources.items()):
        digest.update(path.encode() + b"\0" + hashlib.sha256(content).digest())
    package = f"medha_program_{digest.hexdigest()[:16]}"
    if not any(getattr(each, "_package", None) == package for each in sys.meta_path):
        sys.meta_path.append(_Finder(package, bundle))
    return package

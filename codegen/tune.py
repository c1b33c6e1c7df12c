"""Chooses the tunables of our kernels on the device at hand: gate, values, then time.

Nothing is tuned while serving: a default always works, and what this module finds is a dated record
(plans/tuned.py) that planning reads. For each job, one op on one problem of one regime:

1. the space of the spec's Search, the default first, then by how many tunables differ from it
2. the gate compiles each candidate for sm_90 in a child process; what it rejects is not run
3. what is left must equal the op's reference within its tolerance, on random data of odd sizes
4. survivors are timed in turn inside CUDA graphs; a win below the spread keeps the default. With
   them, where the op's file can leave the product to the library, that: planning compares the two

A problem that steps do not resemble teaches nothing: PROBLEMS lists those of each op and regime.
"""

import hashlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from codegen.clock import Clock
from codegen.gate import judge
from codegen.kernels import KERNELS, load_spec, source_texts
from codegen.kernels.base import Compilation, Search
from codegen.problems import Problem, Where, difference, make
from plans.errors import UsageError
from plans.tuned import TOKENS_MAX, Bucket

Effort = Literal["none", "quick", "full"]
EFFORTS: Mapping[Effort, str] = {
    "none": "times the defaults, changes nothing",
    "quick": "the default and up to 7 others near it that pass the gate",
    "full": "the whole space",
}
SURVIVORS = {"none": 1, "quick": 8, "full": 1 << 30}
"""Candidates that are timed."""
GATED = {"none": 1, "quick": 12, "full": 1 << 30}
"""Candidates that are compiled to find them."""
WITHOUT_OURS = {TOKENS_MAX: 0}
"""Parameters with which an op's file takes the library's product for any step."""

K = 1024
LLAMA_8B = {"heads": 32, "kv_heads": 8, "head_dim": 128, "page_tokens": 128}
LLAMA_70B_TP8 = {"heads": 8, "kv_heads": 1, "head_dim": 128, "page_tokens": 128}
_PRODUCTS = {  # of an 8B model, and of one rank of a 70B model at tp 8
    "gate_up_silu": ((28672, 4096), (7168, 8192)),
    "linear": ((4096, 4096), (4096, 14336), (8192, 3584), (128256, 4096)),
    "qkv_rope_write": ((6144, 4096), (1280, 8192)),
}
_ROWS = tuple({"tokens": tokens, "width": width} for width in (4096, 8192) for tokens in (64, 2048))
PROBLEMS: Mapping[str, Mapping[str, tuple[Mapping[str, int], ...]]] = {
    **{
        op: {
            regime: tuple({"tokens": t, "n": n, "k": k} for n, k in shapes for t in tokens)
            for regime, tokens in (("few", (1, 16)), ("some", (64,)))
        }
        for op, shapes in _PRODUCTS.items()
    },
    "add_rms_norm": {"rows": _ROWS},
    "kv_write": {
        "rows": tuple({"tokens": tokens, "heads": 8, "head_dim": 128} for tokens in (64, 2048))
    },
    "paged_attention": {
        "chunk": tuple(
            {"tokens": tokens, "keys": 128 * K, **heads}
            for heads in (LLAMA_8B, LLAMA_70B_TP8)
            for tokens in (512, 2048)
        ),
        "decode": tuple(
            {"batch": batch, "keys": keys * K, **heads}
            for heads in (LLAMA_8B, LLAMA_70B_TP8)
            for batch, keys in ((1, 4), (1, 128), (32, 4))
        ),
        "short": ({"tokens": 16, "keys": 32 * K, **LLAMA_8B},),
    },
    "rms_norm": {"rows": _ROWS},
    "rope": {
        "rows": tuple(
            {"tokens": tokens, "heads": heads, "head_dim": 128}
            for heads in (8, 32)
            for tokens in (64, 2048)
        )
    },
    "silu_mul": {
        "rows": tuple({"tokens": tokens, "width": 14336} for tokens in (64, 2048)),
    },
}
CHECKED = {"batch": 5, "keys": 2085, "tokens": 131}
"""Most of each size on which values are compared: odd, and small enough for the reference."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One op on one problem."""

    op: str
    search: Search
    sizes: Mapping[str, int]

    @property
    def title(self) -> str:
        """Op, regime and sizes."""
        sizes = ", ".join(f"{name} {size}" for name, size in self.sizes.items())
        return f"{self.op} {self.search.regime}: {sizes}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a job found, and what fell out on the way: params and why."""

    job: Job
    bucket: Bucket
    rejected: tuple[tuple[Mapping[str, int], str], ...]


def jobs(ops: Sequence[str] = ()) -> tuple[list[Job], list[str]]:
    """Jobs of the ops named, else of all; and a line for each op that cannot be tuned, and why."""
    for op in ops:
        load_spec(op)  # raises UnknownName
    found, left = [], []
    for op in ops or KERNELS:
        spec = load_spec(op)
        if not spec.params:
            continue
        if not spec.searches:
            left.append(f"{op}: its spec names no search space")
        for search in spec.searches:
            problems = PROBLEMS.get(op, {}).get(search.regime, ())
            if not problems:
                left.append(f"{op}: codegen/tune.py has no problems of regime {search.regime}")
            found += [Job(op=op, search=search, sizes=sizes) for sizes in problems]
    return found, left


def source_sha256(op: str) -> str:
    """Of the sources that a bundle gets, with their default parameters."""
    text = "\0".join(f"{name}\0{text}" for name, text in source_texts(op, "triton").items())
    return hashlib.sha256(text.encode()).hexdigest()


def space(job: Job) -> list[dict[str, int]]:
    """Values of the job's tunables: the default first, then what differs from it least."""
    defaults = load_spec(job.op).params
    names = list(job.search.values)
    start = {name: defaults[name] for name in names}
    every = [
        dict(zip(names, row, strict=True)) for row in itertools.product(*job.search.values.values())
    ]

    def changes(params: Mapping[str, int]) -> int:
        return sum(params[name] != start[name] for name in names)

    return [start, *sorted((each for each in every if each != start), key=changes)]


class Gate:
    """The compile gate with a memory: problems of one op need the same kernels again and again."""

    def __init__(self, workers: int = 1) -> None:
        """workers: child processes that compile side by side."""
        self._workers = workers
        self._known: list[tuple[str, Compilation, tuple[str, ...]]] = []

    def prepare(self, found: Sequence[Job], effort: Effort) -> None:
        """Compiles whatever the jobs will ask for."""
        self.reasons([pair for job in found for pairs in wanted(job, effort) for pair in pairs[1]])

    def reasons(self, pairs: Sequence[tuple[str, Compilation]]) -> list[tuple[str, ...]]:
        """Why each compilation is rejected; empty for a good one."""
        new: list[tuple[str, Compilation]] = []
        for pair in pairs:
            if self._find(*pair) is None and pair not in new:
                new.append(pair)
        if new:
            shares = [new[first :: self._workers] for first in range(self._workers)]
            with ThreadPoolExecutor(self._workers) as pool:
                for share, verdicts in zip(shares, pool.map(judge, shares), strict=True):
                    for (op, each), verdict in zip(share, verdicts, strict=True):
                        self._known.append((op, each, verdict.reasons))
        return [self._find(*pair) or () for pair in pairs]

    def _find(self, op: str, compilation: Compilation) -> tuple[str, ...] | None:
        return next((why for o, c, why in self._known if (o, c) == (op, compilation)), None)


Wanted = tuple[dict[str, int], list[tuple[str, Compilation]]]


def wanted(job: Job, effort: Effort) -> list[Wanted]:
    """Candidates and what each needs compiled; twins of one binary come once, the default first."""
    defaults = load_spec(job.op).params
    found: list[Wanted] = []
    for params in space(job):
        pairs = [
            (job.op, each) for each in job.search.compilations({**defaults, **params}, job.sizes)
        ]
        if not pairs or all(pairs != other for _, other in found):
            found.append((params, pairs))
    return found[: GATED[effort]]


@contextmanager
def applied(op: str, params: Mapping[str, int]) -> Iterator[None]:
    """Runs the op's kernel with these constants; what it remembers of others is forgotten."""
    module: Any = pkgutil.resolve_name(f"codegen.kernels.{op}.triton")
    before = {name: getattr(module, name) for name in params}
    _set(module, params)
    try:
        yield
    finally:
        _set(module, before)


def _set(module: Any, params: Mapping[str, int]) -> None:
    if all(getattr(module, name) == value for name, value in params.items()):
        return
    for name, value in params.items():
        setattr(module, name, value)
    for each in vars(module).values():
        if callable(getattr(each, "cache_clear", None)):
            each.cache_clear()


def run(
    job: Job,
    where: Where,
    clock: Clock,
    *,
    effort: Effort,
    rates: tuple[float, float],
    gate: Gate,
) -> Outcome:
    """Finds the best parameters of a job.

    rates   FLOP/s and bytes/s of the device, for the floor
    errors  UsageError where the kernel with its default parameters does not give the reference's
            values: then nothing may be timed
    """
    rejected: list[tuple[Mapping[str, int], str]] = []
    survivors: list[dict[str, int]] = []
    problems: list[Problem] = []
    errors: list[float] = []
    for params, reason in _gated(job, effort, gate):
        if len(survivors) == SURVIVORS[effort]:
            break
        tried = reason or _tried(job, params, where)
        if not isinstance(tried, str):
            survivors.append(params)
            problems.append(tried[0])
            errors.append(tried[1])
        elif survivors:
            rejected.append((params, tried))
        else:
            raise UsageError(f"{job.title}: the default parameters fail: {tried}")
    timed = [_calls(job.op, *each) for each in zip(survivors, problems, strict=True)]
    bounded = TOKENS_MAX in load_spec(job.op).params
    if bounded:
        timed.append(_calls(job.op, WITHOUT_OURS, problems[0]))
    timings = clock(timed)
    library = timings.pop() if bounded else None
    best = min(range(len(timings)), key=lambda at: timings[at].us)
    gain = timings[0].us - timings[best].us
    if gain <= max(timings[0].spread_us, timings[best].spread_us):
        best = 0
    floor_s = problems[0].floor_s(flops_per_s=rates[0], bytes_per_s=rates[1])
    bucket = Bucket(
        regime=job.search.regime,
        when=dict(job.sizes),
        params=survivors[best],
        us=round(timings[best].us, 3),
        spread_us=round(timings[best].spread_us, 3),
        default_us=round(timings[0].us, 3),
        floor_us=round(floor_s * 1e6, 3),
        error=round(errors[best], 4),
        library_us=None if library is None else round(library.us, 3),
    )
    return Outcome(job=job, bucket=bucket, rejected=tuple(rejected))


def _gated(job: Job, effort: Effort, gate: Gate) -> Iterator[tuple[dict[str, int], str]]:
    """Candidates with the gate's reason to reject them, or "".

    The default is never rejected here: it is what runs today, whatever the gate says of it.
    """
    for number, (params, pairs) in enumerate(wanted(job, effort)):
        reasons = gate.reasons(pairs) if number else []
        yield params, "; ".join(reason for each in reasons for reason in each)


def checked(job: Job, params: Mapping[str, int], where: Where) -> float:
    """Largest difference from the reference as a share of the tolerance, on small odd sizes."""
    sizes = {name: min(size, CHECKED.get(name, size)) for name, size in job.sizes.items()}
    if "keys" in sizes and "tokens" in sizes:
        sizes["tokens"] = min(sizes["tokens"], sizes["keys"])
    one = Where(device=where.device, dtype=where.dtype, cold=False)
    with applied(job.op, params):
        return difference(make(job.op, sizes, one))


def _tried(job: Job, params: Mapping[str, int], where: Where) -> tuple[Problem, float] | str:
    """The problem with these parameters and their error, or why they are of no use."""
    try:
        error = checked(job, params, where)
        if not error <= 1:
            return f"values are off by {error:.3g} x the tolerance"
        with applied(job.op, params):
            return make(job.op, job.sizes, where), error
    except Exception as failure:  # noqa: BLE001 - whatever a compiler raises drops a candidate
        return f"{type(failure).__name__}: {failure}".splitlines()[0]


def _calls(op: str, params: Mapping[str, int], problem: Problem) -> list[Callable[[], Any]]:
    """The problem's calls with the parameters in force: a graph keeps what it recorded."""

    def with_params(call: Callable[[], Any]) -> Callable[[], Any]:
        def run_it() -> Any:
            with applied(op, params):
                return call()

        return run_it

    return [with_params(call) for call in problem.calls]

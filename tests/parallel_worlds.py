"""Meshes of real worker processes for tests, models to run on them, and schedulers that misbehave.

One pool of workers a mesh; the models of several families, and all examples, run inside it.
"""

import contextlib
import functools
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from builders import make_plan, tiny_model
from live_bundles import write_bundle

from codegen.emit import emit_program
from codegen.models import load_model
from plans.mesh import Parallelism
from plans.model import Model
from plans.ops import Source
from plans.plan import Plan
from runtime.clock import WallClock
from runtime.executor.base import Chunk, NewPages, Step
from runtime.kvcache import PagePools
from runtime.parallel.control import Workers
from runtime.parallel.executor import ParallelExecutor
from runtime.parallel.launch import running_workers
from runtime.program import load_bundle
from runtime.request import Request
from runtime.request import Sequence as Live
from runtime.sampling_params import SamplingParams
from runtime.weights import random_tensor

GREEDY = SamplingParams()
SEED = 3
CONTEXT = 256
ROWS = ((64, 32), (CONTEXT, 16))
FAMILIES = {
    "llama": tiny_model(),
    "qwen2": tiny_model(qkv_bias=True, tie_embeddings=True),
    "qwen3": tiny_model(qk_norm=True, head_dim=32),
}
"""Eight KV heads would divide by 8; two make four ranks share one."""
TOLERANCE = 1e-4
"""A logit behind four layers ends a chain of about 4 x (64 + 64 + 128 + 128) fp32 additions, whose
roundings, 2^-24 of sums below 4 each, add up like a random walk to sqrt(1536) x 2^-24 x 4 = 9e-6.
More than ten times that does not come from rounding, in whatever order ranks and shards add."""
NEAR_TIE = 2 * TOLERANCE


def mesh_name(mesh: Parallelism) -> str:
    return f"tp{mesh.tp}-spp{mesh.spp}-kvp{mesh.kvp}"


def mesh_plan(mesh: Parallelism, model: Model, **changes: Any) -> Plan:
    """A plan of a model on a mesh; shards are small, so that requests grow over the groups."""
    return make_plan(model=model, parallelism=mesh, rows=ROWS, **changes)


def mesh_bundle(folder: Path, plan: Plan, additions: Mapping[str, str] | None = None) -> Path:
    """The emitted program of a plan; additions are text behind files of it, by name."""
    program = emit_program(plan, target="torch")
    files = {name: text.decode() for name, text in program.files.items()}
    for name, text in (additions or {}).items():
        files[f"program/{name}"] += text
    return write_bundle(folder, plan, files)


@functools.cache
def reference_of(model: Model) -> torch.nn.Module:
    """The model file with the random weights that the ranks take their slices of."""
    module = load_model(model.family)(model)
    for name, parameter in module.named_parameters():
        source = Source(name=name, shape=tuple(parameter.shape))
        parameter.data = random_tensor(source, seed=SEED).to(parameter.dtype)
    return module.requires_grad_(requires_grad=False)


def assert_greedy(
    model: Model, prompt: Sequence[int], answer: Sequence[int], near_tie: float = NEAR_TIE
) -> None:
    """Each token of an answer is the best one of the whole sequence in one process.

    Teacher-forced, so that a near-tie spoils no comparison behind it.
    """
    if not answer:
        return
    tokens = torch.tensor([*prompt, *answer[:-1]])
    logits_TV = reference_of(model)(tokens, torch.arange(len(tokens)))[len(prompt) - 1 :]
    for place, (token, logits_V) in enumerate(zip(answer, logits_TV, strict=True)):
        best = float(logits_V.max())
        behind = best - float(logits_V[token])
        assert behind <= near_tie, f"token {place} of the answer is {behind} behind the best"


def prompt_of(tokens: int, seed: int, vocab: int = 256) -> list[int]:
    """Random token ids."""
    digest = hashlib.sha256(f"{seed} {tokens}".encode()).digest()
    draw = random.Random(digest)
    return [draw.randrange(vocab) for _ in range(tokens)]


# --- pools ----------------------------------------------------------------------------------------


@dataclass
class Pool:
    """The workers of one mesh, and the bundles of all families on it."""

    workers: Workers
    bundles: dict[str, Path]
    plans: dict[str, Plan]
    opened: str

    def executor(self, family: str, plan: Plan | None = None) -> ParallelExecutor:
        """A fresh executor over a family's program."""
        if family != self.opened:
            self.workers.open(str(self.bundles[family]), self.plans[family], "random", SEED)
            self.opened = family
        return ParallelExecutor(plan or self.plans[family], self.workers, WallClock())


@contextlib.contextmanager
def pool_of(mesh: Parallelism, folder: Path, families: Sequence[str] = ()) -> Iterator[Pool]:
    """Starts the workers of a mesh."""
    names = list(families or FAMILIES)
    plans = {name: mesh_plan(mesh, FAMILIES[name]) for name in names}
    bundles = {name: mesh_bundle(folder / name, plan) for name, plan in plans.items()}
    first = names[0]
    plans = {name: load_bundle(bundles[name]).plan for name in names}
    with running_workers(str(bundles[first]), plans[first], "random", SEED, None) as [workers]:
        yield Pool(workers=workers, bundles=bundles, plans=plans, opened=first)


# --- a scheduler without a rule -------------------------------------------------------------------


@dataclass
class Known:
    """A request as the scheduler below sees it."""

    live: Live
    prompt: list[int]
    answer: list[int] = field(default_factory=list)
    waits_for: int | None = None
    """Step that samples its next token."""

    @property
    def missing(self) -> int:
        return len(self.prompt) + len(self.answer) - self.live.scheduled


class RandomScheduler:
    """Submits whatever is legal: any chunk sizes, mixtures, homes, evictions, cancellations, and as
    many steps in flight as the executor takes. `draw` decides, and when the ranks answer.
    """

    def __init__(self, plan: Plan, executor: ParallelExecutor, draw: random.Random) -> None:
        self.plan = plan
        self.executor = executor
        self.draw = draw
        self.known: dict[int, Known] = {}
        self.done: dict[int, Known] = {}
        self.most_in_flight = 0
        self._pools = PagePools(
            groups=plan.parallelism.kvp,
            pages=plan.kv.pages_per_rank,
            page_tokens=plan.kv.page_tokens,
            shard_tokens=plan.kv.tokens_per_kvp_shard,
        )
        self._steps = 0
        self._in_flight: dict[int, set[int]] = {}
        self._evicted: list[int] = []
        self._ended: list[int] = []

    def add(
        self, number: int, prompt: list[int], max_tokens: int, sampling: SamplingParams = GREEDY
    ) -> None:
        request = Request(
            number=number, arrival_s=0.0, prompt_tokens=len(prompt), max_tokens=max_tokens
        )
        live = Live(request=request, deadline_s=1.0, work_s=1.0, tbt_s=1.0)
        live.home = self.draw.randrange(self.plan.parallelism.kvp)
        self.known[number] = Known(live, prompt)
        self.executor.add_request(number, prompt, sampling)

    def run(self) -> None:
        """Until every request has its tokens or was cancelled."""
        while self.known or self.executor.in_flight():
            while self.executor.can_submit() and self._submit():
                self.most_in_flight = max(self.most_in_flight, self.executor.in_flight())
                if self.draw.random() < 0.3:
                    break
            self._collect()
        assert not self._in_flight

    def cancel(self, number: int) -> None:
        """Ends a request, whatever it has in flight."""
        known = self.known.pop(number)
        self._pools.release(known.live)
        self._ended.append(number)
        self.done[number] = known

    def _submit(self) -> bool:
        busy = {number for numbers in self._in_flight.values() for number in numbers}
        if self.known and self.draw.random() < 0.05:
            self.cancel(self.draw.choice(sorted(self.known)))
        idle = sorted(set(self.known) - busy)
        if idle and self.draw.random() < 0.1:
            self._evict(self.draw.choice(idle))
        able = [n for n, known in self.known.items() if known.waits_for is None and known.missing]
        if not able:
            return False
        chosen = self.draw.sample(able, self.draw.randint(1, len(able)))
        rows = [(number, self._take(number)) for number in chosen]
        step = self._step([(number, *taken) for number, taken in rows if taken is not None])
        if not step.tokens:
            self._evict_largest(busy)
            return False
        self._in_flight[step.step_id] = {
            *step.decodes.tolist(),
            *(chunk.request for chunk in step.chunks),
        }
        self.executor.submit(step)
        self._steps += 1
        return True

    def _evict(self, number: int) -> None:
        known = self.known[number]
        self._pools.release(known.live)
        known.live.scheduled = 0
        known.live.home = self.draw.randrange(self.plan.parallelism.kvp)
        self._evicted.append(number)

    def _evict_largest(self, busy: set[int]) -> None:
        """Nothing fits: somebody without work in flight gives everything back."""
        idle = [number for number in self.known if number not in busy]
        if idle:
            self._evict(max(idle, key=lambda number: self.known[number].live.scheduled))

    def _take(self, number: int) -> tuple[int, NewPages | None] | None:
        """Tokens for a request and the pages that they need; None where there is no page."""
        known = self.known[number]
        shard_tokens = self.plan.kv.tokens_per_kvp_shard
        prefix = known.live.scheduled
        most = min(known.missing, shard_tokens - prefix % shard_tokens)
        tokens = most if self.draw.random() < 0.3 else self.draw.randint(1, most)
        end = prefix + tokens
        shard = prefix // shard_tokens
        group = self._pools.group_of(known.live.home, shard)
        if self._pools.missing_pages(known.live, end) > self._pools.free_pages(group):
            return None
        pages = self._pools.grow(known.live, end)
        return tokens, NewPages(request=number, shard=shard, pages=pages) if pages else None

    def _step(self, rows: list[tuple[int, int, NewPages | None]]) -> Step:
        decodes, chunks = [], []
        for number, tokens, _ in rows:
            known = self.known[number]
            samples = tokens == known.missing
            if samples and tokens == 1 and known.answer:
                decodes.append((number, known.live.scheduled, known.live.home))
            else:
                chunks.append(
                    Chunk(
                        request=number,
                        tokens=tokens,
                        prefix=known.live.scheduled,
                        home=known.live.home,
                        samples=samples,
                    )
                )
            known.live.scheduled += tokens
            if samples:
                known.waits_for = self._steps
        columns = np.array(decodes, dtype=np.int64).reshape(-1, 3).T
        step = Step(
            step_id=self._steps,
            decodes=columns[0],
            decode_prefix=columns[1],
            decode_home=columns[2],
            chunks=tuple(chunks),
            pages=tuple(new for _, _, new in rows if new is not None),
            evicted=tuple(self._evicted),
            ended=tuple(self._ended),
        )
        if step.tokens:
            self._evicted, self._ended = [], []
        return step

    def _collect(self) -> None:
        for result in self.executor.wait(until_s=None):
            step = result.step
            del self._in_flight[step.step_id]
            sampled = [*step.decodes.tolist(), *(c.request for c in step.chunks if c.samples)]
            assert sorted(result.tokens) == sorted(sampled), "a token is missing or was drawn twice"
            for number, token in result.tokens.items():
                known = self.known.get(number)
                if known is None:
                    continue  # cancelled meanwhile
                known.waits_for = None
                known.answer.append(token)
                if len(known.answer) == known.live.request.max_tokens:
                    self.cancel(number)

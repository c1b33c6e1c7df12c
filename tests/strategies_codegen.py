"""Models, weights and steps for the compiler's tests, and a machine that runs emitted programs.

The machine keeps the runtime's contract of plans/ops.py and nothing else of the runtime: a rank is
a thread, a collective is a barrier.
"""

import importlib
import math
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
import triton
import triton.language as tl
from builders import tiny_model
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from codegen.emit import EmittedProgram
from codegen.models import load_model
from plans.mesh import Coordinates, coordinates, rank_at
from plans.model import Model, Rope, RopeScaling
from plans.ops import Parameter
from plans.plan import Plan

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}


def rounding_interpreter(patch: pytest.MonkeyPatch) -> None:
    """Lets the interpreter round fp32 to bf16 as the hardware does; Triton's own cuts it off."""
    if not isinstance(triton.jit(rounding_interpreter), InterpretedFunction):
        return
    cut = InterpreterBuilder.cast_impl

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cut(self, src, dst_type)
        rounded = torch.from_numpy(src.data.astype("float32")).bfloat16()
        bits = rounded.view(torch.uint16).numpy().reshape(src.data.shape)
        return TensorHandle(bits, dst_type.scalar)

    patch.setattr(InterpreterBuilder, "cast_impl", cast)


def logit_tolerance(logits: torch.Tensor) -> float:
    """How far fp32 logits of one tiny model may be apart when only orders of summation differ.

    A product of 128 terms is off by at most 128 x 2^-24 = 7.6e-6 of its terms' size, typically by
    sqrt(128) x 2^-24 = 7e-7; some thirty products in a row add up to sqrt(30) x 7e-7 = 4e-6. Five
    times that, so that hypothesis finds bugs and no tails: a wrong mask or row is off by 1e-2 up.
    """
    return 2e-5 * max(1.0, logits.abs().max().item())


# --- models ---------------------------------------------------------------------------------------


@st.composite
def ropes(draw: st.DrawFn) -> Rope:
    theta = draw(st.sampled_from([1e4, 5e5, 1e6]))
    kind = draw(st.sampled_from([None, "linear", "llama3", "yarn"]))
    if kind is None:
        return Rope(theta=theta)
    context = draw(st.sampled_from([32, 64, 256, 8192]))
    factor = draw(st.sampled_from([1.5, 4.0, 8.0]))
    return Rope(
        theta=theta,
        scaling=RopeScaling(kind=kind, factor=factor, original_context_tokens=context),
    )


@st.composite
def small_models(draw: st.DrawFn) -> Model:
    """Models of all shapes that the llama family knows, small enough to run at once."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    return tiny_model(
        layers=draw(st.integers(1, 3)),
        hidden=draw(st.sampled_from([24, 48])),
        heads=kv_heads * draw(st.sampled_from([1, 2, 4])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 16])),
        ffn=draw(st.sampled_from([40, 72])),
        vocab=draw(st.sampled_from([50, 64])),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        rope=draw(ropes()),
    )


def named_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Weights that keep activations near 1: norms around 1, matrices scaled by their width."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    noise = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + noise / 4
    return noise / math.sqrt(shape[-1]) if len(shape) > 1 else noise / 4


def reference(model: Model) -> torch.nn.Module:
    """The model file with named weights: what every program has to equal."""
    module = load_model(model.family)(model)
    for name, parameter in module.named_parameters():
        parameter.data = named_tensor(name, tuple(parameter.shape)).to(parameter.dtype)
    return module.requires_grad_(requires_grad=False)


def rank_weights(rows: Any, tp: int, tp_rank: int) -> dict[str, torch.Tensor]:
    """What a loader makes of a stage's PARAMETERS for one rank."""
    weights = {}
    for parameter in msgspec.convert(rows, tuple[Parameter, ...]):
        pieces = [
            named_tensor(source.name, source.shape)[parameter.source_slice(source, tp, tp_rank)]
            for source in parameter.sources
        ]
        weights[parameter.name] = torch.cat(pieces).to(DTYPES[parameter.dtype])
        assert weights[parameter.name].shape == parameter.shape
    return weights


# --- the machine ----------------------------------------------------------------------------------


class Wires:
    """Values that the ranks of one step exchange: each call waits for all members of its group."""

    def __init__(self, plan: Plan) -> None:
        ranks = range(plan.parallelism.ranks)
        places = [coordinates(plan.parallelism, rank) for rank in ranks]
        self._values: dict[int, Any] = {}
        keys = [(place.stage, place.group) for place in places]
        self._tp = {key: threading.Barrier(plan.parallelism.tp) for key in keys}
        keys = [(place.stage, place.tp) for place in places]
        self._kvp = {key: threading.Barrier(plan.parallelism.kvp) for key in keys}

    def exchange(
        self, barrier: threading.Barrier, rank: int, others: list[int], value: Any
    ) -> list:
        """Everybody's value, in the order of `others`."""
        self._values[rank] = value
        barrier.wait(60)
        values = [self._values[other] for other in others]
        barrier.wait(60)
        return values

    def of_tp(self, plan: Plan, place: Coordinates, value: Any) -> list:
        members = [
            rank_at(plan.parallelism, msgspec.structs.replace(place, tp=tp))
            for tp in range(plan.parallelism.tp)
        ]
        barrier = self._tp[place.stage, place.group]
        return self.exchange(barrier, rank_at(plan.parallelism, place), members, value)

    def of_kvp(self, plan: Plan, place: Coordinates, value: Any) -> list:
        members = [
            rank_at(plan.parallelism, msgspec.structs.replace(place, group=group))
            for group in range(plan.parallelism.kvp)
        ]
        barrier = self._kvp[place.stage, place.tp]
        return self.exchange(barrier, rank_at(plan.parallelism, place), members, value)


@dataclass(kw_only=True)
class ThreadComm:
    """Comm of one rank."""

    plan: Plan
    place: Coordinates
    wires: Wires

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.wires.of_tp(self.plan, self.place, x)).sum(0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.wires.of_tp(self.plan, self.place, x), dim=-1)

    def peers(self, slots: int, slot_bytes: int) -> None:
        """Threads have no memory that the interpreter's kernels could wait on together."""

    def vocab_offset(self, share: int) -> int:
        return self.place.tp * share

    def merge(self, out_TNH: torch.Tensor, lse_TN: torch.Tensor) -> torch.Tensor:
        """Softmax over the groups' log sums (design section 4), in double precision."""
        parts = self.wires.of_kvp(self.plan, self.place, (out_TNH, lse_TN))
        weight_GTN = torch.stack([lse for _, lse in parts]).double().softmax(0).nan_to_num(0.0)
        out_GTNH = torch.stack([out for out, _ in parts]).double()
        return (out_GTNH * weight_GTN[..., None]).sum(0).to(out_TNH.dtype)


@contextmanager
def loaded(program: EmittedProgram, folder: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Writes a program and imports its modules as siblings of one private package."""
    package = f"emitted_{id(program)}"
    (folder / package).mkdir(parents=True)
    for path, content in program.files.items():
        (folder / package / Path(path).name).write_bytes(content)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield lambda name: importlib.import_module(f"{package}.{name}")
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.startswith(package)]:
            del sys.modules[name]


@dataclass
class Sequence:
    """A request of a test: its tokens, how many are done, and its pages in each group."""

    tokens: list[int]
    done: int = 0
    pages: dict[int, list[int]] = field(default_factory=dict)
    logits: list[torch.Tensor] = field(default_factory=list)


class Machine:
    """All ranks of one replica, running steps of packed sequences."""

    def __init__(self, plan: Plan, load: Callable[[str], ModuleType], *, seed: int = 0) -> None:
        self.plan = plan
        self.random = torch.Generator().manual_seed(seed)
        self.programs = [load(f"stage_{stage}") for stage in range(len(plan.stages))]
        self.places = [
            coordinates(plan.parallelism, rank) for rank in range(plan.parallelism.ranks)
        ]
        self.weights = [
            rank_weights(self.programs[each.stage].PARAMETERS, plan.parallelism.tp, each.tp)
            for each in self.places
        ]
        self.caches = [self._cache(each) for each in self.places]
        pool = plan.kv.pages_per_rank
        groups = range(plan.parallelism.kvp)
        self.free = {g: torch.randperm(pool, generator=self.random).tolist() for g in groups}

    def _cache(self, place: Coordinates) -> SimpleNamespace:
        """Pages full of NaN: what was never written must not be read."""
        plan = self.plan
        heads = max(plan.model.kv_heads // plan.parallelism.tp, 1)
        shape = (plan.kv.pages_per_rank, plan.kv.page_tokens, heads, plan.model.head_dim)
        first, end = plan.stages[place.stage]
        pages = [
            [torch.full(shape, torch.nan).to(DTYPES[plan.kv.dtype]) for _ in range(first, end)]
            for _ in "kv"
        ]
        scales = [
            [torch.full((shape[0], heads), torch.nan) for _ in range(first, end)] for _ in "kv"
        ]
        return SimpleNamespace(
            page_tokens=plan.kv.page_tokens,
            k_pages=pages[0],
            v_pages=pages[1],
            k_scales=scales[0],
            v_scales=scales[1],
        )

    def inputs(self, work: list[tuple[Sequence, int]], group: int) -> SimpleNamespace:
        """StepInputs of one group, all rows sampled; pages are taken as they are needed."""
        page_tokens, shard = self.plan.kv.page_tokens, self.plan.kv.tokens_per_kvp_shard
        ids, positions, slots, starts, kv_lens, tables = [], [], [], [0], [], []
        for sequence, count in work:
            first, end = sequence.done, sequence.done + count
            newest = first // shard
            assert (end - 1) // shard == newest, "a chunk crosses a shard boundary"
            held = min(max(end - group * shard, 0), shard)
            pages = sequence.pages.setdefault(group, [])
            while len(pages) * page_tokens < held:
                pages.append(self.free[group].pop())
            ids += sequence.tokens[first:end]
            positions += range(first, end)
            for at in range(first - group * shard, end - group * shard):
                page, offset = divmod(at, page_tokens)
                slots.append(pages[page] * page_tokens + offset if newest == group else -1)
            starts.append(len(ids))
            kv_lens.append(held)
            tables.append(pages)
        width = max(1, *map(len, tables))
        rows = [[*pages, *[0] * (width - len(pages))] for pages in tables]
        return SimpleNamespace(
            token_ids_T=torch.tensor(ids),
            positions_T=torch.tensor(positions),
            slots_T=torch.tensor(slots),
            query_starts_B1=torch.tensor(starts, dtype=torch.int32),
            kv_lens_B=torch.tensor(kv_lens, dtype=torch.int32),
            page_table_BP=torch.tensor(rows, dtype=torch.int32),
            sample_rows_R=torch.arange(len(ids)),
        )

    def step(self, work: list[tuple[Sequence, int]]) -> None:
        """One step of (sequence, tokens) rows; every sequence keeps its tokens' logits."""
        inputs = [self.inputs(work, group) for group in range(self.plan.parallelism.kvp)]
        wires = Wires(self.plan)
        results: dict[int, torch.Tensor] = {}
        for stage in range(len(self.programs)):
            results = self._run_stage(stage, inputs, wires, list(results.values()))
        first, *others = results.values()
        for other in others:  # every rank has all logits
            torch.testing.assert_close(other, first, rtol=1e-5, atol=1e-5)
        row = 0
        for sequence, count in work:
            sequence.logits.append(first[row : row + count])
            sequence.done += count
            row += count

    def _run_stage(
        self,
        stage: int,
        inputs: list[SimpleNamespace],
        wires: Wires,
        hidden: list[torch.Tensor],
    ) -> dict[int, torch.Tensor]:
        """Result of each rank of a stage; `hidden` are those of the stage before, alike."""
        outcome: dict[int, Any] = {}

        def run(rank: int) -> None:
            place = self.places[rank]
            step = SimpleNamespace(**vars(inputs[place.group]))
            if hidden:
                step.hidden_TD = hidden[place.group * self.plan.parallelism.tp + place.tp]
            comm = ThreadComm(plan=self.plan, place=place, wires=wires)
            try:
                outcome[rank] = self.programs[stage].forward(
                    self.weights[rank], step, self.caches[rank], comm
                )
            except BaseException as error:  # noqa: BLE001 - raised again by the test's thread
                outcome[rank] = error

        ranks = [rank for rank, place in enumerate(self.places) if place.stage == stage]
        threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in outcome.values():
            if isinstance(result, BaseException):
                raise result
        return {rank: outcome[rank] for rank in ranks}

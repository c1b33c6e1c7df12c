"""Decode steps of many ranks by graph, recorded by tests/tapes.py where there is no GPU.

The ranks are real processes whose collectives are in what they record.
"""

import multiprocessing
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tapes
import torch
from builders import make_plan, tiny_model, tiny_topology
from live_bundles import write_bundle
from parallel_worlds import (
    FAMILIES,
    GREEDY,
    SEED,
    RandomScheduler,
    assert_greedy,
    mesh_bundle,
    mesh_name,
    mesh_plan,
    prompt_of,
)
from tapes import SIZES, TapeRecorder
from torch.distributed import HashStore

from codegen.emit import emit_program
from plans.errors import MedhaError
from plans.mesh import Parallelism, coordinates
from plans.plan import Plan
from runtime import cli_run
from runtime.clock import WallClock
from runtime.parallel import launch, stage_graphs
from runtime.parallel.control import Workers
from runtime.parallel.executor import ParallelExecutor
from runtime.parallel.groups import Groups, RankComm
from runtime.parallel.progress import Progress
from runtime.parallel.rank import Rank
from runtime.parallel.stage_graphs import Agreement, StageGraphs
from runtime.parallel.table import Row, State
from runtime.program import load_bundle
from runtime.sampling_params import SamplingParams
from runtime.weights import random_weights

MODEL = FAMILIES["llama"]
RANDOM = SamplingParams(temperature=0.9, top_k=20, seed=5)
CPU = torch.device("cpu")

# --- meshes ---------------------------------------------------------------------------------------


@dataclass
class Recording:
    """The workers of a mesh, and how often each has run what it recorded."""

    workers: Workers
    plan: Plan
    counts: Any


@contextmanager
def recording(
    mesh: Parallelism,
    folder: Path,
    *,
    fails_at: dict[int, int] | None = None,
    graphs: bool = True,
    stages: int | None = None,
) -> Iterator[Recording]:
    """Starts ranks that record.

    fails_at  by rank, the recording at whose end it fails
    stages    so many of the first have a program that can be recorded; None for all
    """
    plan = mesh_plan(mesh, MODEL)
    bundle = mesh_bundle(folder, plan, tapes.recordable_additions(stages or mesh.spp))
    plan = load_bundle(bundle).plan
    counts = multiprocessing.get_context("forkserver").Array("q", mesh.ranks, lock=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "start_worker", tapes.recording_starter(counts, fails_at or {}))
        with launch.running_workers(str(bundle), plan, "random", SEED, None, graphs=graphs) as [
            workers
        ]:
            yield Recording(workers, plan, counts)


def answers_of(ranks: Recording, seed: int, *, graphs: bool = True) -> dict[int, list[int]]:
    """Six requests, more than the largest graph holds, in any mixture of steps.

    Some are evicted and some end early; two kvp groups share some. Every third one is not greedy.
    """
    executor = ParallelExecutor(ranks.plan, ranks.workers, WallClock(), graphs=graphs)
    scheduler = RandomScheduler(ranks.plan, executor, random.Random(seed))
    for number in range(6):
        sampling = RANDOM if number % 3 == 2 else GREEDY
        scheduler.add(number, prompt_of(27 * number + 5, seed + number), 9, sampling)
    scheduler.run()
    for number, known in scheduler.done.items():
        if number % 3 != 2:
            assert_greedy(MODEL, known.prompt, known.answer)
    return {number: known.answer for number, known in scheduler.done.items()}


@pytest.mark.parametrize(
    "mesh",
    [Parallelism(tp=2), Parallelism(spp=2), Parallelism(kvp=2), Parallelism(tp=2, spp=2)],
    ids=mesh_name,
)
def test_any_schedule_by_graphs_gives_the_tokens_of_plain_launches(mesh, tmp_path):
    with recording(mesh, tmp_path) as ranks:
        assert ranks.workers.graphs == len(SIZES)
        for seed in range(1 if mesh.tp > 1 else 2):  # processes that add up are slow to test
            before = list(ranks.counts)
            plain = answers_of(ranks, seed, graphs=False)
            assert list(ranks.counts) == before
            replayed = answers_of(ranks, seed)
            assert all(now > then for now, then in zip(ranks.counts, before, strict=True))
            assert sum(map(len, replayed.values())) > 20
            longest = 27 * max(number for number, answer in replayed.items() if answer) + 5
            assert mesh.kvp == 1 or longest > ranks.plan.kv.tokens_per_kvp_shard, "none is shared"
            for number, answer in replayed.items():
                both = min(len(answer), len(plain[number]))  # one of them may end early
                assert answer[:both] == plain[number][:both]


def test_where_one_rank_cannot_record_no_rank_runs_by_graph_and_that_is_said_once(tmp_path, caplog):
    with recording(Parallelism(tp=2), tmp_path, fails_at={1: len(SIZES)}) as ranks:
        assert ranks.workers.graphs == 0
        assert answers_of(ranks, 0)
        assert list(ranks.counts) == [0, 0]
    [said] = [record.getMessage() for record in caplog.records]
    assert "decode steps are launched kernel by kernel: recording failed" in said
    assert "rank 1: OutOfMemoryError: CUDA out of memory" in said


@pytest.mark.parametrize("why", [{"graphs": False}, {"stages": 1}], ids=["told", "one stage"])
def test_ranks_record_nothing_where_told_so_or_where_a_stage_cannot_be_recorded(tmp_path, why):
    with recording(Parallelism(spp=2), tmp_path, **why) as ranks:
        assert ranks.workers.graphs == 0
        assert answers_of(ranks, 0)
        assert list(ranks.counts) == [0, 0]


@pytest.mark.parametrize(("flag", "graphs"), [((), True), (("--no-graphs",), False)])
def test_whoever_runs_many_ranks_may_decline_graphs(tmp_path, monkeypatch, flag, graphs):
    made = []

    @contextmanager
    def running(*args: object, **options: object) -> Iterator[None]:
        made.append(options["graphs"])
        raise MedhaError("that is all")
        yield

    monkeypatch.setattr(launch, "running_workers", running)
    bundle = mesh_bundle(tmp_path / "bundle", mesh_plan(Parallelism(spp=2), MODEL))
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"token_ids": [1, 2], "max_tokens": 2}\n')
    argv = ["medha-run", bundle, "--weights", "random", "--requests", requests, *flag]
    monkeypatch.setattr("sys.argv", [str(each) for each in argv])
    with pytest.raises(SystemExit):
        cli_run.main()
    assert made == [graphs]


# --- one rank by itself ---------------------------------------------------------------------------


def stage_of(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Rank, Any]:
    """A stage of two and its recorded graphs; the test is the other one."""
    monkeypatch.setattr(stage_graphs, "SIZES", SIZES)
    plan = mesh_plan(Parallelism(spp=2), MODEL)
    bundle = load_bundle(mesh_bundle(folder, plan, tapes.recordable_additions(2)))
    place = coordinates(plan.parallelism, number)
    groups = Groups(
        place=place,
        tp=None,
        kvp=None,
        before=None,
        after=None,
        kvp_ranks=(number,),
        stage_ranks=(0, 1),
    )
    comm, program = RankComm(groups, Progress()), bundle.load_stage(number)
    weights = random_weights(program.parameters, seed=SEED)
    rank = Rank(plan, place, program=program, weights=weights, comm=comm, device=CPU)
    graphs = StageGraphs(rank, comm, TapeRecorder())
    with torch.inference_mode():
        graphs.record(Agreement(HashStore(), 0, 1))
    assert graphs.count() == len(SIZES)
    return rank, graphs


def decode_row(number: int, prefix: int, pages: tuple[int, ...]) -> Row:
    """A decode behind a prefix of zeros."""
    tokens = [0] * prefix + [3 * number + 1]
    state = State(tokens=tokens, prompt_tokens=prefix, sampling=GREEDY)
    state.grow(0, pages)
    return Row(number=number, state=state, prefix=prefix, tokens=1, home=0, samples=True)


def some_rows(count: int, first: int = 0) -> list[Row]:
    """Of different lengths, on different pages."""
    return [decode_row(first + at, 5 + 7 * at, (2 + 2 * at, 1 + 2 * at)) for at in range(count)]


def hidden_of(rank: Rank, rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, rank.plan.model.hidden, generator=torch.Generator().manual_seed(seed))


def plain_result(rank: Rank, rows: list[Row], hidden_TD: torch.Tensor | None) -> torch.Tensor:
    with torch.inference_mode():
        inputs = rank.inputs(rows)
        inputs.hidden_TD = hidden_TD
        return rank.forward(inputs)


@pytest.mark.parametrize("number", [0, 1])
def test_steps_prepared_ahead_overwrite_nothing_that_an_earlier_one_reads_or_leaves(
    tmp_path, monkeypatch, number
):
    rank, graphs = stage_of(tmp_path, number, monkeypatch)
    steps = [some_rows(3), some_rows(4, first=9), some_rows(1, first=20), some_rows(2, first=30)]
    hidden = [hidden_of(rank, len(rows), at) if number else None for at, rows in enumerate(steps)]
    expected = [plain_result(rank, *each).clone() for each in zip(steps, hidden, strict=True)]
    prepared = [graphs.numbers(rows) for rows in steps]
    found = []
    for step, rows, hidden_TD in zip(prepared, steps, hidden, strict=True):
        with torch.inference_mode():
            out = graphs.run(step, hidden_TD)
            if number:
                out = out.clone()  # logits are valid until the next step
                drawn = graphs.drawn(rows).tokens()
                assert list(drawn.values()) == out.argmax(-1).tolist()
                assert list(drawn) == [row.number for row in rows]
        found.append(out)
    for each, wanted in zip(found, expected, strict=True):
        # 4 layers of fp32 in another batch size: as TOLERANCE of parallel_worlds.py
        torch.testing.assert_close(each, wanted, rtol=0, atol=1e-4)


def test_recording_and_padding_write_no_page(tmp_path, monkeypatch):
    rank, graphs = stage_of(tmp_path, 0, monkeypatch)
    pool = rank.cache.k_pages[0]
    assert not pool.any(), "recording wrote a page"
    with torch.inference_mode():
        graphs.run(graphs.numbers(some_rows(4)), None)
        before = pool.clone()
        graphs.run(graphs.numbers(some_rows(3, first=9)), None)  # as a graph of four
    changed = (pool != before).flatten(2).any(-1).sum()
    assert 1 <= int(changed) <= 3, "one slot a decode, none for the padding"


def test_steps_with_chunks_and_steps_of_too_many_rows_do_not_go_by_graph(tmp_path, monkeypatch):
    _, graphs = stage_of(tmp_path, 0, monkeypatch)
    rows = some_rows(1)
    assert graphs.takes(rows * SIZES[-1])
    assert not graphs.takes(rows * (SIZES[-1] + 1))
    state = State(tokens=[1, 2, 3], prompt_tokens=3, sampling=GREEDY)
    chunk = Row(number=7, state=state, prefix=0, tokens=2, home=0, samples=False)
    assert not graphs.takes([*rows, chunk])
    graphs.used = False
    assert not graphs.takes(rows)


@pytest.mark.parametrize(
    ("mesh", "problems", "raises"),
    [
        (Parallelism(tp=2), {1: "OutOfMemoryError: full"}, True),
        (Parallelism(tp=2), {0: "no kernel", 1: "no kernel"}, False),
        (Parallelism(spp=2), {1: "OutOfMemoryError: full"}, False),
        (Parallelism(tp=2, spp=2), {2: "no kernel", 3: "no kernel"}, False),
        (Parallelism(tp=2, spp=2), {0: "no kernel", 2: "no kernel"}, True),
    ],
)
def test_a_rank_that_leaves_others_amid_a_collective_ends_the_run(mesh, problems, raises):
    rank: Any = SimpleNamespace(plan=SimpleNamespace(parallelism=mesh))
    graphs = StageGraphs.__new__(StageGraphs)
    graphs._rank = rank  # noqa: SLF001 - a decision that takes two devices to provoke
    if raises:
        with pytest.raises(MedhaError, match=r"left ranks .* waiting; run with --no-graphs"):
            graphs._check_together(problems)  # noqa: SLF001
    else:
        graphs._check_together(problems)  # noqa: SLF001


def test_ranks_that_fail_at_different_sizes_left_each_other_waiting():
    """One has no memory at the largest size; the other one is through with it, and would go on."""
    store, ran = HashStore(), []
    first, second = (StageGraphs.__new__(StageGraphs) for _ in range(2))
    plan = SimpleNamespace(parallelism=Parallelism(tp=2))

    def run(size: int, recorder: object) -> None:
        ran.append(size)
        if len(ran) == 1:
            raise RuntimeError("out of memory")

    for number, graphs in enumerate((first, second)):
        graphs._rank = SimpleNamespace(plan=plan)  # type: ignore[assignment]  # noqa: SLF001
        graphs._sizes = [1, 64, 256]  # noqa: SLF001
        graphs._run = run  # type: ignore[assignment, method-assign]  # noqa: SLF001
        other = 1 - number
        store.set(f"first decode steps of 256/{other}", "said: " if number == 0 else "said: full")
    with pytest.raises(MedhaError, match=r"rank 0 failed .* left ranks \[1\]"):
        first._first_runs(Agreement(store, 0, 2))  # noqa: SLF001
    with pytest.raises(MedhaError, match=r"rank 0 failed .* left ranks \[1\]"):
        second._first_runs(Agreement(store, 1, 2))  # noqa: SLF001
    assert ran == [256, 256], "no rank begins a size that others do not"


def test_ranks_that_say_nothing_are_named(monkeypatch):
    monkeypatch.setattr(stage_graphs, "AGREE", timedelta(milliseconds=20))
    with pytest.raises(MedhaError, match=r"ranks \[1, 2\] said nothing of the recorded"):
        Agreement(HashStore(), 0, 3).problems("recorded", "")


def test_ranks_agree_on_what_any_of_them_says():
    store = HashStore()
    first, second = (Agreement(store, rank, 2) for rank in range(2))
    store.set("recorded/1", "said: no kernel")
    assert first.problems("recorded", "") == {1: "no kernel"}
    store.set("ran/0", "said: ")
    assert second.problems("ran", "") == {}


# --- GPUs -----------------------------------------------------------------------------------------


BF16_NEAR_TIE = 2**-3
"""Logits between 2 and 4, where the best of 256 random ones lie, are rounded to steps of 2^-6; four
layers in another order of sums move them by a few. A token that is wrong lacks 2 or 3."""


@pytest.mark.gpu
@pytest.mark.parametrize(
    "mesh", [Parallelism(tp=2), Parallelism(spp=2), Parallelism(kvp=2)], ids=mesh_name
)
def test_two_gpus_give_the_same_tokens_by_cuda_graphs_and_by_plain_launches(mesh, tmp_path):
    """And of the model file, where its two best logits are not near."""
    found = torch.cuda.device_count()
    if found < mesh.ranks:
        pytest.skip(f"NOT RUN: needs {mesh.ranks} CUDA devices, {found} here")
    model = tiny_model(weight_dtype="bf16", head_dim=64, hidden=128, layers=4)
    plan = make_plan(
        model=model,
        kv_dtype="bf16",
        rows=((64, 32), (256, 16)),
        parallelism=mesh,
        topology=tiny_topology(device="h100-sxm-80gb", devices_per_node=mesh.ranks),
    )
    files = {name: text.decode() for name, text in emit_program(plan).files.items()}
    bundle = write_bundle(tmp_path, plan, files)
    plan = load_bundle(bundle).plan
    with launch.running_workers(str(bundle), plan, "random", SEED, None) as [workers]:
        assert workers.graphs > 1, "nothing was recorded"
        for seed, graphs in ((1, True), (1, False), (2, True)):
            executor = ParallelExecutor(plan, workers, WallClock(), graphs=graphs)
            scheduler = RandomScheduler(plan, executor, random.Random(seed))
            for number in range(7):
                scheduler.add(number, prompt_of(27 * number + 5, number), 12)
            scheduler.run()
            for known in scheduler.done.values():
                assert_greedy(model, known.prompt, known.answer, near_tie=BF16_NEAR_TIE)

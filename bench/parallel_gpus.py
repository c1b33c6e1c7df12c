"""TP2, SPP2 and KVP2 on two GPUs beside one: tokens compared, times beside the prediction.

    python -m bench.parallel_gpus --model llama3-8b --hardware h100 --out FOLDER
    python -m bench.parallel_gpus --model tiny-llama --hardware cpu --prompts 40,300 --out FOLDER

Random weights (the same in every layout, runtime/weights.py), greedy, one request at a time, the
longest once more before all others. For each layout: time to the first token and between tokens,
measured and predicted by the plan's own step times; on several GPUs with decode steps as CUDA
graphs and, for the shortest and the longest prompt, launched kernel by kernel; and by stage the
time at work, in the exchange of KVP partials, and between two steps while a prompt ran (bubbles).

A layout that fails or takes longer than LAYOUT_S is a row, and so is one for which no time is left.
Writes parallel_gpus.csv, .md, tokens.json and logits.json after every row; draws nothing and
asserts nothing.
"""

import argparse
import csv
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import triton
from msgspec import structs

from planner.assemble import to_plan
from planner.bundle import compile_plan
from planner.catalog import load_device, load_model, load_node_type, load_workload, topology_for
from planner.search import price
from planner.space import Candidate, cut_layers
from planner.world import make_world
from plans.chunks import WorkTable
from plans.codec import content_hash, dump_file
from plans.mesh import Parallelism
from plans.plan import MadeBy, Plan
from runtime.clock import WallClock
from runtime.executor.live import LiveExecutor, device_for
from runtime.garbage import settle
from runtime.offline import OfflineRun, Result, read_jobs
from runtime.offline import Progress as RunProgress
from runtime.parallel.executor import ParallelExecutor
from runtime.parallel.launch import running_workers
from runtime.program import Bundle, load_bundle
from runtime.scheduler import load_policy
from runtime.weights import random_weights

LAYOUTS = {"TP2": (2, 1, 1), "SPP2": (1, 2, 1), "KVP2": (1, 1, 2), "1 GPU": (1, 1, 1)}
"""The last one runs in this process, whose device memory no other could use afterwards."""
NEW_TOKENS = 32
BEST = 16
"""Logits kept for each token on one GPU, to tell a near-tie from an error."""
GAP_S = 0.3
"""Silence between two requests on one GPU, beyond twice what the first is predicted to take."""
LAYOUT_S = 75
"""Most seconds of a layout, loading, compiling and recording included."""
ALONE_S = 55
"""Of the whole time, left for one GPU, which all others are compared with."""
Row = dict[str, object]


def plan_for(model: str, hardware: str, degrees: tuple[int, int, int], context: int) -> Plan:
    """The planner's plan with its degrees fixed; KVP shards cut the longest prompt in two."""
    tp, spp, kvp = degrees
    device = load_device(hardware)
    node = load_node_type(device.default_node)
    if tp * spp * kvp > node.devices_per_node:  # CPUs: as many processes as the layout needs
        node = structs.replace(node, devices_per_node=tp * spp * kvp)
    world = make_world(
        model=load_model(model),
        device=device,
        topology=topology_for(device, tp * spp * kvp, node),
        workload=load_workload("chat"),
        context_tokens=context,
    )
    parallelism = Parallelism(tp=tp, spp=spp, kvp=kvp, replicas=1, idle=0)
    candidate = Candidate(parallelism=parallelism, stages=cut_layers(world.model.layers, spp))
    made_by = MadeBy(medha="bench", effort="quick", seed=0, command="python -m bench.parallel_gpus")
    name = f"{model}-tp{tp}-spp{spp}-kvp{kvp}"
    return to_plan(world, price(world, candidate), name=name, made_by=made_by, notes=world.notes)


def write_bundle(plan: Plan, folder: Path) -> Bundle:
    """Emits the plan's program; returns the bundle as the runtime reads it."""
    plan, files = compile_plan(plan)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    dump_file(folder / "plan.yaml", plan)
    return load_bundle(folder)


@dataclass
class Watch:
    """Stage sums at every progress report of a run, so that a prompt's share can be cut out."""

    clock: WallClock
    executor: ParallelExecutor
    marks: list[tuple[float, list[tuple[float, float, float]]]] = field(default_factory=list)

    def note(self, _: object) -> None:
        """Called after each step."""
        sums = [(each.seconds, each.merge_s, each.waited_s) for each in self.executor.stages]
        self.marks.append((self.clock.now_s(), sums))

    def until(self, last_s: float) -> list[tuple[float, float, float]]:
        """(work, merge, waited) of each stage up to a time; waits before the first step left out.

        The first report of a stage holds the time since the run before.
        """
        if not self.marks:
            return []
        # the report of a step comes just behind its tokens
        last = next((sums for at_s, sums in self.marks if at_s >= last_s), self.marks[-1][1])
        idle = [stage[2] for stage in self.marks[0][1]]
        return [(w, m, max(b - i, 0.0)) for (w, m, b), i in zip(last, idle, strict=True)]


class Reference:
    """Best logits of the first requests on one GPU, to tell a near-tie from an error."""

    def __init__(self, requests: int) -> None:
        """Keeps those of so many requests, then lets the executor draw as it does without."""
        self.best: dict[str, dict[str, float]] = {}
        self.executor: LiveExecutor | None = None
        self._requests = requests

    def keep(self, request: int, position: int, logits_V: torch.Tensor) -> None:
        """Called with the logits of each sampled token."""
        values, ids = logits_V.float().topk(min(BEST, len(logits_V)))
        self.best[f"{request},{position}"] = dict(
            zip(map(str, ids.tolist()), values.tolist(), strict=True)
        )

    def note(self, progress: RunProgress) -> None:
        """Called after each step."""
        if progress.finished >= self._requests and self.executor is not None:
            self.executor._on_logits = None  # noqa: SLF001 - kept logits would cost time

    def gap(self, request: int, tokens: Sequence[int], others: Sequence[int]) -> float | None:
        """What the first other token lacked; None where all are the same.

        Infinite where it was not among the best.
        """
        at = agreement(tokens, others)
        if at == min(len(tokens), len(others)):
            return None
        best = self.best[f"{request},{at}"]
        return max(best.values()) - best.get(str(tokens[at]), -float("inf"))


class Table:
    """Rows and tokens so far, in files."""

    def __init__(self, out: Path) -> None:
        """Nothing yet."""
        out.mkdir(parents=True, exist_ok=True)
        self._out = out
        self._rows: list[Row] = []
        self._tokens: dict[str, list[int]] = {}
        self._reference: dict[int, tuple[int, list[int]]] = {}
        """By prompt length, request and tokens on one GPU."""
        self._logits: Reference | None = None

    def add(self, row: Row, tokens: Sequence[int] = ()) -> None:
        """A row, and the answer it was measured on."""
        self._tokens[str(len(self._rows))] = list(tokens)
        self._rows.append(row)
        text = ", ".join(f"{name} {shown(value)}" for name, value in row.items() if value != "")
        print(text, file=sys.stderr, flush=True)
        self.write()

    def refer(self, prompts: Sequence[int], results: Sequence[Result], logits: Reference) -> None:
        """Compares all rows with these answers, from now on."""
        self._logits = logits
        for request, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
            self._reference.setdefault(prompt, (request, list(result.token_ids)))

    def write(self) -> None:
        """Writes what is there so far: a later layout that hangs takes nothing along."""
        self._compare()
        fields = list(dict.fromkeys(name for row in self._rows for name in row))
        with (self._out / "parallel_gpus.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(self._rows)
        (self._out / "tokens.json").write_text(json.dumps(self._tokens))
        if self._logits is not None:
            (self._out / "logits.json").write_text(json.dumps(self._logits.best))
        lines = [
            f"`python -m bench.parallel_gpus {' '.join(sys.argv[1:])}`",
            "",
            about(),
            "",
            "| " + " | ".join(fields) + " |",
            "|" + "---|" * len(fields),
        ]
        cells = [[shown(row.get(name, "")) for name in fields] for row in self._rows]
        lines += ["| " + " | ".join(each) + " |" for each in cells]
        (self._out / "parallel_gpus.md").write_text("\n".join(lines) + "\n")

    def _compare(self) -> None:
        for at, row in enumerate(self._rows):
            own, known = self._tokens[str(at)], self._reference.get(int(str(row.get("prompt", 0))))
            if not own or known is None or self._logits is None:
                continue
            request, others = known
            gap = self._logits.gap(request, own, others)
            row["same_tokens"] = f"{agreement(own, others)}/{len(others)}"
            row["gap"] = "" if gap is None else gap


def agreement(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Tokens before the first difference."""
    return next(
        (at for at, pair in enumerate(zip(tokens, others, strict=False)) if pair[0] != pair[1]),
        min(len(tokens), len(others)),
    )


def row_of(
    layout: str, graphs: str, plan: Plan, result: Result, stages: list[tuple[float, float, float]]
) -> Row:
    """A prompt's row."""
    prompt, shard = result.prompt_tokens, plan.kv.tokens_per_kvp_shard
    work = WorkTable(plan.prefill.chunks, plan.step_time, shard)
    decode_s = plan.step_time.step_s(
        decode_kv_tokens=[min(prompt, shard)], kvp_groups=-(-prompt // shard)
    )
    return {
        "layout": layout,
        "graphs": graphs,
        "prompt": prompt,
        "ttft_s": result.ttft_s,
        "ttft_predicted_s": work.solo_s(prompt),
        "tbt_p50_s": result.tbt_s.p50,
        "tbt_p99_s": result.tbt_s.p99,
        "tbt_predicted_s": decode_s,
        "stage_work_s": " ".join(f"{each[0]:.4f}" for each in stages),
        "stage_merge_s": " ".join(f"{each[1]:.4f}" for each in stages),
        "stage_bubble_s": " ".join(f"{each[2]:.4f}" for each in stages),
        "plan_hash": content_hash(plan)[:12],
    }


def many(layout: str, bundle: Bundle, prompts: list[int], folder: Path, table: Table) -> None:
    """A layout of several ranks: each prompt is a run of its own."""
    plan, clock = bundle.plan, WallClock()
    few = sorted({min(prompts), max(prompts)})
    with running_workers(str(bundle.folder), plan, "random", 0, None) as [workers]:
        sizes = f"{workers.graphs} sizes"
        ways = [("warm-up", True, [max(prompts)]), (sizes, True, prompts), ("no", False, few)]
        for name, graphs, each_of in ways if workers.graphs else ways[:2]:
            for prompt in each_of:
                executor = ParallelExecutor(plan, workers, clock, graphs=graphs)
                watch = Watch(clock, executor)
                request_file(folder / "one.jsonl", [prompt], [0.0], plan.model.vocab)
                jobs = read_jobs(folder / "one.jsonl", plan, None)
                run = OfflineRun(jobs, None, on_progress=watch.note)
                policy = load_policy(plan.scheduler.policy, plan.scheduler)
                [result] = run.run(plan, [executor], clock, policy)
                if run.error is not None:
                    raise run.error
                stages = watch.until(run.records[0].first_token_s)
                table.add(row_of(layout, name, plan, result, stages), result.token_ids)


def alone(layout: str, bundle: Bundle, prompts: list[int], folder: Path, table: Table) -> None:
    """One rank in this process, as runtime/executor/live.py runs it: all prompts twice in one run.

    The first time their logits are kept; the second time counts.
    """
    plan, clock = bundle.plan, WallClock()
    work = WorkTable(plan.prefill.chunks, plan.step_time, plan.kv.tokens_per_kvp_shard)
    first = [max(prompts), *prompts]
    every = [*first, *prompts]
    gaps_s = [GAP_S + 2 * work.solo_s(each) for each in every]
    request_file(folder / "all.jsonl", every, gaps_s, plan.model.vocab)
    jobs = read_jobs(folder / "all.jsonl", plan, None)
    reference = Reference(len(first))
    device, program = device_for(plan), bundle.load_stage(0)
    weights = random_weights(program.parameters, device=device)
    executor = LiveExecutor(plan, program, weights, clock=clock, on_logits=reference.keep)
    executor.warm_up()
    settle()
    reference.executor = executor
    run = OfflineRun(jobs, None, on_progress=reference.note)
    policy = load_policy(plan.scheduler.policy, plan.scheduler)
    results = run.run(plan, [executor], clock, policy)
    if run.error is not None:
        raise run.error
    table.refer(first, results[: len(first)], reference)
    made = executor._graphs  # noqa: SLF001 - whether it has any is what the row says
    graphs = "none" if made is None else f"{made.count()[0]} sizes"
    for result in results[len(first) :]:
        table.add(row_of(layout, graphs, plan, result, []), result.token_ids)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside after so many seconds."""

    def end(number: int, frame: object) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(max(int(seconds), 1))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def request_file(path: Path, prompts: list[int], gaps_s: list[float], vocab: int) -> None:
    """Random token ids, the same for the same length, one request after the other."""
    at_s, lines = 0.0, []
    for tokens, gap_s in zip(prompts, gaps_s, strict=True):
        ids = np.random.default_rng(tokens).integers(0, vocab, tokens).tolist()
        lines.append(json.dumps({"token_ids": ids, "max_tokens": NEW_TOKENS, "arrival_s": at_s}))
        at_s += gap_s
    path.write_text("\n".join(lines) + "\n")


def about() -> str:
    """What the numbers were measured on."""
    device = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        query = [
            "nvidia-smi",
            "--query-gpu=name,power.limit,driver_version",
            "--format=csv,noheader",
        ]
        device = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return (
        f"{time.strftime('%Y-%m-%d')}; torch {torch.__version__}, triton {triton.__version__}, "
        f"Python {platform.python_version()}; {device.replace(chr(10), ' | ')}"
    )


def main() -> None:
    """Measures all layouts and writes the files."""
    started_s = time.monotonic()
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", default="llama3-8b")
    flags.add_argument("--hardware", default="h100")
    flags.add_argument("--prompts", default="1000,8000,32000")
    flags.add_argument("--layouts", default=",".join(LAYOUTS))
    flags.add_argument("--seconds", type=float, default=195.0, help="of all layouts together")
    flags.add_argument("--out", type=Path, required=True)
    given = flags.parse_args()
    prompts = [int(each) for each in given.prompts.split(",")]
    context = max(prompts) + 2 * NEW_TOKENS
    table = Table(given.out)
    layouts = given.layouts.split(",")
    for at, layout in enumerate(layouts):
        began_s = time.monotonic()
        left_s = given.seconds - (began_s - started_s)
        left_s -= ALONE_S * any(LAYOUTS[each] == (1, 1, 1) for each in layouts[at + 1 :])
        if left_s < 1:
            table.add({"layout": layout, "failed": "no time left"})
            continue
        try:
            with tempfile.TemporaryDirectory() as name, at_most(min(left_s, LAYOUT_S)):
                folder, degrees = Path(name), LAYOUTS[layout]
                plan = plan_for(given.model, given.hardware, degrees, context)
                bundle = write_bundle(plan, folder / "bundle")
                measure = alone if degrees == (1, 1, 1) else many
                measure(layout, bundle, prompts, folder, table)
        except Exception as error:  # noqa: BLE001 - a failed layout is a row, not the end
            table.add({"layout": layout, "failed": repr(error)[:300].replace("\n", " ")})
        print(f"{layout}: {time.monotonic() - began_s:.0f} s", file=sys.stderr, flush=True)
    table.write()
    print((given.out / "parallel_gpus.md").read_text())


def shown(value: object) -> str:
    """A cell."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()

"""TP2, SPP2 and KVP2 on two GPUs beside one: tokens compared, times beside the prediction.

    python -m bench.parallel_gpus --model llama3-8b --hardware h200 --out FOLDER
    python -m bench.parallel_gpus --model tiny-llama --hardware cpu --prompts 40,300 --out FOLDER

Random weights (the same in every layout, runtime/weights.py), greedy, one request at a time. For
each layout: time to the first token and between tokens, measured and predicted by the plan's own
step times; and by stage the time at work, in the exchange of KVP partials, and between two steps
while a prompt ran (bubbles). Writes parallel_gpus.csv, .md and tokens.json; draws nothing and
asserts nothing.
"""

import argparse
import csv
import json
import platform
import subprocess
import sys
import tempfile
import time
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
from runtime.offline import OfflineRun, Result, read_jobs
from runtime.parallel.executor import ParallelExecutor
from runtime.parallel.launch import running_workers
from runtime.program import Bundle, load_bundle
from runtime.request import Record
from runtime.scheduler import load_policy
from runtime.weights import random_weights

LAYOUTS = {"1 GPU": (1, 1, 1), "TP2": (2, 1, 1), "SPP2": (1, 2, 1), "KVP2": (1, 1, 2)}
NEW_TOKENS = 32
BEST = 16
"""Logits kept for each token on one GPU, to tell a near-tie from an error."""
GAP_S = 1.0
"""Silence between two requests, beyond what the slowest is predicted to take."""


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
    best: dict[str, dict[str, float]] = field(default_factory=dict)
    """On one GPU, by request and position: the BEST tokens with the largest logits."""
    executor: ParallelExecutor | None = None
    marks: list[tuple[float, list[tuple[float, float, float]]]] = field(default_factory=list)

    def note(self, _: object) -> None:
        """Called after each step."""
        if self.executor is not None:
            sums = [(each.seconds, each.merge_s, each.waited_s) for each in self.executor.stages]
            self.marks.append((self.clock.now_s(), sums))

    def keep(self, request: int, position: int, logits_V: torch.Tensor) -> None:
        """Called with the logits of each sampled token."""
        values, ids = logits_V.float().topk(BEST)
        self.best[f"{request},{position}"] = dict(
            zip(map(str, ids.tolist()), values.tolist(), strict=True)
        )

    def between(self, first_s: float, last_s: float) -> list[tuple[float, float, float]]:
        """(work, merge, waited) of each stage in a span."""
        until = [(at_s, sums) for at_s, sums in self.marks if at_s <= last_s]
        if not until:
            return []
        last = until[-1][1]
        before = [(at_s, sums) for at_s, sums in until if at_s <= first_s]
        base_s, base = before[-1] if before else (0.0, [(0.0, 0.0, 0.0)] * len(last))
        idle_s = first_s - base_s  # nothing was asked for: no bubble
        return [
            (end[0] - start[0], end[1] - start[1], max(end[2] - start[2] - idle_s, 0.0))
            for start, end in zip(base, last, strict=True)
        ]


def serve(bundle: Bundle, requests: Path) -> tuple[list[Result], Watch, OfflineRun]:
    """Runs the file on the plan's ranks."""
    plan = bundle.plan
    scheduling = load_policy(plan.scheduler.policy, plan.scheduler)
    jobs = read_jobs(requests, plan, None)
    clock = WallClock()
    watch = Watch(clock)
    run = OfflineRun(jobs, None, on_progress=watch.note)
    if plan.parallelism.ranks > 1:
        with running_workers(str(bundle.folder), plan, "random", 0, None) as replicas:
            watch.executor = ParallelExecutor(plan, replicas[0], clock)
            return run.run(plan, [watch.executor], clock, scheduling), watch, run
    device = device_for(plan)
    program = bundle.load_stage(0)
    executor = LiveExecutor(
        plan,
        program,
        random_weights(program.parameters, device=device),
        clock=clock,
        on_logits=watch.keep,
    )
    executor.warm_up()
    return run.run(plan, [executor], clock, scheduling), watch, run


def agreement(tokens: list[int], others: list[int]) -> int:
    """Tokens before the first difference."""
    return next(
        (at for at, pair in enumerate(zip(tokens, others, strict=False)) if pair[0] != pair[1]),
        min(len(tokens), len(others)),
    )


def rows_of(
    layout: str, plan: Plan, results: list[Result], watch: Watch, run: OfflineRun
) -> list[dict[str, object]]:
    """One row a prompt."""
    work = WorkTable(plan.prefill.chunks, plan.step_time, plan.kv.tokens_per_kvp_shard)
    rows = []
    for result, record in zip(results, sorted(run.records, key=number_of), strict=True):
        prompt = result.prompt_tokens
        shard = plan.kv.tokens_per_kvp_shard
        groups = -(-prompt // shard)
        decode_s = plan.step_time.step_s(decode_kv_tokens=[min(prompt, shard)], kvp_groups=groups)
        stages = watch.between(record.request.arrival_s, record.first_token_s)
        rows.append(
            {
                "layout": layout,
                "prompt_tokens": prompt,
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
        )
    return rows


def number_of(record: Record) -> int:
    """Sort key."""
    return record.request.number


def request_file(path: Path, prompts: list[int], gaps_s: list[float], vocab: int) -> None:
    """Random token ids, one request after the other."""
    draw = np.random.default_rng(0)
    at_s, lines = 0.5, []
    for tokens, gap_s in zip(prompts, gaps_s, strict=True):
        ids = draw.integers(0, vocab, tokens).tolist()
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
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", default="llama3-8b")
    flags.add_argument("--hardware", default="h200")
    flags.add_argument("--prompts", default="1000,8000,32000")
    flags.add_argument("--layouts", default=",".join(LAYOUTS))
    flags.add_argument("--out", type=Path, required=True)
    given = flags.parse_args()
    prompts = [int(each) for each in given.prompts.split(",")]
    context = max(prompts) + 2 * NEW_TOKENS
    rows, tokens = [], {}
    given.out.mkdir(parents=True, exist_ok=True)
    for layout in given.layouts.split(","):
        print(f"{layout} ...", file=sys.stderr, flush=True)
        started_s = time.monotonic()
        plan = plan_for(given.model, given.hardware, LAYOUTS[layout], context)
        work = WorkTable(plan.prefill.chunks, plan.step_time, plan.kv.tokens_per_kvp_shard)
        gaps_s = [GAP_S + 6 * work.solo_s(each) for each in prompts]
        with tempfile.TemporaryDirectory() as folder:
            bundle = write_bundle(plan, Path(folder) / "bundle")
            requests = Path(folder) / "requests.jsonl"
            request_file(requests, prompts, gaps_s, plan.model.vocab)
            try:
                results, watch, run = serve(bundle, requests)
            except Exception as error:  # noqa: BLE001 - a failed layout is a row, not the end
                print(f"{layout} failed: {error!r}", file=sys.stderr, flush=True)
                rows.append({"layout": layout, "failed": repr(error)[:200]})
                continue
        rows += rows_of(layout, bundle.plan, results, watch, run)
        tokens[layout] = [list(result.token_ids) for result in results]
        if watch.best:
            (given.out / "logits.json").write_text(json.dumps(watch.best))
        first = next(iter(tokens.values()))
        for row, own, other in zip(rows[-len(prompts) :], tokens[layout], first, strict=True):
            row["tokens_agree"] = f"{agreement(own, other)}/{len(other)}"
        print(f"{layout} took {time.monotonic() - started_s:.0f} s", file=sys.stderr, flush=True)
        write_results(given.out, rows, tokens)
    print((given.out / "parallel_gpus.md").read_text())


def write_results(out: Path, rows: list[dict[str, object]], tokens: dict[str, object]) -> None:
    """Writes what is there so far: a later layout that hangs takes nothing along."""
    fields = list(dict.fromkeys(name for row in rows for name in row))
    with (out / "parallel_gpus.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
    (out / "tokens.json").write_text(json.dumps(tokens))
    lines = [
        f"`python -m bench.parallel_gpus {' '.join(sys.argv[1:])}`",
        "",
        about(),
        "",
        "| " + " | ".join(fields) + " |",
        "|" + "---|" * len(fields),
    ]
    lines += ["| " + " | ".join(shown(row.get(name, "")) for name in fields) + " |" for row in rows]
    (out / "parallel_gpus.md").write_text("\n".join(lines) + "\n")


def shown(value: object) -> str:
    """A cell."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()

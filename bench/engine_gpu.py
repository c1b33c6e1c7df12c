"""The engine on one GPU: prompts alone, a burst, a mixed load, and where a step's time goes.

    python -m bench.engine_gpu --model llama3-8b --hardware h100 --out FOLDER
    python -m bench.engine_gpu --model tiny-llama --hardware cpu --lengths 40,300 --out FOLDER

One process, random weights, greedy; prompts are random token ids and arrive at the engine itself.

alone     time to the first token and between tokens of one prompt at a time, medians of several,
          beside what the plan predicts; for decodes also without graphs, and without a step ahead
drawn     time between tokens where they are drawn from a distribution
mixed     prompts of 1,000 tokens by a Poisson process of 4 a second for 60 s, 64 new tokens each,
          and the longest of --lengths, which arrives at 5 s; one run a seed and a step budget
burst     256 prompts of 1,000 tokens at once, 64 new tokens each, with steps as planned and with
          those that only throughput counts for
profile   of decode steps and of whole prompts: what the device was busy with, against wall time;
          and what the host spends on deciding, launching and waiting
target    tokens of small prompts beside those of the plain torch program of the same plan

Loads are predicted beside it: the same requests at the same times in virtual time, by the plan
alone, and with what the run showed put in (bench/engine_load.py).

Writes engine_gpu.md and .csv after each part, so that one that fails takes nothing along; also
engine_steps.csv, every step of the loads, and plan.yaml.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.engine_load import BURST, LOAD_S, NEW_TOKENS, SHORT, median
from bench.engine_report import Report, Row
from bench.engine_server import Loads, Server, prompt_of
from bench.parallel_gpus import agreement, plan_for, write_bundle
from codegen.emit import emit_program
from plans.chunks import WorkTable
from plans.plan import Plan
from runtime.clock import WallClock
from runtime.executor.live import LiveExecutor
from runtime.garbage import settle
from runtime.program import StageProgram, load_bundle
from runtime.sampling_params import SamplingParams
from runtime.weights import random_weights

SOON = 8000
"""Prompts up to it are served alone before the loads, longer ones behind them."""
PROFILED_STEPS = 24
TOP_KERNELS = 12
PARTS = ("alone", "mixed", "burst", "how", "drawn", "target", "profile")
TARGET_PROMPTS = (5, 100, 700)
TARGET_TOKENS = 16

DRAWN = {
    "temperature 0.8": SamplingParams(temperature=0.8, seed=1),
    "temperature 0.8, top_k 50": SamplingParams(temperature=0.8, top_k=50, seed=1),
    "temperature 0.8, top_p 0.95": SamplingParams(temperature=0.8, top_p=0.95, seed=1),
}


# --- parts ----------------------------------------------------------------------------------------


def alone(server: Server, tokens: int, repeats: int) -> Row:
    """One prompt at a time."""
    plan = server.plan
    work = WorkTable(plan.prefill.chunks, plan.step_time, plan.kv.tokens_per_kvp_shard)
    ttft, tbt, since = [], [], server.marks()
    for seed in range(repeats):
        number = server.ask(prompt_of(tokens, plan.model.vocab, seed), NEW_TOKENS)
        server.run()
        ttft.append(server.ttft_s(number))
        tbt.append(median(server.gaps_s(number)[1:]))
    return {
        "part": "alone",
        "prompt_tokens": tokens,
        "repeats": repeats,
        "ttft_s": median(ttft),
        "ttft_min_s": min(ttft),
        "ttft_max_s": max(ttft),
        "ttft_predicted_s": work.solo_s(tokens),
        "tbt_ms": 1e3 * median(tbt),
        "tbt_predicted_ms": 1e3 * plan.step_time.step_s(decode_kv_tokens=[tokens]),
        **server.host_ms(since),
    }


def ablation(server: Server, tokens: int) -> Iterator[Row]:
    """Time between tokens without what makes it short."""
    for graphs, ahead in ((True, True), (True, False), (False, True), (False, False)):
        with server.mode(graphs=graphs, ahead=ahead):
            number = server.ask(prompt_of(tokens, server.plan.model.vocab, 0), NEW_TOKENS)
            server.run()
        yield {
            "part": "how",
            "prompt_tokens": tokens,
            "graphs": graphs,
            "ahead": ahead,
            "ttft_s": server.ttft_s(number),
            "tbt_ms": 1e3 * median(server.gaps_s(number)[1:]),
        }


def drawn(server: Server) -> Iterator[Row]:
    """Time between tokens where they are drawn, and not the best ones."""
    for name, sampling in DRAWN.items():
        prompt = prompt_of(SHORT, server.plan.model.vocab, 0)
        number = server.ask(prompt, NEW_TOKENS, sampling=sampling)
        server.run()
        yield {
            "part": "drawn",
            "prompt_tokens": SHORT,
            "sampling": name,
            "tbt_ms": 1e3 * median(server.gaps_s(number)[1:]),
        }


def union_s(recorded: profile) -> float:
    """Seconds in which at least one kernel ran: some start while the one before them ends."""
    spans = sorted(
        (each.time_range.start, each.time_range.end)
        for each in recorded.events()
        if each.device_type == DeviceType.CUDA
    )
    total_us, until_us = 0.0, 0.0
    for start_us, end_us in spans:
        total_us += max(end_us - max(start_us, until_us), 0.0)
        until_us = max(until_us, end_us)
    return total_us * 1e-6


def profiled(server: Server, what: str, tokens: int) -> Iterator[Row]:
    """Device time by kernel, against wall time: of decode steps, or of a whole prompt."""
    number = server.ask(prompt_of(tokens, server.plan.model.vocab, 7), NEW_TOKENS)
    tick = server.engine.tick
    if what == "decode":
        while len(server.tokens[number]) < 4:
            tick()
    first = len(server.executor.submit_s), len(server.decide_s), len(server.log.steps)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        if what == "decode":
            while len(server.tokens[number]) < 4 + PROFILED_STEPS:
                tick()
        else:
            while not server.tokens[number]:
                tick()
        wall_s = time.perf_counter() - began_s
        torch.cuda.synchronize()
    steps = PROFILED_STEPS if what == "decode" else len(server.log.steps) - first[2]
    server.run()
    submits = [seconds for _, seconds in server.executor.submit_s[first[0] :]]
    events = [
        (each.key, each.count, each.self_device_time_total * 1e-6)
        for each in recorded.key_averages()
        if each.self_device_time_total
    ]
    events.sort(key=lambda each: -each[2])
    busy_s = union_s(recorded)
    row = {
        "part": f"profile {what}",
        "prompt_tokens": tokens,
        "steps": steps,
        "wall_ms": 1e3 * wall_s / steps,
        "busy_ms": 1e3 * busy_s / steps,
        "busy_share": busy_s / wall_s,
        "launches": round(sum(each[1] for each in events) / steps),
        "submit_ms": 1e3 * median(submits[:steps]),
        "decide_ms": 1e3 * median(server.decide_s[first[1] :][: steps + 1]),
    }
    yield row
    for name, count, seconds in events[:TOP_KERNELS]:
        yield {
            "part": f"kernel {what}",
            "prompt_tokens": tokens,
            "kernel": name[:90],
            "launches": round(count / steps, 1),
            "busy_ms": 1e3 * seconds / steps,
            "share": seconds / sum(each[2] for each in events),
        }


def target_tokens(
    plan: Plan, weights: dict[str, torch.Tensor], clock: WallClock
) -> tuple[list[list[int]], dict[tuple[int, int], torch.Tensor]]:
    """Answers of the plain torch program, and the logits of each token."""
    small = msgspec.structs.replace(plan, kv=msgspec.structs.replace(plan.kv, pages_per_rank=64))
    emitted = emit_program(plan, target="torch")
    with tempfile.TemporaryDirectory() as folder:
        made = msgspec.structs.replace(plan, kernels=emitted.kernels)
        bundle = write_program(made, emitted.files, Path(folder))
        program = load_bundle(bundle).load_stage(0)
        logits: dict[tuple[int, int], torch.Tensor] = {}
        executor = LiveExecutor(
            small,
            program,
            weights,
            clock=clock,
            graphs=False,
            ahead=False,
            on_logits=lambda number, at, each_V: logits.__setitem__((number, at), each_V.cpu()),
        )
        server = Server(small, executor, clock)
        return target_prompts(server), logits


def target_prompts(server: Server) -> list[list[int]]:
    """Answers to the prompts that both programs run, one at a time."""
    answers = []
    for tokens in TARGET_PROMPTS:
        number = server.ask(prompt_of(tokens, server.plan.model.vocab, 3), TARGET_TOKENS)
        server.run()
        answers.append(server.tokens[number])
    return answers


def write_program(plan: Plan, files: dict[str, bytes], folder: Path) -> Path:
    """A bundle of a program that is not the planner's choice."""
    import hashlib  # noqa: PLC0415 - once

    from plans.codec import dump_file  # noqa: PLC0415 - once

    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    dump_file(folder / "plan.yaml", msgspec.structs.replace(plan, files=hashes))
    return folder


def compared(
    server: Server,
    answers: list[list[int]],
    logits: dict[tuple[int, int], torch.Tensor],
) -> Iterator[Row]:
    """Ours beside the target's, each on its own way; then ours behind each of the target's tokens.

    Random weights leave many near ties, and one other token makes another text: so what agrees is
    counted where both have read the same, with the largest and the mean difference of their logits,
    and what our token lacks in the target's eyes.
    """
    for at, (own, other) in enumerate(zip(target_prompts(server), answers, strict=True)):
        same = agreement(own, other)
        prompt = prompt_of(TARGET_PROMPTS[at], server.plan.model.vocab, 3)
        errors, gaps = [], []
        for count in range(len(other)):
            with server.watching() as seen:
                number = server.ask(prompt + other[:count], 1)
                server.run()
            theirs_V, ours_V = logits[at, count].float(), seen[number, 0].float()
            errors.append((theirs_V - ours_V).abs())
            gaps.append(float(theirs_V.max() - theirs_V[server.tokens[number][0]]))
        yield {
            "part": "target",
            "prompt_tokens": TARGET_PROMPTS[at],
            "tokens_agree": f"{same}/{len(other)}",
            "forced_agree": f"{sum(gap == 0 for gap in gaps)}/{len(other)}",
            "gap": max(gaps),
            "logit_error_max": max(float(each.max()) for each in errors),
            "logit_error_mean": median([float(each.mean()) for each in errors]),
        }


# --- all of it ------------------------------------------------------------------------------------


def loaded(
    plan: Plan, program: StageProgram, report: Report, *, with_target: bool
) -> tuple[Server, Any]:
    """The server, warmed up; and the target's answers, made before the large page pool."""
    clock = WallClock()
    on_gpu = torch.cuda.is_available()
    began_s = time.monotonic()
    weights = random_weights(
        program.parameters, device=torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    )
    weights_s = time.monotonic() - began_s
    target: list[Any] = []

    def run_target() -> Iterator[Row]:
        target.append(target_tokens(plan, weights, clock))
        yield from ()

    if with_target:
        report.part("target", run_target)
    executor = LiveExecutor(plan, program, weights, clock=clock)
    pool_bytes = torch.cuda.memory_allocated() if on_gpu else 0
    began_s = time.monotonic()
    executor.warm_up()
    settle()
    graphs = executor._graphs  # noqa: SLF001 - whether it has any is what the row says
    report.rows.append(
        {
            "part": "start",
            "weights_s": weights_s,
            "warm_up_s": time.monotonic() - began_s,
            "graphs": "none" if graphs is None else str(graphs.count()),
            "weights_and_pool_gb": pool_bytes / 1e9,
            "reserved_gb": torch.cuda.memory_reserved() / 1e9 if on_gpu else 0.0,
            "feeds_back": executor.feeds_back,
        }
    )
    return Server(plan, executor, clock), target[0] if target else None


Job = tuple[str, Callable[[], Row | Iterator[Row]]]


def jobs(
    server: Server,
    target: Any,
    loads: Loads,
    *,
    prompts: Sequence[tuple[int, int]],
    seeds: int,
    budgets_s: Sequence[float],
) -> Iterator[Job]:
    """All parts by name, what matters most first.

    prompts    (tokens, repeats) of those that are served alone
    budgets_s  of steps, for the mixed load
    """
    yield from alone_jobs(server, [each for each in prompts if each[0] <= SOON])
    mixed = [
        (f"mixed {budget_s} {seed}", functools.partial(loads.mixed, server, budget_s, seed))
        for seed in range(seeds)
        for budget_s in budgets_s
    ]
    yield from mixed[:1]
    scheduler = server.plan.scheduler
    for budget_s in (scheduler.step_budget_s, scheduler.idle_budget_s):
        yield f"burst {budget_s}", functools.partial(loads.at_once, server, budget_s)
    yield from mixed[1:]
    yield from alone_jobs(server, [each for each in prompts if each[0] > SOON])
    lengths = [tokens for tokens, _ in prompts]
    yield f"how {lengths[0]}", functools.partial(ablation, server, lengths[0])
    yield "drawn", functools.partial(drawn, server)
    yield "target", lambda: compared(server, *target)
    if torch.cuda.is_available():
        for what in ("decode", "prompt"):
            for tokens in lengths[:3:2]:
                name = f"profile {what} {tokens}"
                yield name, functools.partial(profiled, server, what, tokens)


def alone_jobs(server: Server, prompts: Sequence[tuple[int, int]]) -> Iterator[Job]:
    """Of prompts that are served alone."""
    for tokens, repeats in prompts:
        yield f"alone {tokens}", functools.partial(alone, server, tokens, repeats)


def main() -> None:
    """Measures what is asked for and writes the files."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", default="llama3-8b")
    flags.add_argument("--hardware", default="h100")
    flags.add_argument("--lengths", default="1000,8000,32000,128000,256000")
    flags.add_argument("--repeats", default="5,3,2,1,1", help="For each length.")
    flags.add_argument("--parts", default=",".join(PARTS), help="In any order; run in this one.")
    flags.add_argument("--seeds", type=int, default=1, help="Runs of the mixed load a budget.")
    flags.add_argument(
        "--step-budgets", default="0.03,0.06,0.1", help="Seconds, of the mixed load."
    )
    flags.add_argument("--load-s", type=float, default=LOAD_S, help="Of arrivals, mixed load.")
    flags.add_argument("--burst", type=int, default=BURST, help="Prompts at once.")
    flags.add_argument("--context", type=int, default=0, help="Default: the longest prompt.")
    flags.add_argument("--out", type=Path, required=True)
    given = flags.parse_args()
    lengths = [int(each) for each in given.lengths.split(",")]
    repeats = [int(each) for each in given.repeats.split(",")]
    parts = set(given.parts.split(","))
    context = given.context or max(*lengths, SHORT) + 2 * NEW_TOKENS
    plan = plan_for(given.model, given.hardware, (1, 1, 1), context)
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_bundle(plan, Path(folder))
        program = bundle.load_stage(0)
    plan = bundle.plan
    report = Report(given.out, plan)
    server, target = loaded(plan, program, report, with_target="target" in parts)
    report.write()
    if target is None:
        parts.discard("target")
    given_jobs = jobs(
        server,
        target,
        Loads(report.steps, max(lengths), given.burst, given.load_s),
        prompts=list(zip(lengths, repeats, strict=False)),
        seeds=given.seeds,
        budgets_s=[float(each) for each in given.step_budgets.split(",")],
    )
    for name, body in given_jobs:
        if name.split()[0] in parts:
            report.part(name, body)
    print((given.out / "engine_gpu.md").read_text())


if __name__ == "__main__":
    main()

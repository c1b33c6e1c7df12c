"""The engine on one GPU: prompts alone, a burst, a mixed load, and where a step's time goes.

    python -m bench.engine_gpu --model llama3-8b --hardware h100 --out FOLDER
    python -m bench.engine_gpu --model tiny-llama --hardware cpu --lengths 40,300 --out FOLDER

One process, random weights, greedy; prompts are random token ids and arrive at the engine itself.

alone     time to the first token and between tokens of one prompt at a time, medians of several,
          beside what the plan predicts; for decodes also without graphs, and without a step ahead
drawn     time between tokens where they are drawn from a distribution
burst     256 prompts of 1,000 tokens at once, 64 new tokens each
mixed     prompts of 1,000 tokens by a Poisson process of 4 a second for 60 s, 64 new tokens each,
          and one of 256,000 that arrives at 5 s; one run a seed
profile   of decode steps and of whole prompts: what the device was busy with, against wall time;
          and what the host spends on deciding, launching and waiting
target    tokens of small prompts beside those of the plain torch program of the same plan

Writes engine_gpu.md and .csv after each part, so that one that fails takes nothing along.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.engine_report import Report, Row
from bench.engine_server import Server, median, percentile, prompt_of
from bench.parallel_gpus import agreement, plan_for, write_bundle
from codegen.emit import emit_program
from plans.chunks import WorkTable
from plans.plan import Plan
from runtime.clock import WallClock
from runtime.executor.live import LiveExecutor
from runtime.program import StageProgram, load_bundle
from runtime.sampling_params import SamplingParams
from runtime.weights import random_weights

NEW_TOKENS = 64
SHORT = 1000
BURST = 256
RATE_RPS = 4.0
LOAD_S = 60.0
LONG_AT_S = 5.0
PROFILED_STEPS = 24
TOP_KERNELS = 12
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


def burst(server: Server) -> Iterator[Row]:
    """All at once: by the plan's budget of a step, and by one that only throughput counts for."""
    yield _burst(server)
    yield _burst(server.with_budget(server.plan.scheduler.idle_budget_s))


def _burst(server: Server) -> Row:
    since = server.marks()
    numbers = [
        server.ask(prompt_of(SHORT, server.plan.model.vocab, seed), NEW_TOKENS)
        for seed in range(BURST)
    ]
    seconds = server.run()
    gaps = [gap for number in numbers for gap in server.gaps_s(number)]
    ttft = [server.ttft_s(number) for number in numbers]
    return {
        "part": "burst",
        "requests": BURST,
        "step_budget_s": server.plan.scheduler.step_budget_s,
        "seconds": seconds,
        "tokens_per_s": BURST * (SHORT + NEW_TOKENS) / seconds,
        "ttft_p50_s": percentile(ttft, 0.5),
        "ttft_p99_s": percentile(ttft, 0.99),
        "tbt_p50_ms": 1e3 * percentile(gaps, 0.5),
        "tbt_p99_ms": 1e3 * percentile(gaps, 0.99),
        **server.host_ms(since),
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


def mixed(server: Server, long_tokens: int, seed: int) -> Row:
    """Short prompts at random times, and a long one."""
    draw = np.random.default_rng(seed)
    vocab = server.plan.model.vocab
    arrivals = np.cumsum(draw.exponential(1 / RATE_RPS, int(2 * RATE_RPS * LOAD_S)))
    shorts = [
        server.ask(prompt_of(SHORT, vocab, 1000 + at), NEW_TOKENS, in_s=0.5 + float(arrival_s))
        for at, arrival_s in enumerate(arrivals[arrivals < LOAD_S])
    ]
    long = server.ask(prompt_of(long_tokens, vocab, seed), NEW_TOKENS, in_s=0.5 + LONG_AT_S)
    before, since = len(server.steps), server.marks()
    seconds = server.run()
    ttft = [server.ttft_s(number) for number in shorts]
    gaps = [gap for number in shorts for gap in server.gaps_s(number)]
    steps = server.steps[before:]
    return {
        "part": "mixed",
        "seed": seed,
        "step_budget_s": server.plan.scheduler.step_budget_s,
        "shorts": len(shorts),
        "short_ttft_p50_s": percentile(ttft, 0.5),
        "short_ttft_p90_s": percentile(ttft, 0.9),
        "short_ttft_p99_s": percentile(ttft, 0.99),
        "tbt_p50_ms": 1e3 * percentile(gaps, 0.5),
        "tbt_p99_ms": 1e3 * percentile(gaps, 0.99),
        "tbt_max_ms": 1e3 * max(gaps),
        "long_ttft_s": server.ttft_s(long),
        "seconds": seconds,
        "steps": len(steps),
        "device_s": sum(each[2] for each in steps),
        **server.host_ms(since),
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
    first = len(server.executor.submit_s), len(server.decide_s), len(server.steps)
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
    steps = PROFILED_STEPS if what == "decode" else len(server.steps) - first[2]
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
        bundle = write_program(plan, emitted.files, Path(folder))
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
    """Ours beside the target's; at the first difference, what our token's logit lacks there."""
    for at, (own, other) in enumerate(zip(target_prompts(server), answers, strict=True)):
        same = agreement(own, other)
        gap = math.nan
        if same < len(other):
            logits_V = logits[at, same]
            gap = float(logits_V.max() - logits_V[own[same]])
        yield {
            "part": "target",
            "prompt_tokens": TARGET_PROMPTS[at],
            "tokens_agree": f"{same}/{len(other)}",
            "gap": gap,
        }


# --- all of it ------------------------------------------------------------------------------------


def loaded(plan: Plan, program: StageProgram, report: Report) -> tuple[Server, Any]:
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

    report.part("target", run_target)
    executor = LiveExecutor(plan, program, weights, clock=clock)
    pool_bytes = torch.cuda.memory_allocated() if on_gpu else 0
    began_s = time.monotonic()
    executor.warm_up()
    graphs = executor._graphs  # noqa: SLF001 - whether it has any is what the row says
    report.rows.append(
        {
            "part": "start",
            "weights_s": weights_s,
            "warm_up_s": time.monotonic() - began_s,
            "graphs": "none" if graphs is None else "decodes {}, chunks {}".format(*graphs.count()),
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
    *,
    lengths: list[int],
    repeats: list[int],
    seeds: int,
    budgets_s: list[float],
) -> Iterator[Job]:
    """All parts, by name."""
    yield "target", lambda: compared(server, *target)
    for tokens, count in zip(lengths, repeats, strict=False):
        yield f"alone {tokens}", lambda t=tokens, n=count: alone(server, t, n)
    for tokens in lengths[:1]:
        yield f"how {tokens}", lambda t=tokens: ablation(server, t)
    if torch.cuda.is_available():
        for tokens in lengths[:3:2]:
            yield f"profile decode {tokens}", lambda t=tokens: profiled(server, "decode", t)
        for tokens in lengths[:3:2]:
            yield f"profile prompt {tokens}", lambda t=tokens: profiled(server, "prompt", t)
    yield "drawn", lambda: drawn(server)
    yield "burst", lambda: burst(server)
    for budget_s in budgets_s:
        for seed in range(seeds):
            yield (
                f"mixed {budget_s} {seed}",
                lambda b=budget_s, s=seed: mixed(server.with_budget(b), max(lengths), s),
            )


def main() -> None:
    """Measures what is asked for and writes the files."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", default="llama3-8b")
    flags.add_argument("--hardware", default="h100")
    flags.add_argument("--lengths", default="1000,8000,32000,128000,256000")
    flags.add_argument("--repeats", default="5,5,3,2,1", help="For each length.")
    flags.add_argument("--parts", default="alone,how,drawn,burst,mixed,profile,target")
    flags.add_argument("--seeds", type=int, default=2, help="Runs of the mixed load a budget.")
    flags.add_argument("--step-budgets", default="0.03", help="Seconds, of the mixed load.")
    flags.add_argument("--context", type=int, default=0, help="Default: the longest prompt.")
    flags.add_argument("--out", type=Path, required=True)
    given = flags.parse_args()
    lengths = [int(each) for each in given.lengths.split(",")]
    repeats = [int(each) for each in given.repeats.split(",")]
    parts = set(given.parts.split(","))
    context = given.context or max(lengths) + 2 * NEW_TOKENS
    plan = plan_for(given.model, given.hardware, (1, 1, 1), context)
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_bundle(plan, Path(folder))
        program = bundle.load_stage(0)
    plan = bundle.plan
    report = Report(given.out, plan)
    server, target = loaded(plan, program, report)
    report.write()
    if target is None:
        parts.discard("target")
    given_jobs = jobs(
        server,
        target,
        lengths=lengths,
        repeats=repeats,
        seeds=given.seeds,
        budgets_s=[float(each) for each in given.step_budgets.split(",")],
    )
    for name, body in given_jobs:
        if name.split()[0] in parts:
            report.part(name, body)
    print((given.out / "engine_gpu.md").read_text())


if __name__ == "__main__":
    main()

"""Do the re-created engines behave like the engines? vLLM's steps against measurements of vLLM.

    python bench/engine_recreation.py [--seeds 200] [--out bench/results/...]

Step times of Llama-3-8B on one H200 are fitted on requests that ran alone, and on nothing else.
Then a burst and a mixed load are simulated under `fcfs@vllm` (vLLM's default flags) and
`threshold@vllm`, and compared with what vLLM 0.25.1 did on that machine. The measured columns are
one run each, with arrivals that were not recorded: a figure counts as reproduced where the median
over seeds is within 25 % of it; the spread over seeds says how much one run means.
"""

import argparse
import datetime as dt
import functools
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plans.check import load_plan  # noqa: E402 (a script finds its packages first)
from plans.chunks import ChunkRow, Prefill  # noqa: E402
from plans.plan import Plan  # noqa: E402
from plans.steptime import Knot, StepTime  # noqa: E402
from runtime.clock import VirtualClock  # noqa: E402
from runtime.executor.base import Step  # noqa: E402
from runtime.executor.simulated import SimulatedExecutor  # noqa: E402
from runtime.metrics import nearest_rank  # noqa: E402
from runtime.request import Request  # noqa: E402
from runtime.simulate import Run, simulate  # noqa: E402

# One H200, vLLM 0.25.1, Llama-3-8B shape, bf16, 22 November 2026; one request alone, prefix cache
# off, default flags: chunks of 8,192 tokens.
SOLO_TOKENS = (1_000, 8_000, 32_000, 128_000, 256_000)
SOLO_TTFT_S = (0.037, 0.213, 1.198, 10.043, 35.276)
SOLO_TBT_S = (0.00503, 0.00529, 0.00606, 0.00899, 0.01288)
SOLO_CHUNK = 8192

BURST = 256
BURST_TOKENS_PER_S = 35_100.0
SHORT_IN, SHORT_OUT, LONG_IN = 1_000, 64, 256_000
RATE, DURATION_S, LONG_AT_S = 4.0, 60.0, 5.0
QUANTITIES = (
    "short TTFT P50, s",
    "short TTFT P90, s",
    "short TTFT P99, s",
    "TBT P50, ms",
    "TBT P99, ms",
    "long TTFT, s",
)
MEASURED: dict[str, tuple[float | None, ...]] = {
    "fcfs@vllm,chunk=8192,ahead": (4.63, 25.9, 34.0, None, 282.0, 34.7),
    "threshold@vllm,chunk=2048,threshold=1024,always,ahead": (0.40, 2.64, 3.50, 15.9, 342.0, 38.2),
}
WITHIN = 0.25

LAYERS, HIDDEN, FFN, VOCAB = 32, 4096, 14336, 128256
HEADS, KV_HEADS, HEAD_DIM, BF16 = 32, 8, 128, 2
RIDGE_TOKENS = 206
"""Up to here a matrix product is bound by reading weights: 989e12 FLOP/s over 4.8e12 bytes/s."""
FIXED = {
    "front": "per request, outside the steps: HTTP, tokens in, first token out",
    "quarter": "per request, a quarter of it in the step that admits it, the rest outside",
    "half": "per request, half of it in the step that admits it, half outside",
    "step": "per step, as if the products of 1,000 tokens took it",
}
"""Where the fixed part of a lone request's TTFT goes, which lone requests cannot tell apart."""
IN_STEP = {"front": 0.0, "quarter": 0.25, "half": 0.5, "step": 0.0}
"""Share of a request's own fixed part during which other requests wait too."""
KV_TOKEN_BYTES = LAYERS * 2 * KV_HEADS * HEAD_DIM * BF16
LAYER_PARAMETERS = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * FFN


@dataclass(frozen=True)
class Fit:
    """Step times and how well they give back what they were fitted on."""

    step_time: StepTime
    front_s: float
    """Part of a TTFT during which the device does something else, and serves others."""
    prompt_s: float
    """Part of a TTFT that the step which admits the prompt takes longer."""
    ttft_s: tuple[float, ...]
    tbt_s: tuple[float, ...]
    bytes_per_s: float


def fit(fixed: str) -> Fit:
    """Step times from the lone requests.

    Time between tokens is linear in the context: its slope is the time of a KV token, which also
    gives the bandwidth at which weights are read; what is left of the intercept is overhead.
    TTFT is linear in three unknowns: a fixed part, each token, and attention of a (query, key)
    pair; least squares of relative errors. The fixed part is 1,000 tokens' worth of products that
    every step has (`step`), or the request's own and products are proportional to tokens (`front`;
    `quarter` and `half` are that fit with a part of it in the step that admits the request).
    """
    tokens = np.array(SOLO_TOKENS, dtype=np.float64)
    tbt_s = np.array(SOLO_TBT_S)
    design = np.stack([np.ones_like(tokens), tokens], axis=1) / tbt_s[:, None]
    intercept_s, slope_s = np.linalg.lstsq(design, np.ones_like(tbt_s), rcond=None)[0]
    bytes_per_s = KV_TOKEN_BYTES / slope_s
    floor_s = LAYER_PARAMETERS * BF16 / bytes_per_s
    head_s = VOCAB * HIDDEN * BF16 / bytes_per_s
    overhead_s = intercept_s - LAYERS * floor_s - head_s

    a_step = fixed == "step"
    rows = []
    rest = []
    for prompt, measured_s in zip(SOLO_TOKENS, SOLO_TTFT_S, strict=True):
        steps = -(-prompt // SOLO_CHUNK)
        fixed_column = [steps, prompt - 1000 * steps] if a_step else [1.0, prompt]
        rows.append(np.array([*fixed_column, prompt * (prompt + 1) / 2]) / measured_s)
        rest.append((measured_s - steps * (overhead_s + head_s)) / measured_s)
    first_s, token_s, pair_s = np.linalg.lstsq(np.stack(rows), np.array(rest), rcond=None)[0]
    if not a_step:
        kink = round(floor_s * LAYERS / token_s)
        knots = {1: floor_s, kink: floor_s, SOLO_CHUNK: SOLO_CHUNK * token_s / LAYERS}
    else:
        knots = {
            1: floor_s,
            RIDGE_TOKENS: floor_s,
            1000: first_s / LAYERS,
            SOLO_CHUNK: (first_s + (SOLO_CHUNK - 1000) * token_s) / LAYERS,
        }
    step_time = StepTime(
        source="profile",
        stage_layers=(LAYERS,),
        overhead_s=float(overhead_s),
        matmul=tuple(Knot(at=at, seconds=float(each)) for at, each in knots.items()),
        pair_s=float(pair_s / LAYERS),
        key_s=float(slope_s / LAYERS),
        decode_key_s=float(slope_s / LAYERS),
        decode_sequence_s=0.0,
        head=(Knot(at=1, seconds=float(head_s)), Knot(at=RIDGE_TOKENS, seconds=float(head_s))),
    )
    fixed_s = 0.0 if a_step else float(first_s)
    return Fit(
        step_time=step_time,
        front_s=fixed_s * (1 - IN_STEP[fixed]),
        prompt_s=fixed_s * IN_STEP[fixed],
        ttft_s=tuple(fixed_s + _solo_s(step_time, prompt) for prompt in SOLO_TOKENS),
        tbt_s=tuple(step_time.step_s(decode_kv_tokens=[prompt]) for prompt in SOLO_TOKENS),
        bytes_per_s=float(bytes_per_s),
    )


def _solo_s(step_time: StepTime, prompt: int) -> float:
    starts = range(0, prompt, SOLO_CHUNK)
    return sum(
        step_time.step_s(chunks=[(min(SOLO_CHUNK, prompt - start), start)]) for start in starts
    )


class Admitting(SimulatedExecutor):
    """Steps that take longer for every prompt that they begin."""

    def __init__(self, plan: Plan, clock: VirtualClock, prompt_s: float) -> None:
        super().__init__(plan, clock)
        self._prompt_s = prompt_s

    def stages_s(self, step: Step) -> tuple[float, ...]:
        """The formula's time, and prompt_s for each first chunk, in the first stage."""
        first_s, *others_s = super().stages_s(step)
        begun = sum(chunk.prefix == 0 for chunk in step.chunks)
        return (first_s + begun * self._prompt_s, *others_s)


def served(plan: Plan, fitted: Fit, requests: list[Request], policy: str) -> Run:
    """One load under one fit."""
    return simulate(
        plan,
        requests,
        policy,
        executor=functools.partial(Admitting, prompt_s=fitted.prompt_s),
    )


def plan_with(step_time: StepTime) -> Plan:
    """The planner's plan for one H200, with the fitted times and vLLM's limits."""
    question = "--model llama3-8b-1048k --gpus 1 --hardware h200 --max-context 262144"
    flags = [*question.split(), "--no-kernels", "--overwrite", "--out"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-c", "from planner.cli_plan import main; main()", *flags, folder],
            check=True,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        plan = load_plan(Path(folder) / "plan.yaml")
    row = ChunkRow(until_tokens=plan.limits.context_tokens, chunk_tokens=SOLO_CHUNK, predicted_s=0)
    return msgspec.structs.replace(
        plan,
        step_time=step_time,
        prefill=Prefill(chunks=(row,)),
        limits=msgspec.structs.replace(plan.limits, sequences=1024),
        scheduler=msgspec.structs.replace(plan.scheduler, max_step_tokens=SOLO_CHUNK),
    )


def mixed_load(seed: int) -> list[Request]:
    """Poisson shorts and one long prompt."""
    random = np.random.default_rng([seed, 4])
    gaps_s = random.exponential(1 / RATE, size=int(4 * RATE * DURATION_S))
    arrivals = [(float(at_s), SHORT_IN) for at_s in np.cumsum(gaps_s) if at_s < DURATION_S]
    arrivals = sorted([*arrivals, (LONG_AT_S, LONG_IN)])
    return [
        Request(number=number, arrival_s=at_s, prompt_tokens=tokens, max_tokens=SHORT_OUT)
        for number, (at_s, tokens) in enumerate(arrivals)
    ]


def figures(run: Run, front_s: float) -> tuple[float, ...]:
    """The quantities of one run."""
    ttft_s = np.sort([each.ttft_s for each in run.records if each.request.prompt_tokens < LONG_IN])
    gaps_s = np.sort(run.short_gaps_s)
    (long_s,) = (each.ttft_s for each in run.records if each.request.prompt_tokens == LONG_IN)
    return (
        *(front_s + nearest_rank(ttft_s, percent) for percent in (50, 90, 99)),
        *(1e3 * nearest_rank(gaps_s, percent) for percent in (50, 99)),
        front_s + long_s,
    )


def burst_tokens_per_s(plan: Plan, fitted: Fit, policy: str) -> float:
    """Tokens in and out over the time of a burst."""
    requests = [
        Request(number=number, arrival_s=0.0, prompt_tokens=SHORT_IN, max_tokens=SHORT_OUT)
        for number in range(BURST)
    ]
    run = served(plan, fitted, requests, policy)
    return BURST * (SHORT_IN + SHORT_OUT) / max(each.finished_s for each in run.records)


@dataclass(frozen=True)
class Simulated:
    """Both loads under one fit."""

    fit: Fit
    rows: dict[str, np.ndarray]
    """Policy to figures, a row a seed."""
    burst_tokens_per_s: float


def simulated(fixed: str, seeds: int) -> Simulated:
    """Runs every policy over every seed; policies see the same arrivals."""
    fitted = fit(fixed)
    plan = plan_with(fitted.step_time)
    rows = {
        policy: np.array(
            [
                figures(served(plan, fitted, mixed_load(each), policy), fitted.front_s)
                for each in range(seeds)
            ]
        )
        for policy in MEASURED
    }
    burst = burst_tokens_per_s(plan, fitted, next(iter(MEASURED)))
    return Simulated(fit=fitted, rows=rows, burst_tokens_per_s=burst)


def report(seeds: int, command: str) -> str:
    """The whole comparison as Markdown."""
    today = dt.datetime.now(tz=dt.UTC).date()
    lines = [
        "# Re-created vLLM steps against vLLM 0.25.1 on one H200",
        "",
        (
            f"Date {today}. Command: `{command}`. Python {platform.python_version()}, numpy "
            f"{np.__version__}, {seeds} seeds of arrivals. Simulated figures are virtual time "
            "under step times that were fitted on lone requests alone; no GPU was used."
        ),
        (
            "Measured: one H200, vLLM 0.25.1, Llama-3-8B shape, bf16, 22 November 2026, single "
            "runs whose arrivals were not recorded."
        ),
        "",
    ]
    found = {fixed: simulated(fixed, seeds) for fixed in FIXED}
    for fixed, what in FIXED.items():
        lines += [f"## Fit `{fixed}`: the fixed part of TTFT is {what}", ""]
        lines += _fit_lines(found[fixed].fit)
        for policy, was in MEASURED.items():
            lines += ["", f"Mixed load, `{policy}`:", ""]
            lines += _table(was, found[fixed].rows[policy])
        burst = found[fixed].burst_tokens_per_s
        lines += [
            "",
            (
                f"Burst of {BURST}: measured {BURST_TOKENS_PER_S:,.0f} tokens/s, simulated "
                f"{burst:,.0f} ({burst / BURST_TOKENS_PER_S - 1:+.1%})."
            ),
            "",
        ]
    for fixed in ("front", "quarter", "half"):
        lines += [*_alike(fixed, found[fixed]), ""]
    return "\n".join([*lines, *_summary(found)]) + "\n"


def _fit_lines(fitted: Fit) -> list[str]:
    head = " | ".join(f"{each:,}" for each in SOLO_TOKENS)
    lines = [f"| lone prompt, tokens | {head} |", "|---|" + "---|" * len(SOLO_TOKENS)]
    for name, measured, got in (
        ("TTFT", SOLO_TTFT_S, fitted.ttft_s),
        ("TBT", SOLO_TBT_S, fitted.tbt_s),
    ):
        cells = " | ".join(
            f"{1e3 * was:.5g} / {1e3 * now:.5g} ({now / was - 1:+.1%})"
            for was, now in zip(measured, got, strict=True)
        )
        lines.append(f"| {name}, ms: measured / fitted | {cells} |")
    time = fitted.step_time
    products = ", ".join(f"{1e6 * knot.seconds:.0f} us at {knot.at}" for knot in time.matmul)
    terms = (
        f"fixed {1e3 * fitted.front_s:.1f} ms a request",
        f"overhead {1e3 * time.overhead_s:.2f} ms a step",
        f"products of a layer {products} tokens",
        f"{1e12 * time.pair_s:.1f} ps a pair and layer",
        f"memory at {fitted.bytes_per_s / 1e12:.2f} TB/s",
    )
    return [*lines, "", f"Terms: {'; '.join(terms)}."]


def _table(measured: tuple[float | None, ...], rows: np.ndarray) -> list[str]:
    lines = [
        "| quantity | measured | simulated: median (5 % - 95 % of seeds) | median / measured | |",
        "|---|---|---|---|---|",
    ]
    for name, was, column in zip(QUANTITIES, measured, rows.T, strict=True):
        low, middle, high = np.percentile(column, [5, 50, 95])
        spread = f"{middle:.3g} ({low:.3g} - {high:.3g})"
        if was is None:
            lines.append(f"| {name} | - | {spread} | - | not measured |")
            continue
        verdict = "**missed**"
        if abs(middle / was - 1) <= WITHIN:
            verdict = f"within {WITHIN:.0%}"
        elif low <= was <= high:
            verdict = "missed, inside the spread"
        lines.append(f"| {name} | {was:g} | {spread} | {middle / was:.2f} | {verdict} |")
    return lines


def _alike(fixed: str, found: Simulated) -> list[str]:
    """The second policy over arrivals that give the short TTFT of the first as measured."""
    (first, was), (second, then) = MEASURED.items()
    alike = _alike_seeds(found)
    lines = [
        f"## Arrivals like the measured ones, fit `{fixed}`: {alike.sum()} of {len(alike)} seeds",
        "",
        (
            "Both measured runs probably had one stream of arrivals. Here are the seeds for which "
            f"`{first}` has all three short TTFT within {WITHIN:.0%} of its measurement. Step "
            "times are the same as above; only `threshold@vllm` is a prediction here:"
        ),
        "",
    ]
    if not alike.any():
        return [*lines, "none."]
    return [
        *lines,
        *_table(was, found.rows[first][alike]),
        "",
        f"`{second}`:",
        "",
        *_table(then, found.rows[second][alike]),
    ]


def _alike_seeds(found: Simulated) -> np.ndarray:
    """Which seeds give the short TTFT of the first policy as measured."""
    policy, was = next(iter(MEASURED.items()))
    ttft_s = np.array(was[:3], dtype=np.float64)
    far = np.abs(found.rows[policy][:, :3] / ttft_s - 1) > WITHIN
    return ~far.any(axis=1)


def _summary(found: dict[str, Simulated]) -> list[str]:
    """How many of the twelve figures each fit reproduces."""
    lines = [
        "## In one table",
        "",
        (
            f"Figures within {WITHIN:.0%}, of twelve (eleven of the mixed loads and the burst): by "
            "medians over all seeds; by medians over the seeds whose arrivals are like the "
            "measured ones; and the seeds that have all eleven within it at once."
        ),
        "",
        "| fit | all seeds | arrivals alike | seeds with all eleven |",
        "|---|---|---|---|",
    ]
    measured = np.array(
        [np.nan if each is None else each for row in MEASURED.values() for each in row]
    )
    known = ~np.isnan(measured)
    for fixed, each in found.items():
        rows = np.concatenate([each.rows[policy] for policy in MEASURED], axis=1)[:, known]
        near = np.abs(rows / measured[known] - 1) <= WITHIN
        burst = abs(each.burst_tokens_per_s / BURST_TOKENS_PER_S - 1) <= WITHIN
        alike = _alike_seeds(each)
        counts = [
            int((np.abs(np.median(some, axis=0) / measured[known] - 1) <= WITHIN).sum() + burst)
            if len(some)
            else "none alike"
            for some in (rows, rows[alike])
        ]
        together = int(near.all(axis=1).sum())
        lines.append(f"| `{fixed}` | {counts[0]} | {counts[1]} | {together} of {len(rows)} |")
    return lines


def main() -> None:
    """Prints the comparison, or writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    command = " ".join(["python bench/engine_recreation.py", *sys.argv[1:]])
    text = report(given.seeds, command)
    if given.out is None:
        print(text, end="")
    else:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text)


if __name__ == "__main__":
    main()

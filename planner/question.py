"""The flags of medha-plan that decide the plan, parsed, and the command that says them again."""

import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from plans.errors import UsageError

DEFAULT_WORKLOAD = "paper-mix-5"
DEFAULT_HARDWARE = "h100"
DEFAULT_OBJECTIVE = "goodput"
MOST_SECONDS = 1e6
"""Of a target, 12 days: budgets follow from it, and rates and sums from them."""
LEAST_RATE_RPS = 1e-9
"""One request in 30 years; gaps between the arrivals of much less are no longer numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What the user asked for, before any catalog entry is read."""

    model: str
    gpus: int
    hardware: str = DEFAULT_HARDWARE
    topology: Path | None = None
    workload: str = DEFAULT_WORKLOAD
    context_tokens: int | None = None
    ttft_slo_s: float | None = None
    tbt_slo_s: float | None = None
    objective: str = DEFAULT_OBJECTIVE
    rate_rps: float | None = None
    weight_dtype: str | None = None
    kv_dtype: str | None = None
    attention: str = "ours"
    effort: str = "quick"
    seed: int = 0

    @property
    def command(self) -> str:
        """The shell command that makes the plan again, without flags that only say where to."""
        words = ["medha-plan", "--model", self.model, "--gpus", str(self.gpus)]
        optional = (
            ("--hardware", self.hardware, DEFAULT_HARDWARE),
            ("--topology", self.topology, None),
            ("--max-context", self.context_tokens, None),
            ("--workload", self.workload, DEFAULT_WORKLOAD),
            ("--ttft-slo", self.ttft_slo_s, None),
            ("--tbt-slo", self.tbt_slo_s, None),
            ("--objective", self.objective, DEFAULT_OBJECTIVE),
            ("--rate", self.rate_rps, None),
            ("--weight-dtype", self.weight_dtype, None),
            ("--kv-dtype", self.kv_dtype, None),
            ("--attention", self.attention, "ours"),
            ("--effort", self.effort, "quick"),
            ("--seed", self.seed, 0),
        )
        for flag, value, default in optional:
            if value != default:
                words += [flag, str(value).removesuffix(".0")]
        return shlex.join(words)


def tokens(flag: str, text: str) -> int:
    """Tokens with an optional k or m, 1024-based; raises UsageError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kKmM]?)", text.strip())
    unit = {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()] if match else 0
    count = float(match[1]) * unit if match else 0.0
    if count < 1 or count != math.floor(count):
        raise UsageError(f"{flag} {text}: not a number of tokens, such as 131072, 128k or 1m")
    return int(count)


def seconds(flag: str, text: str) -> float:
    """Seconds from 2, 2s or 500ms, up to MOST_SECONDS; raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:[eE]-?\d+)?|\.\d+)\s*(ms|s|)", text.strip())
    value = float(match[1]) * (1e-3 if match[2] == "ms" else 1.0) if match else 0.0
    if not 0 < value <= MOST_SECONDS:
        most = f"; at most {MOST_SECONDS:.0f}" if value > MOST_SECONDS else ""
        raise UsageError(f"{flag} {text}: not a time above 0, such as 0.5, 2s or 500ms{most}")
    return value


def rate(flag: str, text: str) -> float:
    """Requests a second, from LEAST_RATE_RPS on; raises UsageError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not LEAST_RATE_RPS <= value < math.inf:
        raise UsageError(
            f"{flag} {text}: not a number of requests a second, such as 0.5;"
            f" at least {LEAST_RATE_RPS:g}"
        )
    return value

"""Products of a layer with what follows them, beside the library and separate kernels, on this GPU.

    PYTHONPATH=. python bench/kernels/gemm_rates.py [--out DIR] [--seconds S]

Every candidate is a node of a CUDA graph that goes through several copies of the weights, so that
L2 is cold and launches cost what they cost in a recorded step. Candidates alternate in one process;
figures are medians, `of_peer` is the median of the rounds' ratios peer over candidate, above 1
where it is faster. The peer is what a layer would run without the fused op: the library's product
and our own separate kernels; for a product alone, the library. `floor_us` is the larger of two
times: weights, inputs and outputs at the rate of a copy in the same run, and FLOPs at the best rate
seen on such a card (attention_peers.RATES); `of_floor` is the share of it that was reached.
`layer` is a whole layer without attention: norm, qkv, o, norm, gate and up, down.

Values are compared with fp32 first: `error` is a relative norm, and what is off is not timed.
Writes gemm_rates.csv, .md and .svg.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.kernels import rates_plot
from bench.kernels.attention_peers import card_rates, environment, replayed
from codegen.kernels import load_spec
from codegen.kernels.add_rms_norm.triton import add_rms_norm
from codegen.kernels.gate_up_silu.triton import gate_up_silu
from codegen.kernels.kv_write.triton import kv_write
from codegen.kernels.linear.triton import linear
from codegen.kernels.qkv_rope_write.reference import qkv_rope_write as qkv_reference
from codegen.kernels.qkv_rope_write.triton import qkv_rope_write
from codegen.kernels.rms_norm.triton import rms_norm
from codegen.kernels.rope.triton import rope
from codegen.kernels.rotary.triton import rotary
from codegen.kernels.silu_mul.triton import silu_mul
from codegen.problems import rates
from codegen.tune import applied

COLD_BYTES = 300 << 20
"""Weights that a graph goes through, several times the L2."""
PAGE = 128
ROUNDS = 9
TOLERANCE = 6e-3
"""Relative norm: bf16 keeps 8 bits, 2^-9 a rounding, of which the longest chain has four."""
EPS = 1e-5
library = torch.nn.functional.linear
Run = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Model:
    """One rank's share of a layer."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    head_dim: int = 128
    bias: bool = False
    norm: bool = False
    only: tuple[str, ...] = ("qkv", "o", "gate_up", "down", "layer")

    @property
    def weights(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each product."""
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        return {
            "qkv": (rows, self.hidden),
            "o": (self.hidden, self.heads * self.head_dim),
            "gate_up": (2 * self.ffn, self.hidden),
            "down": (self.hidden, self.ffn),
            "lm_head": (128256, self.hidden),
        }


MODELS = (
    Model(
        name="8B",
        hidden=4096,
        heads=32,
        kv_heads=8,
        ffn=14336,
        only=("qkv", "o", "gate_up", "down", "lm_head", "layer"),
    ),
    Model(name="70B of TP8", hidden=8192, heads=8, kv_heads=1, ffn=3584),
    Model(
        name="70B", hidden=8192, heads=64, kv_heads=8, ffn=28672, only=("qkv", "gate_up", "layer")
    ),
    Model(name="Qwen3-8B", hidden=4096, heads=32, kv_heads=8, ffn=12288, norm=True, only=("qkv",)),
    Model(
        name="Qwen2.5-7B", hidden=3584, heads=28, kv_heads=4, ffn=18944, bias=True, only=("qkv",)
    ),
    Model(name="1B", hidden=2048, heads=32, kv_heads=8, ffn=8192, head_dim=64, only=("qkv",)),
)
BEYOND = 128
"""Tokens at which the products are timed in our form too, which no step takes."""
FEW = (1, 16, 32, 64, BEYOND)
TOKENS = {
    "qkv": (1, 16, 32, 64, BEYOND, 512, 2048),
    "gate_up": (1, 16, 32, 64, BEYOND, 512, 2048),
    "layer": (1, 16, 32, 64),
}


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * scale


class Data:
    """Inputs and copies of the weights of one model and step."""

    def __init__(self, model: Model, tokens: int, products: tuple[str, ...]) -> None:
        self.model, self.tokens = model, tokens
        sizes = {name: model.weights[name] for name in products}
        copies = max(2, -(-COLD_BYTES // (2 * sum(n * k for n, k in sizes.values()))))
        self.weights = {
            name: [normal(n, k, scale=k**-0.5) for _ in range(copies)]
            for name, (n, k) in sizes.items()
        }
        self.copies = copies
        self.x = {name: normal(tokens, k) for name, (_, k) in sizes.items()}
        half = model.head_dim // 2
        self.positions = torch.randint(0, 1 << 20, (tokens,), device="cuda")
        self.frequencies = torch.logspace(0, -5.7, half, device="cuda")
        self.turns = rotary(self.positions, self.frequencies, 1.0)
        shape = (tokens // PAGE + 2, PAGE, model.kv_heads, model.head_dim)
        self.pages = [torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv"]
        self.slots = torch.randperm(shape[0] * PAGE, device="cuda")[:tokens]
        self.bias = normal(model.weights["qkv"][0]) if model.bias else None
        self.norms = [normal(model.head_dim) if model.norm else None for _ in "qk"]
        self.residual, self.gain = normal(tokens, model.hidden), normal(model.hidden)

    def qkv_arguments(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[Any, ...]:
        return (x, weight, self.bias, *self.norms, EPS, self.turns, *self.pages, self.slots)

    def qkv(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return qkv_rope_write(*self.qkv_arguments(x, weight))[0].flatten(1)

    def separate_qkv(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The library's product, norms, two rotations and a write, as without the fused op."""
        model = self.model
        sizes = [n * model.head_dim for n in (model.heads, model.kv_heads, model.kv_heads)]
        parts = library(x, weight, self.bias).split(sizes, -1)
        q, k, v = (part.unflatten(-1, (-1, model.head_dim)) for part in parts)
        if self.norms[0] is not None and self.norms[1] is not None:
            q, k = rms_norm(q, self.norms[0], EPS), rms_norm(k, self.norms[1], EPS)
        q, k = (rope(each, self.positions, self.frequencies, 1.0) for each in (q, k))
        kv_write(k, v, *self.pages, self.slots)
        return q.flatten(1)

    def runs(self, product: str) -> dict[str, list[Run]]:
        """Calls by candidate, one for each copy of the weights; the peer comes second."""
        if product == "layer":
            return {
                "ours": [lambda: self.layers("ours")],
                "separate": [lambda: self.layers("separate")],
                "ours, launches in turn": [changed(lambda: self.layers("ours"), OVERLAP=0)],
            }
        x, weights = self.x[product], self.weights[product]

        def each(function: Callable[..., Any]) -> list[Run]:
            return [lambda weight=weight: function(x, weight) for weight in weights]

        found = {
            "qkv": {
                "ours": each(self.qkv),
                "separate": each(self.separate_qkv),
                "library alone": each(lambda x, weight: library(x, weight, self.bias)),
            },
            "gate_up": {
                "ours": each(gate_up_silu),
                "separate": each(lambda x, weight: silu_mul(library(x, weight))),
                "library alone": each(library),
            },
        }.get(product, {"ours": each(plain), "library": each(library)})
        if self.tokens == BEYOND:
            found["streamed"] = [
                changed(run, TOKENS_MAX=BEYOND, NORM_TOKENS_MAX=BEYOND) for run in found["ours"]
            ]
        return found

    def layers(self, candidate: str) -> torch.Tensor:
        """As many layers as there are copies; queries stand in for the output of attention."""
        ours = candidate == "ours"
        product = plain if ours else library
        h, residual = self.x["qkv"], self.residual
        for at in range(self.copies):
            weight = {name: found[at] for name, found in self.weights.items()}
            normed, residual = add_rms_norm(h, residual, self.gain, EPS)
            q = (self.qkv if ours else self.separate_qkv)(normed, weight["qkv"])
            o = product(q, weight["o"])
            normed, residual = add_rms_norm(o, residual, self.gain, EPS)
            if ours:
                mlp = gate_up_silu(normed, weight["gate_up"])
            else:
                mlp = silu_mul(library(normed, weight["gate_up"]))
            h = product(mlp, weight["down"])
        return h

    def error(self, product: str) -> float:
        """Of our op, pages included, as a relative norm."""
        if product == "layer":
            return 0.0
        x, weight = self.x[product], self.weights[product][0]
        if product == "qkv":
            q = self.qkv(x, weight)
            own = [each.float() for each in self.pages]
            args = self.qkv_arguments(x, weight)
            wide = [each.float() if isinstance(each, torch.Tensor) else each for each in args[:-1]]
            wide[7:9] = [torch.zeros_like(each) for each in own]
            expected = qkv_reference(*wide, self.slots)[0].flatten(1)
            pairs = [(q.float(), expected), *zip(own, wide[7:9], strict=True)]
            return max(relative(*pair) for pair in pairs)
        exact = library(x.float(), weight.float())
        if product == "gate_up":
            gate, up = exact.chunk(2, -1)
            return relative(gate_up_silu(x, weight).float(), torch.nn.functional.silu(gate) * up)
        return relative(linear(x, weight, None).float(), exact)


def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return linear(x, weight, None)


def changed(run: Run, **params: int) -> Run:
    """A call with other tunables, where an op has them."""

    def with_params() -> Any:
        with ExitStack() as stack:
            for op in ("add_rms_norm", "gate_up_silu", "linear", "qkv_rope_write"):
                own = {
                    name: value for name, value in params.items() if name in load_spec(op).params
                }
                stack.enter_context(applied(op, own))
            return run()

    return with_params


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def floor_us(model: Model, product: str, tokens: int) -> float:
    """No kernel is faster on a card of these rates."""
    names = ("qkv", "o", "gate_up", "down") if product == "layer" else (product,)
    flops_s, bytes_s = card_rates()[0], rates(torch.device("cuda"))[1]
    sizes = [model.weights[name] for name in names]
    return sum(
        1e6 * max(2 * tokens * n * k / flops_s, 2 * (n * k + tokens * (n + k)) / bytes_s)
        for n, k in sizes
    )


def measure(model: Model, product: str, tokens: int) -> list[dict[str, Any]]:
    """A row a candidate."""
    names = ("qkv", "o", "gate_up", "down") if product == "layer" else (product,)
    data = Data(model, tokens, names)
    error = data.error(product)
    row = {"model": model.name, "product": product, "tokens": tokens}
    if not error <= TOLERANCE:  # NaN is no pass
        return [{**row, "candidate": "ours", "us": "wrong", "error": f"{error:.1e}"}]
    clocks = {name: replayed(runs) for name, runs in data.runs(product).items()}
    layers = data.copies if product == "layer" else 1
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(ROUNDS):
        for name, clock in clocks.items():
            times[name].append(clock() / layers)
    least = floor_us(model, product, tokens)
    peer = times[list(clocks)[1]]
    rows = []
    for name, found in times.items():
        us = statistics.median(found)
        ratio = statistics.median(each / own for each, own in zip(peer, found, strict=True))
        rows.append(
            {
                **row,
                "candidate": name,
                "us": round(us, 2),
                "p20": round(sorted(found)[ROUNDS // 5], 2),
                "p80": round(sorted(found)[ROUNDS * 4 // 5], 2),
                "floor_us": round(least, 2),
                "of_floor": round(least / us, 3),
                "of_peer": round(ratio, 3),
                "error": f"{error:.1e}" if name == "ours" and product != "layer" else "",
            }
        )
    return rows


def save(figures: Path, rows: list[dict[str, Any]], skipped: list[str]) -> None:
    """The rows so far, and a page of them."""
    fields = ["model", "product", "tokens", "candidate", "us", "p20", "p80", "floor_us", "of_floor",
              "of_peer", "error"]  # fmt: skip
    with figures.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=fields, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    flops_s, bytes_s = card_rates()[0], rates(torch.device("cuda"))[1]
    rate = f"floor: {flops_s / 1e12:.0f} TFLOP/s, {bytes_s / 1e12:.2f} TB/s (this run's copy)"
    text = [*environment(), rate, "", rates_plot.BEGIN, rates_plot.END, ""]
    page = rates_plot.with_table("\n".join(text), rates_plot.table(rates_plot.read(figures)))
    figures.with_suffix(".md").write_text(page + "".join(f"not run: {each}\n" for each in skipped))


def main() -> None:
    """Runs all rows; what was measured is written after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--seconds", type=float, default=300.0, help="starts no row after these")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    figures = options.out / "gemm_rates.csv"
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    cases = [
        (model, product, tokens)
        for model in MODELS
        for product in model.only
        for tokens in TOKENS.get(product, FEW)
    ]
    for model, product, tokens in cases:
        if time.monotonic() - began > options.seconds:
            skipped.append(f"{model.name} {product} {tokens}")
            continue
        found = measure(model, product, tokens)
        rows += found
        for row in found:
            print(row, flush=True)
        torch.cuda.empty_cache()
        save(figures, rows, skipped)
    if rows:
        save(figures, rows, skipped)
        rates_plot.write(figures)
    if skipped:
        print(f"not run for lack of time: {skipped}")


if __name__ == "__main__":
    main()

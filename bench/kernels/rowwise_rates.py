"""Row-wise kernels and sampling beside the copy rate and the torch ops they replace, on this GPU.

    PYTHONPATH=. python bench/kernels/rowwise_rates.py [--out DIR]

Every candidate is a node of a CUDA graph that runs over several copies of its data, so that L2 is
cold and launches cost what they cost in a recorded step. Bytes are those that the op must move:
each input read once, each output written once. `of_copy` compares their rate with that of
`Tensor.copy_` of as many bytes; `floor_us` is what they take at the rate of the fastest of these
copies, of any size, in the same run, and `of_floor` the share of it that was reached. Values are
checked against the reference first.

Writes rowwise_rates.csv, .md and .svg.
"""

import argparse
import csv
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench.kernels import rates_plot
from bench.kernels.attention_peers import environment, replayed
from codegen.kernels import load_reference, load_spec
from codegen.kernels.add_rms_norm.triton import add_rms_norm
from codegen.kernels.kv_write.triton import kv_write
from codegen.kernels.rms_norm.triton import rms_norm
from codegen.kernels.rope.triton import rope
from codegen.kernels.sample.triton import sample
from codegen.kernels.silu_mul.triton import silu_mul

KERNELS = {
    "add_rms_norm": add_rms_norm,
    "kv_write": kv_write,
    "rms_norm": rms_norm,
    "rope": rope,
    "sample": sample,
    "silu_mul": silu_mul,
}
TOKENS = {"sample": (1, 64)}
"""Of one op, in place of (1, 64, 2048, 16384)."""
CONTROLS = ((0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 50, 1.0, 0.0), (0.8, 64, 0.9, 0.0))
"""Temperature, top_k, top_p and min_p of rows in turn; the last for one row."""
VOCAB = 128_256
COLD_BYTES = 256 << 20
"""Bytes that a graph goes through, several times the L2."""


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def moved_bytes(op: str, tokens: int) -> int:
    """What an op of these arguments reads and writes at least."""
    per_token = {
        "add_rms_norm": 8 * 8192,
        "kv_write": 8 * 8 * 128,
        "rms_norm": 4 * 8192,
        "rope": 4 * 32 * 128,
        "sample": 4 * VOCAB,
        "silu_mul": 6 * 14336,
    }
    return per_token[op] * tokens


def arguments(op: str, tokens: int) -> tuple[Any, ...]:
    """Arguments of the op in an 8B or, for norms and activation, 70B model."""
    wide, head = 8192, 128
    if op == "rms_norm":
        return (normal(tokens, wide), normal(wide), 1e-5)
    if op == "add_rms_norm":
        return (normal(tokens, wide), normal(tokens, wide), normal(wide), 1e-5)
    if op == "silu_mul":
        return (normal(tokens, 2 * 14336),)
    if op == "sample":
        logits = normal(tokens, VOCAB).float() * 3
        rows = [(*CONTROLS[-1 - row % len(CONTROLS)], 0.37) for row in range(tokens)]
        controls = torch.tensor(rows, dtype=torch.float64, device="cuda")
        return (logits, controls)
    positions = torch.randint(0, 1 << 20, (tokens,), device="cuda")
    if op == "rope":
        frequencies = torch.logspace(0, -5.7, head // 2, device="cuda")
        x = normal(tokens, 6144)[:, :4096].view(tokens, 32, head)
        return (x, positions, frequencies, 1.0)
    k, v = (normal(tokens, 6144)[:, 4096:5120].view(tokens, 8, head) for _ in "kv")
    pages = [torch.zeros((tokens // 128 + 2, 128, 8, head), device="cuda").bfloat16() for _ in "kv"]
    slots = torch.randperm(pages[0].shape[0] * 128, device="cuda")[:tokens]
    return (k, v, *pages, slots)


def wrong(op: str, args: tuple[Any, ...]) -> float:
    """Largest difference from the reference, as a share of the op's tolerance."""
    if op == "sample":
        return 0.0 if torch.equal(sample(*args), load_reference(op)(*args)) else torch.inf
    bound = load_spec(op).tolerance["bf16"]
    if op == "kv_write":
        own, other = ([each.clone() for each in args[2:4]] for _ in range(2))
        kv_write(*args[:2], *own, args[4])
        load_reference(op)(*args[:2], *other, args[4])
        return 0.0 if all(map(torch.equal, own, other)) else torch.inf
    found, expected = KERNELS[op](*args), load_reference(op)(*args)
    if op == "add_rms_norm":
        found, expected = found[0], expected[0]
    share = (found.float() - expected.float()).abs() / expected.float().abs().clamp_min(1)
    return share.max().item() / bound


def stored(
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """The write by torch where no slot is -1; the reference cannot be recorded in a graph."""
    k_pages.flatten(0, 1).index_copy_(0, slots_T, k_TKH)
    v_pages.flatten(0, 1).index_copy_(0, slots_T, v_TKH)


def measure(op: str, tokens: int) -> list[dict[str, Any]]:
    """A row a candidate."""
    args, moved = arguments(op, tokens), moved_bytes(op, tokens)
    off = wrong(op, args)
    copies = min(max(COLD_BYTES // moved, 1), 64)
    sets = [args, *(arguments(op, tokens) for _ in range(copies - 1))]
    plain = [normal(max(moved // 4, 1)) for _ in range(copies + 1)]
    reference = stored if op == "kv_write" else load_reference(op)
    runs: dict[str, list[Callable[[], Any]]] = {
        "ours": [lambda each=each: KERNELS[op](*each) for each in sets],
        "torch": [lambda each=each: reference(*each) for each in sets],
        "copy": [lambda a=a, b=b: a.copy_(b) for a, b in pairwise(plain)],
    }
    clocks = {name: replayed(each) for name, each in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(9):
        for name, clock in clocks.items():
            times[name].append(clock())
    rows = []
    for name, found in times.items():
        us = statistics.median(found)
        share = statistics.median(
            copy / own for copy, own in zip(times["copy"], found, strict=True)
        )
        rows.append(
            {
                "op": op,
                "tokens": tokens,
                "candidate": name,
                "us": round(us, 2),
                "tb_s": round(moved / us / 1e6, 2),
                "of_copy": round(share, 3),
                "of_tolerance": round(off, 3) if name == "ours" else "",
            }
        )
    return rows


def with_floors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what their bytes take at the rate of the run's fastest copy."""

    def least_us(row: dict[str, Any], rate: float) -> float:
        return moved_bytes(row["op"], int(row["tokens"])) / rate

    rate = max(
        moved_bytes(row["op"], int(row["tokens"])) / float(row["us"])
        for row in rows
        if row["candidate"] == "copy"
    )
    return [
        {
            **row,
            "floor_us": round(least_us(row, rate), 2),
            "of_floor": round(least_us(row, rate) / float(row["us"]), 3),
        }
        for row in rows
    ]


def main() -> None:
    """Runs all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [
        row
        for op in KERNELS
        for tokens in TOKENS.get(op, (1, 64, 2048, 16384))
        for row in measure(op, tokens)
    ]
    rows = with_floors(rows)
    figures = options.out / "rowwise_rates.csv"
    with figures.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    page = figures.with_suffix(".md")
    page.write_text("\n".join([*environment(), "", rates_plot.BEGIN, rates_plot.END, ""]))
    rates_plot.write(figures)
    print(page.read_text())


if __name__ == "__main__":
    main()

"""A step of a chunk and decodes: one list, two lists, and FlashAttention-3 in two calls.

    PYTHONPATH=. python bench/kernels/attention_mixed.py [--out DIR]

`ours` is what the op chooses, by the estimate of work.saves; `one list` and `two lists` are forced.
`overlapped floor` is the larger of all products at their rate and all bytes at theirs.
"""

import argparse
import csv
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.kernels.attention_cases import Case, Problem, flash_attention_3, make, ours, portable
from bench.kernels.attention_peers import TOLERANCE, card_rates, cleared, environment, table
from codegen.kernels.paged_attention import triton as kernel

K = 1024
STEPS = tuple(
    (
        Case(name="chunk", queries=queries, keys=keys * K, heads=heads),
        Case(name="d", queries=1, keys=length * K, batch=batch, heads=heads),
    )
    for heads, queries, keys, batch, length in (
        (32, 512, 128, 31, 4),
        (32, 128, 128, 64, 8),
        (32, 32, 128, 31, 4),
        (32, 2048, 128, 31, 4),
        (32, 512, 32, 128, 2),
        (32, 512, 128, 1, 128),
        (32, 2048, 8, 64, 4),
        (32, 512, 4, 8, 4),
        (32, 64, 8, 4, 4),
        (64, 512, 128, 31, 4),
        (64, 128, 128, 64, 8),
    )
)


def forced(problem: Problem, mixed: int, *, hopper: bool = True) -> Callable[[], torch.Tensor]:
    """A call whose list is built now, in one launch (2), in two (0) or as the op chooses (1)."""
    inputs = SimpleNamespace(**{**vars(problem.inputs), "memo": {}})
    kept, kernel.MIXED = kernel.MIXED, mixed
    try:
        alone = Problem(**{**vars(problem), "inputs": inputs})
        return ours(alone, kernel) if hopper else portable(alone, kernel)
    finally:
        kernel.MIXED = kept


def joined(chunk: Problem, decodes: Problem) -> Problem:
    """One step: the decodes first, as the packer orders them; the chunk's pages behind theirs."""
    pages = [
        torch.cat((getattr(decodes, name), getattr(chunk, name))) for name in ("k_pages", "v_pages")
    ]
    first, second = decodes.inputs, chunk.inputs
    width = max(first.page_table_BP.shape[1], second.page_table_BP.shape[1])
    tables = [
        torch.nn.functional.pad(each, (0, width - each.shape[1]))
        for each in (first.page_table_BP, second.page_table_BP + len(decodes.k_pages))
    ]
    tokens = len(decodes.q_TNH)
    starts = [*first.host.query_starts, *(tokens + each for each in second.host.query_starts[1:])]
    lens = [*first.host.kv_lens, *second.host.kv_lens]
    inputs = SimpleNamespace(
        page_table_BP=torch.cat(tables).int().contiguous(),
        host=SimpleNamespace(query_starts=starts, kv_lens=lens, causal=[True] * len(lens)),
        memo={},
    )
    return Problem(
        q_TNH=torch.cat((decodes.q_TNH, chunk.q_TNH)),
        k_BSKH=chunk.k_BSKH,
        v_BSKH=chunk.v_BSKH,
        k_pages=pages[0],
        v_pages=pages[1],
        inputs=inputs,
    )


def main() -> None:
    """Runs the steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    flush = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    rows = []
    for chunk_case, decode_case in STEPS:
        chunk, decodes = make(chunk_case), make(decode_case, seed=1)
        step = joined(chunk, decodes)
        runs: dict[str, Callable[[], Any]] = {
            "two lists": forced(step, 0),
            "one list": forced(step, 2),
            "ours": forced(step, 1),
            "portable, two lists": forced(step, 0, hopper=False),
            "portable": forced(step, 1, hopper=False),
        }
        first, second = runs["one list"](), runs["two lists"]()
        apart = (first.float() - second.float()).norm() / first.float().norm()
        assert apart < TOLERANCE, f"{apart} apart"
        try:
            peers = [
                flash_attention_3(c, p) for c, p in ((decode_case, decodes), (chunk_case, chunk))
            ]
            peers[0]()
            runs["fa3, two calls"] = lambda each=peers: [run() for run in each]
        except ImportError as error:
            print(f"no FlashAttention-3: {error}")
        clocks = {name: cleared(run, flush) for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in clocks}
        for clock in clocks.values():
            clock()
        for number in range(15):
            for name in clocks if number % 2 == 0 else reversed(clocks):
                times[name].append(clocks[name]())
        flops, bytes_s = card_rates()
        floor_us = 1e6 * max(
            (chunk_case.flops + decode_case.flops) / flops,
            (chunk_case.kv_bytes + decode_case.kv_bytes) / bytes_s,
        )
        for name, found in times.items():
            us = statistics.median(found)
            rows.append(
                {
                    "heads": f"{chunk_case.heads}/{chunk_case.kv_heads}",
                    "step": f"{chunk_case.queries} on {chunk_case.keys}, "
                    f"{decode_case.batch} x 1 on {decode_case.keys}",
                    "candidate": name,
                    "us": round(us, 1),
                    "of two lists": round(
                        statistics.median(
                            b / a for a, b in zip(found, times["two lists"], strict=True)
                        ),
                        3,
                    ),
                    "of overlapped floor": round(floor_us / us, 3),
                }
            )
    text = "\n".join([*environment(), "", table(rows, list(rows[0])), ""])
    (options.out / "attention_mixed.md").write_text(text)
    with (options.out / "attention_mixed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(text)


if __name__ == "__main__":
    main()

"""A step of one long chunk and many decodes: our one call beside two calls and FlashAttention-3.

    PYTHONPATH=. python bench/kernels/attention_mixed.py [--out DIR]

Our call makes two launches, one a shape of tile, from one list of work; `two calls` are two steps.
`overlapped floor` is the larger of all products at their rate and all bytes at theirs.
"""

import argparse
import statistics
from pathlib import Path
from types import SimpleNamespace

import torch

from bench.kernels.attention_cases import Case, Problem, flash_attention_3, make, ours
from bench.kernels.attention_peers import card_rates, cleared, environment, table
from codegen.kernels.paged_attention import triton as kernel

K = 1024
STEPS = (
    (
        Case(name="chunk", queries=512, keys=128 * K),
        Case(name="d", queries=1, keys=4 * K, batch=31),
    ),
    (
        Case(name="chunk", queries=128, keys=128 * K),
        Case(name="d", queries=1, keys=8 * K, batch=64),
    ),
)


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
        one = ours(joined(chunk, decodes), kernel)
        apart = [ours(decodes, kernel), ours(chunk, kernel)]
        assert torch.equal(one()[: len(decodes.q_TNH)], apart[0]())
        runs = {"one call": one, "two calls": lambda each=apart: [run() for run in each]}
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
        for number in range(21):
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
                    "step": f"{chunk_case.queries} on {chunk_case.keys}, "
                    f"{decode_case.batch} x 1 on {decode_case.keys}",
                    "candidate": name,
                    "us": round(us, 1),
                    "of two calls": round(
                        statistics.median(
                            b / a for a, b in zip(found, times["two calls"], strict=True)
                        ),
                        3,
                    ),
                    "of overlapped floor": round(floor_us / us, 3),
                }
            )
    text = "\n".join([*environment(), "", table(rows, list(rows[0])), ""])
    (options.out / "attention_mixed.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

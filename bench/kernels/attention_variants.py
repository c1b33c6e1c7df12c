"""Choices inside our attention, timed beside each other: merges, keys in fp8, cuts, the exchange.

    PYTHONPATH=. python bench/kernels/attention_variants.py [merge fp8 cuts exchange]

A variant is the op under other values of its module constants, whose work list is built under them
too. All variants of a case run once in every round; printed are medians, p20 and p80.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from bench.kernels.attention_cases import Case, Problem, flash_attention_3, make, relative_error
from bench.kernels.attention_check import quantised
from bench.kernels.attention_peers import cleared, replayed
from codegen.kernels.kvp_merge.triton import kvp_merge
from codegen.kernels.kvp_pack.triton import kvp_pack
from codegen.kernels.paged_attention import triton as kernel
from codegen.kernels.paged_attention import work as lists
from codegen.kernels.paged_attention.tiles import merge_kernel
from runtime.parallel.kvp import merge_shards

K = 1024
Run = Callable[[], torch.Tensor]


@contextmanager
def changed(module: ModuleType, values: Mapping[str, Any]) -> Iterator[None]:
    """The module with other values of some names, for a while."""
    kept = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


def variant(problem: Problem, *, fp8: bool = False, **values: Any) -> Run:
    """A call whose list was built under these constants of triton.py, or names of work.py."""
    inputs = SimpleNamespace(**{**vars(problem.inputs), "memo": {}})
    pages, scales = (problem.k_pages, problem.v_pages), []
    if fp8:
        *pages, k_scales, v_scales = quantised(problem.k_pages, problem.v_pages)
        scales = [k_scales, v_scales]

    def run() -> torch.Tensor:
        return kernel.paged_attention(
            problem.q_TNH, *pages, pages[0], inputs, problem.scale, *scales
        )[0]

    of_lists = {name: value for name, value in values.items() if hasattr(lists, name)}
    of_kernel = {name: value for name, value in values.items() if name not in of_lists}
    with changed(kernel, of_kernel), changed(lists, of_lists):
        run()
        torch.cuda.synchronize()
    return run


def show(title: str, clocks: dict[str, Callable[[], float]], rounds: int = 15) -> None:
    """Prints a line a variant."""
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for clock in clocks.values():
        clock()
    for number in range(rounds):
        for name in clocks if number % 2 == 0 else reversed(clocks):
            times[name].append(clocks[name]())
    for name, found in times.items():
        low, high = (sorted(found)[int(share * (rounds - 1))] for share in (0.2, 0.8))
        us = statistics.median(found)
        print(f"{title:26} {name:26} {us:9.1f} us ({low:.1f}-{high:.1f})", flush=True)


def merge(flush: torch.Tensor) -> None:
    """By the last piece to end, or by a second launch; and that launch alone."""
    forms = {"last piece": {"APART_TILES": 0, "FUSE_MERGE": 2}, "second launch": {"FUSE_MERGE": 0}}
    for heads in (32, 64):
        case = Case(name="decode", queries=1, keys=4 * K, heads=heads)
        problems = [make(case, seed) for seed in range(6)]
        clocks = {
            name: replayed([variant(each, **values) for each in problems])
            for name, values in forms.items()
        }
        clocks["fa3"] = replayed([flash_attention_3(case, each) for each in problems])
        show(f"1 x 4K, {heads}/8, graph", clocks)
    for batch, keys, heads in ((1, 16, 32), (8, 16, 32), (32, 4, 32), (1, 128, 32), (1, 128, 64)):
        case = Case(name="decode", queries=1, keys=keys * K, batch=batch, heads=heads)
        problem = make(case)
        runs = {name: variant(problem, **values) for name, values in forms.items()}
        show(
            f"{batch} x {keys}K, {heads}/8",
            {name: cleared(run, flush) for name, run in runs.items()},
        )
    for tokens, parts in ((64, 2), (64, 8), (64, 17), (2048, 2)):
        floats = torch.randn(tokens * parts * 8 * 16, 128, device="cuda")
        rows = [[at * parts, parts, at, at, at + 1] for at in range(tokens)]
        merges = torch.tensor(rows, dtype=torch.int32, device="cuda")
        out = torch.empty(tokens, 32, 128, dtype=torch.bfloat16, device="cuda")
        lse = torch.empty(tokens, 32, device="cuda")

        def alone(*tensors: torch.Tensor) -> None:
            merge_kernel[(len(tensors[2]), 8)](
                *tensors, 1, KV_HEADS=8, GROUP=4, HEAD=128, BLOCK_M=16, ROWS=4,
                SLOTS=kernel.MERGE_ROWS // 4, FIELDS=5, num_warps=kernel.MERGE_WARPS,
            )  # fmt: skip

        arguments = (floats, floats[:, 0].contiguous(), merges, out, lse)
        clock = replayed([lambda each=arguments: alone(*each)] * 8)
        show(f"merge of {tokens} x {parts}", {"alone, graph": clock})


def fp8(flush: torch.Tensor) -> None:
    """Decodes and a chunk over pages in fp8, beside bf16."""
    for batch, keys, queries, heads in (
        (1, 128, 1, 32),
        (32, 4, 1, 32),
        (8, 16, 1, 32),
        (1, 1024, 1, 32),
        (1, 128, 1, 64),
        (1, 128, 512, 32),
    ):
        case = Case(name="case", queries=queries, keys=keys * K, batch=batch, heads=heads)
        problem = make(case)
        runs = {"bf16": variant(problem), "fp8": variant(problem, fp8=True)}
        errors = {name: relative_error(case, problem, run(), rows=3) for name, run in runs.items()}
        title = f"{batch} x {queries} on {keys}K, {heads}/8"
        show(title, {name: cleared(run, flush) for name, run in runs.items()})
        print(f"{title:26} errors against fp32 {errors}", flush=True)


def cuts(flush: torch.Tensor) -> None:
    """512 queries on a million keys at 64/8 heads: how the keys are cut."""
    case = Case(name="chunk", queries=512, keys=K * K, heads=64)
    problem = make(case)
    runs = {"as built": variant(problem)}
    for number in (1, 4, 33):

        def pieces(count: torch.Tensor, number: int = number, **_: Any) -> torch.Tensor:
            return torch.full_like(count, number)

        runs[f"{number} pieces"] = variant(problem, _pieces=pieces)
    runs["fa3"] = flash_attention_3(case, problem)
    show("512 on 1M, 64/8", {name: cleared(run, flush) for name, run in runs.items()}, 25)


def exchange(flush: torch.Tensor) -> None:
    """The kernels of the exchange between two KVP groups, beside torch ops for the merge alone."""
    del flush  # replays of a graph
    for tokens in (1, 64, 2048):
        out = torch.randn(tokens, 32, 128, device="cuda", dtype=torch.bfloat16)
        lse = torch.randn(tokens, 32, device="cuda")
        rows = torch.arange(tokens, device="cuda")
        places = torch.stack((rows * 0, rows * 0 + tokens, rows)).int()
        shares = torch.stack((rows * 0 - 2, rows)).int()
        sent = kvp_pack(out, lse, rows, places)
        both = torch.stack((out, out)), torch.stack((lse, lse))

        def pack(*tensors: torch.Tensor) -> torch.Tensor:
            return kvp_pack(*tensors)

        packing = (out, lse, rows, places)
        merged = (out, lse, rows, shares, places, sent)
        calls: dict[str, Callable[[], Any]] = {
            "pack": lambda each=packing: pack(*each),
            "merge": lambda each=merged: kvp_merge(*each),
            "merge by torch": lambda each=both: merge_shards(*each),
        }
        clocks = {name: replayed([call] * 8) for name, call in calls.items()}
        show(f"exchange, {tokens} tokens", clocks)


def main() -> None:
    """Runs the parts named, or all."""
    parts = {"merge": merge, "fp8": fp8, "cuts": cuts, "exchange": exchange}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = ", ".join(parts)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {names}; all by default")
    chosen = parser.parse_args().parts
    if unknown := [each for each in chosen if each not in parts]:
        parser.error(f"no part {unknown[0]!r}; known: {names}")
    flush = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    for name in chosen or parts:
        parts[name](flush)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

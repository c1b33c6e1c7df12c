"""Checks our attention on this GPU against the op's reference, over odd shapes, before timing.

Poisoned outputs, fresh data, bf16 and fp16, mixed batches; exit status 1 if anything is off.

    PYTHONPATH=. python bench/kernels/attention_check.py [--small]
"""

import argparse
import itertools
import random
import warnings
from types import SimpleNamespace

import torch

from codegen.kernels.kv_write.triton import kv_write
from codegen.kernels.paged_attention import triton as kernel
from codegen.kernels.paged_attention.reference import paged_attention as reference

TOLERANCE = 6e-3
"""|out - reference| / |reference|: P and the result rounded to bf16 cost 2^-9 each at most, and
half of that in the mean; fp16 is four times finer."""


def step(
    rows: list[tuple[int, int, bool]], *, page: int, padding: int, seed: int
) -> tuple[int, SimpleNamespace]:
    """Inputs of sequences (queries, keys, whether their keys are here), pages in random order."""
    shuffled = random.Random(seed)
    used = [-(-keys // page) for _, keys, _ in rows]
    pool = list(range(sum(used) + 1))
    shuffled.shuffle(pool)
    starts, tables = [0], []
    for (queries, _, _), pages in zip(rows, used, strict=True):
        starts.append(starts[-1] + queries)
        tables.append([pool.pop() for _ in range(pages)])
    width = max(1, *used)
    slots = [0 if here else -1 for count, _, here in rows for _ in range(count)]
    inputs = SimpleNamespace(
        slots_T=torch.tensor(slots + [-1] * padding, device="cuda"),
        query_starts_B1=torch.tensor(starts, dtype=torch.int32, device="cuda"),
        kv_lens_B=torch.tensor([keys for _, keys, _ in rows], dtype=torch.int32, device="cuda"),
        page_table_BP=torch.tensor(
            [row + [0] * (width - len(row)) for row in tables], dtype=torch.int32, device="cuda"
        ),
        recorded=False,
        memo={},
    )
    return sum(used) + 1, inputs


def poisoned(*shape: object, **options: object) -> torch.Tensor:
    """Memory in which everything that a kernel forgets to write is NaN."""
    if options.get("dtype") in {torch.int32, torch.int64}:
        return EMPTY(*shape, **options)
    return torch.full(shape if isinstance(shape[0], int) else shape[0], torch.nan, **options)


EMPTY = torch.empty
BATCHES = (
    [(1, 1, True), (1, 100, True), (1, 0, False), (1, 5000, True)],
    [(40, 300, True), (1, 129, True), (200, 200, True)],
    [(9, 77, False), (300, 1000, False), (130, 0, False)],
    [(33, 4001, True)],
    [(17, 17, True), (5, 9000, True), (2, 64, True)],
    [(1000, 3000, True), (1, 20000, True), (64, 20000, True)],
)


FORMS = (
    ("gluon", 1, 0),
    ("gluon, one list", 1, 2),
    ("portable", 0, 0),
    ("portable, one list", 0, 2),
    ("fp8", 0, 2),
)
"""Name, GLUON, MIXED."""


def quantised(k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """K and V pages in fp8 and their scales, as kv_write leaves them."""
    pages = [torch.zeros(k.shape, dtype=torch.float8_e4m3fn, device="cuda") for _ in "kv"]
    scales = [torch.zeros(k.shape[0], k.shape[2], device="cuda") for _ in "kv"]
    slots = torch.arange(k.shape[0] * k.shape[1], device="cuda")
    kv_write(k.flatten(0, 1), v.flatten(0, 1), *pages, slots, *scales)
    return [*pages, *scales]


def main() -> None:
    """Prints a line a combination."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="few combinations, small batches")
    small = parser.parse_args().small
    warnings.simplefilter("error")
    torch.manual_seed(random.SystemRandom().randrange(1 << 30))
    failures = 0
    shapes = [(8, 4, 128, 128), (8, 8, 128, 128), (2, 4, 128, 64), (1, 16, 64, 64), (2, 1, 64, 16),
              (2, 7, 128, 64), (1, 3, 128, 128), (2, 1, 128, 64)]  # fmt: skip
    combinations = list(itertools.product(BATCHES[:3] if small else BATCHES, shapes))
    if small:
        combinations = combinations[::4]
    for at, (rows, (kv_heads, group, head_dim, page)) in enumerate(combinations):
        dtype = torch.float16 if at % 3 == 2 else torch.bfloat16
        padding = at % 2
        pages, inputs = step(rows, page=page, padding=padding, seed=at)
        tokens = sum(queries for queries, _, _ in rows) + padding
        q = torch.randn(tokens, kv_heads * group, head_dim, device="cuda").to(dtype)
        k, v = (torch.randn(pages, page, kv_heads, head_dim, device="cuda").to(dtype) for _ in "kv")
        scale = head_dim**-0.5
        exact = reference(q.float(), k, v, k, inputs, scale)
        cache = quantised(k, v)
        rounded = reference(q.float(), *cache[:2], cache[0], inputs, scale, *cache[2:])
        for name, gluon, mixed in FORMS:
            inputs.memo = {}
            kernel.GLUON, kernel.MIXED = gluon, mixed
            kernel._hopper.cache_clear()  # noqa: SLF001 - all forms in one process
            pages, scales = ((k, v), ()) if name != "fp8" else (cache[:2], cache[2:])
            expected, expected_lse = exact if name != "fp8" else rounded
            torch.empty, torch.empty_like = poisoned, lambda x: torch.full_like(x, torch.nan)
            try:
                out, lse = kernel.paged_attention(q, *pages, k, inputs, scale, *scales)
                again, _ = kernel.paged_attention(q, *pages, k, inputs, scale, *scales)
            finally:
                torch.empty, torch.empty_like = EMPTY, LIKE
                kernel.GLUON = kernel.MIXED = 1
            finite = expected_lse.isfinite()
            error = ((out.float() - expected).norm() / expected.norm()).item()
            lse_error = (lse - expected_lse)[finite].abs().max().item() if finite.any() else 0.0
            good = error < TOLERANCE or not finite.any()
            good &= lse_error < 1e-3 and torch.equal(lse.isfinite(), finite)
            good &= torch.equal(lse == -torch.inf, ~finite) and torch.equal(out, again)
            good &= bool((out[~finite] == 0).all())
            failures += not good
            forms = [(f.rows, bool(f.hopper)) for f, _ in next(iter(inputs.memo.values()))]
            print(f"{'ok ' if good else 'BAD'} {name}: {rows} {kv_heads=} {group=} {head_dim=} "
                  f"{page=} {dtype} {forms} "
                  f"error {error:.1e} lse {lse_error:.1e}", flush=True)  # fmt: skip
    print(f"{failures} failures")
    raise SystemExit(failures > 0)


LIKE = torch.empty_like

if __name__ == "__main__":
    main()

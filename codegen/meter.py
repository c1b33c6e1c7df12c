"""Measures what a profile asks for: one table's row at a time, on the device at hand.

Ops are called through the registry of codegen/kernels (codegen/problems.py), sampling and the
host's parts as the runtime does them. Collectives need several processes: codegen/links.py.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from codegen.clock import Clock, Timing, host_us, summary
from codegen.problems import PAGE_TOKENS, Problem, Where, make, release
from plans.errors import UsageError

Parts = Mapping[str, int | str]
LAYER = {  # ops of a small layer, whose launches take longer than they run
    "add_rms_norm": {"tokens": 512, "width": 1024},
    "linear": {"tokens": 512, "n": 256, "k": 256},
    "paged_attention": {"tokens": 512, "keys": 512, "heads": 4, "kv_heads": 1, "head_dim": 128},
}
CHUNK = {"tokens": 2048, "keys": 34816, "heads": 32, "kv_heads": 8, "head_dim": 128}
DECODES = {"batch": 16, "keys": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128}
VOCAB = 128256
DENSE = 150
"""Operations a byte from which products, not memory, are the limit on Hopper."""


class Meter:
    """Times the rows of every table but links."""

    def __init__(self, where: Where, clock: Clock, hot: Clock) -> None:
        """Clocks of a device, or a test's own; hot: of what is bound by products, so by power."""
        self._where = where
        self._clock = clock
        self._hot = hot
        self._table = ""

    def __call__(self, table: str, parts: Parts) -> Timing:
        """Time of the row with these parts of its key; raises what goes wrong."""
        if table != self._table:  # what the last table held is of no use to this one
            release()
            self._table = table
        return METHODS[table](self, parts)

    def problem(self, op: str, sizes: Mapping[str, int]) -> Problem:
        """Calls of an op on this device."""
        return make(op, sizes, self._where)

    def timed(self, problem: Problem) -> Timing:
        """Time of a call."""
        dense = problem.flops > DENSE * problem.moved_bytes
        return (self._hot if dense else self._clock)([problem.calls])[0]

    def product(self, parts: Parts) -> Timing:
        """A matrix product."""
        sizes = {name: int(parts[name]) for name in ("n", "k", "tokens")}
        return self.timed(self.problem(str(parts["op"]), sizes))

    def row_wise(self, parts: Parts) -> Timing:
        """An op on rows; heads of 128 where it works on heads, and as many as fit the width."""
        op, width, tokens = str(parts["op"]), int(parts["width"]), int(parts["tokens"])
        sizes = {"tokens": tokens, "width": width}
        if op in {"kv_write", "rope"}:
            sizes = {"tokens": tokens, "heads": width // 128, "head_dim": 128}
        return self.timed(self.problem(op, sizes))

    def attention(self, parts: Parts) -> Timing:
        """A chunk behind a prefix, or decodes."""
        sizes = {name: int(parts[name]) for name in ("heads", "kv_heads", "head_dim")}
        if "batch" in parts:
            sizes |= {"batch": int(parts["batch"]), "keys": int(parts["keys"])}
        else:
            tokens = int(parts["tokens"])
            sizes |= {"tokens": tokens, "keys": int(parts["prefix"]) + tokens}
        sizes["page_tokens"] = PAGE_TOKENS
        return self.timed(self.problem("paged_attention", sizes))

    def sampling(self, parts: Parts) -> Timing:
        """Greedy tokens, as runtime/sampling.py finds them: best logit, and its first place."""
        rows, vocab = int(parts["rows"]), int(parts["vocab"])
        count = self._where.copies(2 * rows * vocab)
        logits = [self._where.normal(rows, vocab) for _ in range(count)]

        def draw(logits_RV: torch.Tensor) -> object:
            wide = logits_RV.float()
            return wide.max(dim=-1), wide.argmax(dim=-1)

        return self._clock([[lambda each=each: draw(each) for each in logits]])[0]  # type: ignore[misc]

    def copied(self, parts: Parts) -> Timing:
        """Bytes read once and written once, by a kernel."""
        size = int(parts["bytes"])
        count = self._where.copies(2 * size)
        pairs = [[self._where.normal(size // 2) for _ in range(2)] for _ in range(count)]
        return self._clock([[lambda a=a, b=b: torch.neg(a, out=b) for a, b in pairs]])[0]  # type: ignore[misc]

    def step(self, parts: Parts) -> Timing:
        """A part of the host's time in a step."""
        what = str(parts["what"])
        if what.startswith("eager "):
            op = what.removeprefix("eager ")
            call = self.problem(op, LAYER[op]).calls[0]
            us = [host_us(call) for _ in range(3)]
            return summary(us)
        methods = {
            "chunk_list": self._chunk_list,
            "decode_list": self._decode_list,
            "graph_launch": self._graph_launch,
            "host_step": self._host_step,
        }
        if what not in methods:
            raise UsageError(f"no part of a step is called {what!r}")
        return methods[what]()

    def _graph_launch(self) -> Timing:
        """The host's time to start a recorded piece."""
        held = torch.zeros(16, device=self._where.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held.add_(1)
        return summary([host_us(graph.replay) for _ in range(3)])

    def _chunk_list(self) -> Timing:
        """What a chunk's first attention takes the host longer than the others: its work list."""
        problem = self.problem("paged_attention", CHUNK)
        inputs: SimpleNamespace = problem.arguments[4]
        call = problem.calls[0]

        def listed() -> object:
            inputs.memo.clear()
            return call()

        plain, with_list = (
            summary([host_us(each, calls=5) for _ in range(3)]) for each in (call, listed)
        )
        return Timing(us=max(with_list.us - plain.us, 0.01), spread_us=with_list.spread_us)

    def _host_step(self) -> Timing:
        """Inputs sent, a graph started, a token drawn and read back, with next to nothing between.

        What a step takes of the host besides deciding what is in it; 16 rows.
        """
        device, rows = self._where.device, 16
        held = {"x": torch.zeros(rows, dtype=torch.int64, device=device)}
        logits = self._where.normal(rows, VOCAB)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held["y"] = held["x"] + 1

        def step() -> list[int]:
            for _ in range(6):  # tokens, positions, slots, starts, lengths, pages
                host = torch.tensor(range(rows), dtype=torch.int64)
                held["x"].copy_(host.to(device, non_blocking=True))
            graph.replay()
            wide = logits.float()
            best, token = wide.max(dim=-1).values, wide.argmax(dim=-1)
            best.isfinite().tolist()
            return list(token.tolist())

        return _walls(step)

    def _decode_list(self) -> Timing:
        """What a recorded step's first attention takes longer than the others: its work list."""
        problem = self.problem("paged_attention", DECODES)
        inputs: SimpleNamespace = problem.arguments[4]
        call = problem.calls[0]

        def listed() -> object:
            inputs.memo.clear()
            return call()

        kept = dict(inputs.memo)
        one = [call]
        plain = self._clock([one])[0]
        with_list = self._clock([[listed]])[0]
        inputs.memo.update(kept)
        return Timing(us=max(with_list.us - plain.us, 0.01), spread_us=with_list.spread_us)


def _walls(step: Callable[[], Any], rounds: int = 51) -> Timing:
    for _ in range(5):
        step()
    us = []
    for _ in range(rounds):
        began = time.perf_counter()
        step()
        us.append(1e6 * (time.perf_counter() - began))
    return Timing(us=statistics.median(us), spread_us=summary(us).spread_us)


METHODS: dict[str, Callable[[Meter, Parts], Timing]] = {
    "attention_chunk": Meter.attention,
    "attention_decode": Meter.attention,
    "copy": Meter.copied,
    "gemm": Meter.product,
    "rows": Meter.row_wise,
    "sampling": Meter.sampling,
    "step": Meter.step,
}

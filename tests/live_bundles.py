"""Bundles for tests of live execution, and a scheduler that does as it is told.

The toy program keeps token ids where a model keeps keys, and its next token is a sum over all of
them, weighted by place: exact in fp32, and different as soon as one key is missing, stale, doubled
or misplaced. `toy_answer` is its reference, on plain lists.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from builders import make_plan, tiny_model

from plans.check_program import IMPORT, STAGE
from plans.codec import dump_file
from plans.plan import Kernel, Plan
from runtime.executor.base import Chunk, NewPages, Step
from runtime.executor.live import LiveExecutor

TOY_VOCAB = 97
TOY_PROGRAM = '''
"""Next token = sum of (place + 1) x (token + 1) over all tokens so far, modulo the vocabulary."""

import torch

from .toy_sums import chosen, weighted

PARAMETERS = ()
RECORDABLE = True
APART = ("weighted",)
SELECTS = "chosen"


def forward(weights, inputs, kv, comm):
    keys = kv.k_pages[0][..., 0, 0].view(-1)
    keep_T = inputs.slots_T >= 0
    # what is not kept writes what the first kept one does, or what is there
    row_T = torch.where(keep_T, torch.arange(len(keep_T)), keep_T.int().argmax())
    slot_T = inputs.slots_T[row_T].clamp_min(0)
    token_T = inputs.token_ids_T[row_T].to(keys.dtype)
    keys.index_put_((slot_T,), torch.where(keep_T.any(), token_T, keys[slot_T]))
    sums_T1 = weighted(inputs.token_ids_T[:, None], kv.k_pages[0], inputs)
    sums_R1 = chosen(sums_T1, inputs.sample_rows_R)
    return torch.zeros(len(sums_R1), 97).scatter(1, sums_R1 % 97, 1.0)
'''
TOY_SUMS = '''
"""A sibling of the stage, to be imported relatively."""

import torch


def weighted(tokens_T1, pages, inputs):
    """The sum behind each token, from the pages: its launches follow the lengths of a step."""
    keys, page_tokens = pages[..., 0, 0].view(-1), pages.shape[1]
    row_T = torch.arange(len(tokens_T1))
    sequence_T = torch.searchsorted(inputs.query_starts_B1[1:], row_T.int(), right=True)
    sequence_T = sequence_T.clamp_max(len(inputs.kv_lens_B) - 1)
    table_TP = inputs.page_table_BP[sequence_T].long()
    place_S = torch.arange(table_TP.shape[1] * page_tokens)
    seen_TS = keys[table_TP[:, place_S // page_tokens] * page_tokens + place_S % page_tokens].long()
    if not inputs.recorded:
        assert int(inputs.kv_lens_B.max()) <= table_TP.shape[1] * page_tokens
        assert bool((inputs.positions_T < inputs.kv_lens_B[sequence_T]).all())
    own_TS = place_S <= inputs.positions_T[:, None]
    return ((place_S + 1) * (seen_TS + 1) * own_TS).sum(1, keepdim=True)


def chosen(sums_T1, rows_R):
    return sums_T1[rows_R]
'''
TOY_FILES = {"program/stage_0.py": TOY_PROGRAM, "program/toy_sums.py": TOY_SUMS}


def toy_answer(prompt: Sequence[int], tokens: int) -> list[int]:
    """What the toy program answers."""
    known = list(prompt)
    for _ in range(tokens):
        total = sum((place + 1) * (token + 1) for place, token in enumerate(known))
        known.append(total % TOY_VOCAB)
    return known[len(prompt) :]


def toy_plan(**changes: Any) -> Plan:
    """A plan of one layer whose pages hold one number a token."""
    model = tiny_model(layers=1, hidden=8, heads=1, kv_heads=1, head_dim=8, vocab=TOY_VOCAB)
    plan = make_plan(model=model, rows=((64, 32), (256, 16)))
    return msgspec.structs.replace(plan, **changes)


def with_pages(plan: Plan, pages: int) -> Plan:
    """The plan with another page pool."""
    return msgspec.structs.replace(plan, kv=msgspec.structs.replace(plan.kv, pages_per_rank=pages))


def write_bundle(folder: Path, plan: Plan, files: Mapping[str, str]) -> Path:
    """Writes plan.yaml and the program, hashed as a bundle is, a row for each op that it calls."""
    digests = {}
    for name, text in sorted(files.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        digests[name] = hashlib.sha256(text.encode()).hexdigest()
    stages = [text for name, text in files.items() if STAGE.fullmatch(name)]
    ops = sorted({op for text in stages for op in IMPORT.findall(text)})
    rows = tuple(Kernel(op=op, target="torch", file=f"program/{op}.py") for op in ops)
    kernels = plan.kernels or rows
    plan = msgspec.structs.replace(plan, files=digests, kernels=kernels)
    dump_file(folder / "plan.yaml", plan)
    return folder


class HandScheduler:
    """Gives a live executor exactly the steps that a test asks for; allocates pages itself."""

    def __init__(self, plan: Plan, executor: LiveExecutor) -> None:
        """Hands out the last page first, so that tables are never in page order by luck."""
        self.plan = plan
        self.executor = executor
        self.free = list(range(plan.kv.pages_per_rank))
        self.computed: dict[int, int] = {}
        """Tokens whose KV exists, by request."""
        self.length: dict[int, int] = {}
        """Tokens of prompt and answer."""
        self.answers: dict[int, list[int]] = {}
        self._held: dict[int, list[int]] = {}
        self._steps = 0
        self._evicted: list[int] = []

    def add(self, number: int, prompt: Sequence[int], sampling: Any) -> None:
        """Makes a request known."""
        self.executor.add_request(number, prompt, sampling)
        self.computed[number], self.length[number] = 0, len(prompt)
        self.answers[number], self._held[number] = [], []

    def missing(self, number: int) -> int:
        """Tokens that a request's next token waits for."""
        return self.length[number] - self.computed[number]

    def evict(self, number: int) -> None:
        """Takes a request's pages, before the next step."""
        self.free += self._held[number]
        self._held[number] = []
        self.computed[number] = 0
        self._evicted.append(number)

    def step(self, tokens: Mapping[int, int], *, ended: Iterable[int] = ()) -> None:
        """One step: so many tokens of each request, as chunks, or a decode where one is missing."""
        pages = [new for number, count in tokens.items() for new in self._grow(number, count)]
        decodes = [each for each in tokens if self.missing(each) == 1 and self.answers[each]]
        chunks = tuple(
            Chunk(
                request=number,
                tokens=count,
                prefix=self.computed[number],
                home=0,
                samples=count == self.missing(number),
            )
            for number, count in tokens.items()
            if number not in decodes
        )
        step = Step(
            step_id=self._steps,
            decodes=np.array(decodes, dtype=np.int64),
            decode_prefix=np.array([self.computed[each] for each in decodes], dtype=np.int64),
            decode_home=np.zeros(len(decodes), dtype=np.int64),
            chunks=chunks,
            pages=tuple(pages),
            evicted=tuple(self._evicted),
            ended=tuple(ended),
        )
        assert self.executor.can_submit()
        self.executor.submit(step)
        [result] = self.executor.wait(until_s=None)
        assert result.step is step
        sampled = {*decodes, *(chunk.request for chunk in chunks if chunk.samples)}
        assert result.tokens.keys() == sampled
        for number, count in tokens.items():
            self.computed[number] += count
        for number, token in result.tokens.items():
            self.answers[number].append(token)
            self.length[number] += 1
        self._steps += 1
        self._evicted = []

    def _grow(self, number: int, count: int) -> list[NewPages]:
        """Pages that the request needs, by shard."""
        size, shard_tokens = self.plan.kv.page_tokens, self.plan.kv.tokens_per_kvp_shard
        found: dict[int, list[int]] = {}
        while len(self._held[number]) * size < self.computed[number] + count:
            shard = len(self._held[number]) * size // shard_tokens
            page = self.free.pop()
            self._held[number].append(page)
            found.setdefault(shard, []).append(page)
        return [
            NewPages(request=number, shard=shard, pages=tuple(pages))
            for shard, pages in found.items()
        ]

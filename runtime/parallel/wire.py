"""Messages between the driver, which holds the engine, and the workers, one a rank.

msgpack arrays without field names: both ends run the same release, which the hand-shake proves.

    worker: Hello       driver: Welcome, or Refusal and the end
    worker: Ready       weights are loaded, groups are joined
    driver: Start       worker: Started        empty tables, step ids from 0
    driver: StepMessage worker: StageDone      any number, several on their way
    driver: Open        worker: Hello ...      another bundle on the same ranks
    driver: Stop        at any time
    worker: Beat        twice a second, from a thread of its own
    worker: Failure     the last word of a worker
"""

from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from runtime.executor.base import Chunk, Ints, NewPages, Step
from runtime.parallel.table import Totals
from runtime.sampling_params import SamplingParams


class Hello(Struct, frozen=True, array_like=True, tag=1):
    """A worker presents itself; all but the first three must be the same on all ranks."""

    rank: int
    host: str
    pid: int
    ranks: int
    plan_hash: str
    """Covers the hash of every file of the program, which the worker has verified."""
    torch: str
    seed: int | None
    """Of random weights; None where they come from a folder."""


class Welcome(Struct, frozen=True, array_like=True, tag=2):
    """All ranks agree: load."""

    graphs: bool
    """Record decode steps where the program allows it."""


class Refusal(Struct, frozen=True, array_like=True, tag=3):
    """They do not: end."""

    text: str


class Ready(Struct, frozen=True, array_like=True, tag=4):
    """A rank can run steps."""

    rank: int
    graphs: int
    """Sizes of decode steps that it has recorded."""
    problem: str
    """Why none are recorded, where a rank has failed in that."""


class Start(Struct, frozen=True, array_like=True, tag=5):
    """Forget all requests; the next step is step 0 of this run."""

    run: int
    """Counts up; words of a run before are late and mean nothing."""
    graphs: bool
    """Run decode steps by graph where they are recorded."""


class Started(Struct, frozen=True, array_like=True, tag=6):
    """A rank has forgotten."""

    rank: int
    run: int


class Open(Struct, frozen=True, array_like=True, tag=7):
    """Change to another bundle of the same mesh, beginning with a new Hello."""

    bundle: str
    weights: str
    seed: int


class Stop(Struct, frozen=True, array_like=True, tag=8):
    """End; nothing is in flight, or all of it is given up."""

    failed: bool


class Added(Struct, frozen=True, array_like=True):
    """A request that steps may hold from now on."""

    number: int
    prompt: bytes
    """Token ids, int32 little-endian."""
    sampling: SamplingParams


class StepMessage(Struct, frozen=True, array_like=True, tag=9):
    """A step, and what happened to the requests since the step before."""

    step_id: int
    added: tuple[Added, ...]
    sampled: tuple[tuple[int, int], ...]
    """(request, token) in the order in which the engine collected them."""
    decodes: bytes
    """Rows request, prefix, home: int64 little-endian [3, B]."""
    chunks: tuple[tuple[int, int, int, int, bool], ...]
    """request, tokens, prefix, home, samples."""
    pages: tuple[tuple[int, int, tuple[int, ...]], ...]
    """request, shard, page numbers."""
    evicted: tuple[int, ...]
    ended: tuple[int, ...]
    totals: Totals
    """Of the driver's table with all this applied; a rank whose own differ has missed something."""


class StageDone(Struct, frozen=True, array_like=True, tag=10):
    """A group's rows of a step have left a stage; told by its first tp rank."""

    rank: int
    run: int
    step_id: int
    waited_s: float
    """Between the end of this rank's step before and the arrival of this step's input: a bubble."""
    seconds: float
    """From then to the end of the stage."""
    merge_s: float
    """Of these, in the exchange of the kvp groups."""
    tokens: dict[int, int]
    """Sampled by this group, on the last stage."""


class Beat(Struct, frozen=True, array_like=True, tag=11):
    """A worker's process is alive; whether it gets on is seen from `moves`."""

    rank: int
    step_id: int
    moves: int
    """Phases entered so far."""
    phase: str


class Failure(Struct, frozen=True, array_like=True, tag=12):
    """A worker ends because of an error."""

    rank: int
    step_id: int
    text: str


FromWorker = Hello | Ready | Started | StageDone | Beat | Failure
FromDriver = Welcome | Refusal | Start | Open | Stop | StepMessage

encode = msgspec.msgpack.Encoder().encode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
decode_from_driver = msgspec.msgpack.Decoder(FromDriver).decode


def added(number: int, prompt: Any, sampling: SamplingParams) -> Added:
    """A request on the wire."""
    return Added(number, np.asarray(prompt, dtype="<i4").tobytes(), sampling)


def prompt_of(message: Added) -> list[int]:
    """Its token ids."""
    tokens: list[int] = np.frombuffer(message.prompt, dtype="<i4").tolist()
    return tokens


def to_message(
    step: Step, new: tuple[Added, ...], sampled: tuple[tuple[int, int], ...], totals: Totals
) -> StepMessage:
    """A step on the wire."""
    rows = np.stack([step.decodes, step.decode_prefix, step.decode_home]).astype("<i8")
    return StepMessage(
        step_id=step.step_id,
        added=new,
        sampled=sampled,
        decodes=rows.tobytes(),
        chunks=tuple(
            (each.request, each.tokens, each.prefix, each.home, each.samples)
            for each in step.chunks
        ),
        pages=tuple((each.request, each.shard, each.pages) for each in step.pages),
        evicted=step.evicted,
        ended=step.ended,
        totals=totals,
    )


def to_step(message: StepMessage) -> Step:
    """The step of a message."""
    rows: Ints = np.frombuffer(message.decodes, dtype="<i8").reshape(3, -1)
    return Step(
        step_id=message.step_id,
        decodes=rows[0],
        decode_prefix=rows[1],
        decode_home=rows[2],
        chunks=tuple(
            Chunk(request=request, tokens=tokens, prefix=prefix, home=home, samples=samples)
            for request, tokens, prefix, home, samples in message.chunks
        ),
        pages=tuple(
            NewPages(request=request, shard=shard, pages=pages)
            for request, shard, pages in message.pages
        ),
        evicted=message.evicted,
        ended=message.ended,
    )

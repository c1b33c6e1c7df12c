"""Offline generation: request files in, an engine run over a live executor, results out.

A request file has one JSON object a line; `RequestLine` is its whole vocabulary. Everything that
can be wrong with a line is found before weights are loaded, and named by file, line and field.
"""

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct

from plans.errors import InvalidFile, MedhaError, UsageError
from plans.fields import explain, path_text
from plans.model import Count
from plans.plan import Plan
from runtime.clock import Clock
from runtime.executor.base import StepResult
from runtime.metrics import Spread, spread
from runtime.outputs import written_whole
from runtime.parallel.replicas import Replica, TokenExecutor, serve_all
from runtime.request import Record, Request
from runtime.sampling_params import SEED_MAX, SamplingParams
from runtime.scheduler import Scheduling
from runtime.tokenizer import TextStream, Tokenizer

TokenId = Annotated[int, Meta(ge=0)]
ARRIVAL_MAX_S = 31_536_000
"""A year: no run waits longer, and clocks can sleep that long."""


class RequestLine(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of a request file: one of prompt, token_ids and messages, and how to answer."""

    id: str | int | None = None
    """Comes back with the result; the line number where it is left out."""
    prompt: str | None = None
    token_ids: list[TokenId] | None = None
    messages: list[dict[str, Any]] | None = None
    """A conversation, written out by the model's chat template."""
    max_tokens: Count = 16
    """Most tokens that are generated."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: Annotated[int, Meta(ge=0, le=SEED_MAX)] | None = None
    """The line's number where it is left out, so that equal lines differ and a run repeats."""
    stop: list[Annotated[str, Meta(min_length=1)]] = []
    """Texts that end the answer; they are not part of it."""
    stop_token_ids: list[TokenId] = []
    """Tokens that end the answer, besides the model's own end tokens."""
    ignore_eos: bool = False
    """Goes on over the model's own end tokens."""
    arrival_s: Annotated[float, Meta(ge=0, le=ARRIVAL_MAX_S)] = 0.0
    """Seconds after the start at which the request arrives."""


class Job(Struct, frozen=True, kw_only=True):
    """A request that passed every check."""

    id: str | int
    prompt: tuple[int, ...]
    request: Request
    sampling: SamplingParams
    stop: tuple[str, ...]
    end_tokens: frozenset[int]


class Result(Struct, frozen=True, kw_only=True):
    """One line of a result file."""

    id: str | int
    text: str | None
    """None without a tokenizer."""
    token_ids: tuple[int, ...]
    """All generated tokens, an end token included."""
    finish_reason: str
    """`stop` (an end token or stop string), `length`, or `failed` where the run broke off: then the
    tokens are those that had come by then."""
    prompt_tokens: int
    ttft_s: float | None
    """None where no token came."""
    tbt_s: Spread
    """Seconds between tokens; all null where the answer has one token."""
    evictions: int


def read_jobs(
    path: str | Path,
    plan: Plan,
    tokenizer: Tokenizer | None,
    *,
    end_tokens: frozenset[int] = frozenset(),
) -> list[Job]:
    """Jobs of a request file, in order; raises InvalidFile with the line of the first misfit.

    end_tokens  of the model: they end an answer unless its line says ignore_eos
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidFile(str(path), "", f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidFile(str(path), "", f"is not UTF-8 text (byte {error.start})") from None
    jobs: list[Job] = []
    lines: dict[str | int, int] = {}
    # not splitlines: JSON may hold other line ends inside a string
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        parsed = _parsed(line, where)
        job = _job(
            parsed,
            plan,
            tokenizer,
            end_tokens=frozenset() if parsed.ignore_eos else end_tokens,
            number=len(jobs),
            line_number=number,
            where=where,
        )

        if job.id in lines:
            raise InvalidFile(where, "id", f"{job.id!r} is the id of line {lines[job.id]} too")
        lines[job.id] = number
        jobs.append(job)
    if not jobs:
        raise InvalidFile(str(path), "", "holds no request; each line is one JSON object")
    return jobs


def _parsed(line: str, where: str) -> RequestLine:
    try:
        data = json.loads(line, object_pairs_hook=_without_repeats, parse_constant=_no_number)
        if "\\u" in line:  # half of a surrogate pair is no text: it can be neither read nor written
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidFile(where, "", f"is no JSON: {error}") from None
    try:
        return msgspec.convert(data, RequestLine)
    except msgspec.ValidationError as error:
        problem = explain(str(error), data, RequestLine)
        raise InvalidFile(where, path_text(problem.path), problem.text) from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(each for each in names if names.count(each) > 1)!r} stands twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _job(
    line: RequestLine,
    plan: Plan,
    tokenizer: Tokenizer | None,
    *,
    end_tokens: frozenset[int],
    number: int,
    line_number: int,
    where: str,
) -> Job:
    prompt = _prompt(line, plan.model.vocab, tokenizer, where)
    limit = plan.limits.context_tokens
    if len(prompt) + line.max_tokens > limit:
        raise InvalidFile(
            where,
            "max_tokens",
            f"{len(prompt)} prompt tokens and up to {line.max_tokens} new ones exceed the plan's "
            f"context limit of {limit} tokens; nearest: max_tokens {max(limit - len(prompt), 0)}",
        )
    if line.stop and tokenizer is None:
        raise InvalidFile(where, "stop", "needs a tokenizer; stop_token_ids works without one")
    try:
        sampling = SamplingParams(
            temperature=line.temperature,
            top_k=line.top_k,
            top_p=line.top_p,
            min_p=line.min_p,
            seed=line_number if line.seed is None else line.seed,
        )
    except UsageError as error:
        raise InvalidFile(where, "", str(error)) from None
    return Job(
        id=line_number if line.id is None else line.id,
        prompt=tuple(prompt),
        request=Request(
            number=number,
            arrival_s=line.arrival_s,
            prompt_tokens=len(prompt),
            max_tokens=line.max_tokens,
        ),
        sampling=sampling,
        stop=tuple(line.stop),
        end_tokens=end_tokens | frozenset(line.stop_token_ids),
    )


def _prompt(line: RequestLine, vocab: int, tokenizer: Tokenizer | None, where: str) -> list[int]:
    given = [
        name for name in ("prompt", "token_ids", "messages") if getattr(line, name) is not None
    ]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise InvalidFile(
            where, "", f"exactly one of prompt, token_ids and messages is needed, found {found}"
        )
    tokens = line.token_ids if getattr(line, given[0]) else []
    if tokens is None:
        if tokenizer is None:
            raise InvalidFile(where, given[0], "needs a tokenizer; token_ids works without one")
        try:
            tokens = (
                tokenizer.encode_chat(line.messages)
                if line.messages is not None
                else tokenizer.encode(line.prompt or "")
            )
        except UsageError as error:
            raise InvalidFile(where, given[0], str(error)) from None
    if not tokens:
        raise InvalidFile(where, given[0], "is empty; a prompt has at least one token")
    if max(tokens) >= vocab:
        raise InvalidFile(
            where, given[0], f"token {max(tokens)} is not below the model's vocabulary of {vocab}"
        )
    return tokens


@dataclass(kw_only=True)
class Progress:
    """How far a run is; read it, the run changes it."""

    requests: int
    prompt_tokens: int
    """Of all requests."""
    prefilled_tokens: int = 0
    """Prompt tokens computed, each counted once, whatever was recomputed."""
    generated_tokens: int = 0
    finished: int = 0
    started: int = 0
    """Requests that have a first token."""


@dataclass(slots=True)
class _Answer:
    """What has been generated for one job."""

    job: Job
    stream: TextStream | None
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    prefilled: int = 0

    def take(self, token: int, now_s: float) -> str | None:
        """Adds a token; the reason to stop, if it is one."""
        self.tokens.append(token)
        self.times_s.append(now_s)
        if token in self.job.end_tokens:
            return "stop"
        if self.stream is not None:
            self.pieces.append(self.stream.push(token))
            if self.stream.stopped:
                return "stop"
        return None

    def result(self, record: Record | None) -> Result:
        """The answer as it ended; a request without a record had not arrived when the run broke."""
        if self.stream is not None:
            self.pieces.append(self.stream.finish())
        return Result(
            id=self.job.id,
            text=None if self.stream is None else "".join(self.pieces),
            token_ids=tuple(self.tokens),
            finish_reason="failed" if record is None else record.reason,
            prompt_tokens=len(self.job.prompt),
            ttft_s=record.ttft_s if record is not None and self.times_s else None,
            tbt_s=spread(np.diff(np.array(self.times_s))),
            evictions=0 if record is None else record.evictions,
        )


class OfflineRun:
    """The answers to a file of jobs, as one engine or several of them come to them."""

    def __init__(
        self,
        jobs: Sequence[Job],
        tokenizer: Tokenizer | None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """Starts with nothing generated; on_progress is called after each step."""
        self.progress = Progress(
            requests=len(jobs), prompt_tokens=sum(len(job.prompt) for job in jobs)
        )
        self.records: list[Record] = []
        self.error: MedhaError | None = None
        """Why the run broke off, if it did; every request has a result all the same."""
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._answers = {
            job.request.number: _Answer(
                job,
                None
                if tokenizer is None
                else TextStream(tokenizer, prompt=job.prompt, stop=job.stop),
            )
            for job in jobs
        }

    def run(
        self,
        plan: Plan,
        executors: Sequence[TokenExecutor],
        clock: Clock,
        scheduling: Scheduling,
    ) -> list[Result]:
        """Serves all jobs to their ends; results in the order of the jobs.

        executors  one a replica; each has its own engine, and several run in threads

        Where an executor fails, what it had to do ends as `failed`, and `error` says why.
        """
        replicas = [Replica(plan, executor, clock, scheduling, sink=self) for executor in executors]
        started_s = clock.now_s()  # loading was before; no request waited for it
        free_s = [0.0 for _ in replicas]
        for answer in sorted(self._answers.values(), key=lambda each: each.job.request.arrival_s):
            request = answer.job.request
            ready_s = [max(each, request.arrival_s) for each in free_s]
            chosen = ready_s.index(min(ready_s))  # the least predicted seconds of prefill ahead
            free_s[chosen] = ready_s[chosen] + replicas[chosen].work_s(request.prompt_tokens)
            at_s = started_s + request.arrival_s
            replicas[chosen].add(
                msgspec.structs.replace(request, arrival_s=at_s),
                answer.job.prompt,
                answer.job.sampling,
            )
        self.error = serve_all(replicas)
        self.records = sorted(
            (record for replica in replicas for record in replica.engine.records),
            key=lambda record: record.request.number,
        )
        records = {record.request.number: record for record in self.records}
        return [answer.result(records.get(number)) for number, answer in self._answers.items()]

    def take(self, number: int, token: int, now_s: float) -> str | None:
        """A request's next token; the reason to stop, if it is one."""
        with self._lock:
            self.progress.generated_tokens += 1
            answer = self._answers[number]
            self.progress.started += not answer.tokens
            return answer.take(token, now_s)

    def collected(self, result: StepResult) -> None:
        """Counts the prompt tokens of a step."""
        with self._lock:
            for chunk in result.step.chunks:
                answer = self._answers[chunk.request]
                reached = min(chunk.prefix + chunk.tokens, len(answer.job.prompt))
                self.progress.prefilled_tokens += max(reached - answer.prefilled, 0)
                answer.prefilled = max(answer.prefilled, reached)
            if self._on_progress is not None:
                self._on_progress(self.progress)

    def ended(self) -> None:
        """Counts a request."""
        with self._lock:
            self.progress.finished += 1


def write_results(path: str | Path, results: Iterable[Result]) -> None:
    """Writes one JSON object a line; a reader sees all of them or none."""
    with written_whole(Path(path)) as partial, partial.open("wb") as file:
        for result in results:
            file.write(result_line(result))


def result_line(result: Result) -> bytes:
    """One line of a result file."""
    return msgspec.json.encode(result) + b"\n"

"""One rank of a run: joins the driver, proves what it holds, loads, and runs steps until the end.

A step is prepared when it arrives (table, tensors, on a CPU its receive) and run in its turn, so
what the next step needs is under way while this one runs. Whatever fails is said to the driver,
then the process ends: no rank goes on with a state that others do not share.
"""

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
from msgspec import Struct
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from plans.codec import content_hash
from plans.errors import BundleMismatch, MedhaError
from plans.mesh import coordinates
from plans.plan import Plan
from runtime.garbage import release, settle
from runtime.parallel import wire
from runtime.parallel.groups import Groups, RankComm, join_groups
from runtime.parallel.inbox import Inbox, start_beats
from runtime.parallel.inputs import PackedInputs
from runtime.parallel.kvp import Exchange
from runtime.parallel.progress import COMPUTES, WAITS, Progress
from runtime.parallel.rank import NOTHING_DRAWN, Drawn, Rank
from runtime.parallel.spp import Arrival, HandOver
from runtime.parallel.stage_graphs import (
    Agreement,
    DecodeNumbers,
    RecorderOf,
    StageGraphs,
    recorder_of,
)
from runtime.parallel.stopwatch import Mark, Stopwatch
from runtime.parallel.table import RequestTable, Row
from runtime.program import Bundle, load_bundle
from runtime.weights import load_weights, random_weights, sources

RANDOM = "random"
CONTROL_KEY = "control"
"""Key of the store under which the driver says where it listens."""
AHEAD = 2
"""Steps prepared before they run: the next one, and one that may arrive meanwhile."""
NO_REGISTRATION = ("NCCL_GRAPH_REGISTER", "0")
"""Registering the buffers of recorded collectives asks other ranks while one records, and decode
steps are too small to gain by it."""
PENDING_POLL_S = 1e-5
"""Between two looks whether its device has finished; the system makes 60 us or more of it."""


class Setup(Struct, frozen=True, kw_only=True):
    """What a worker process is started with."""

    bundle: str
    weights: str
    """Folder of a checkpoint, or `random`."""
    seed: int
    replica: int
    rank: int
    """In its replica."""
    ranks: int
    """Of all replicas."""
    store_host: str
    store_port: int
    store_prefix: str
    """Differs between attempts that share a store."""
    threads: int
    """Of torch on this rank."""


@dataclass(kw_only=True)
class _Prepared:
    """A step that waits for its turn."""

    step_id: int
    rows: list[Row]
    """Of this group; it may have none."""
    inputs: PackedInputs | None = None
    """None where it goes by graph."""
    numbers: DecodeNumbers | None = None
    """The same for a graph."""
    exchange: Exchange | None = None
    arrival: Arrival | None = None
    """Where it is posted ahead."""


@dataclass(frozen=True)
class _Times:
    """Marks of a step, and the host seconds of its merges."""

    before: Mark
    """End of the step before."""
    started: Mark
    ended: Mark
    merge_s: float


def run_worker(setup: Setup, records: RecorderOf = recorder_of) -> int:
    """Serves until the driver says stop; the exit status."""
    torch.set_num_threads(setup.threads)
    progress = Progress()
    store = _store(setup)
    address = store.get(CONTROL_KEY).decode()
    inbox = Inbox(address, setup.rank)
    start_beats(inbox, address, setup.rank, progress, os.getppid())
    worker = Worker(setup, store, inbox, progress, records)
    try:
        return worker.serve()
    except MedhaError as error:
        text = str(error)
    except Exception as error:  # noqa: BLE001 - the driver must hear of a bug, too
        text = f"{type(error).__name__}: {error}"
    inbox.send(wire.Failure(setup.rank, progress.step_id, text))
    inbox.close()
    return 1


def _store(setup: Setup) -> Store:
    store = TCPStore(
        setup.store_host,
        setup.store_port,
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(minutes=5),
    )
    return PrefixStore(setup.store_prefix, store)


class Worker:
    """The states of one rank, in the order of wire.py."""

    def __init__(
        self, setup: Setup, store: Store, inbox: Inbox, progress: Progress, records: RecorderOf
    ) -> None:
        """Holds nothing yet."""
        self._setup = setup
        self._store = store
        self._inbox = inbox
        self._progress = progress
        self._records = records
        self._groups: Groups | None = None
        self._opened = 0
        """Bundles so far."""

    def serve(self) -> int:
        """Opens bundles and runs steps until the end; the exit status."""
        opened: wire.Open | None = wire.Open(
            self._setup.bundle, self._setup.weights, self._setup.seed
        )
        while opened is not None:
            bundle = load_bundle(opened.bundle)
            welcome = self._agree(bundle, opened)
            if welcome is None:
                return 1
            stage = self._load(bundle, opened, graphs=welcome.graphs)
            settle()
            self._progress.loading = False
            self._inbox.send(wire.Ready(self._setup.rank, *stage.graphs()))
            last = stage.run()
            if isinstance(last, wire.Stop):
                return int(last.failed)
            opened = last
            del stage  # its weights and pages are not to stand beside the next ones
            release()
        return 0

    def _agree(self, bundle: Bundle, opened: wire.Open) -> wire.Welcome | None:
        """The hand-shake; nothing large is loaded before it. None where the driver refuses."""
        self._progress.loading = True
        hello = wire.Hello(
            rank=self._setup.rank,
            host=os.uname().nodename,
            pid=os.getpid(),
            ranks=self._setup.ranks,
            plan_hash=content_hash(bundle.plan),
            torch=str(torch.__version__),
            seed=opened.seed if opened.weights == RANDOM else None,
        )
        self._inbox.send(hello)
        answer = self._inbox.receive(timeout_s=None)
        return answer if isinstance(answer, wire.Welcome) else None

    def _load(self, bundle: Bundle, opened: wire.Open, *, graphs: bool) -> "_Stage":
        plan, rank = bundle.plan, self._setup.rank
        place, tp = coordinates(plan.parallelism, rank), plan.parallelism.tp
        first = self._setup.replica * plan.parallelism.ranks_per_replica
        device = rank_device(plan, first + rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            os.environ.setdefault(*NO_REGISTRATION)
        if self._groups is None:
            self._groups = join_groups(plan.parallelism, rank, self._store, device)
        stages = [bundle.load_stage(stage) for stage in range(plan.parallelism.spp)]
        program = stages[place.stage]
        if opened.weights == RANDOM:
            weights = random_weights(
                program.parameters, seed=opened.seed, tp=tp, tp_rank=place.tp, device=device
            )
        else:
            weights = load_weights(
                opened.weights,
                program.parameters,
                tp=tp,
                tp_rank=place.tp,
                device=device,
                whole={name for stage in stages for name in sources(stage.parameters)},
            )
        comm = RankComm(self._groups, self._progress)
        runner = Rank(plan, place, program=program, weights=weights, comm=comm, device=device)
        graphs = graphs and all(stage.recordable for stage in stages)  # as all ranks decide
        recorder = self._records(device) if graphs else None
        self._opened += 1
        said = PrefixStore(f"graphs of bundle {self._opened}", self._store)
        return _Stage(
            runner,
            comm,
            self._groups,
            inbox=self._inbox,
            progress=self._progress,
            number=rank,
            graphs=None if recorder is None else StageGraphs(runner, comm, recorder),
            agreement=Agreement(said, rank, plan.parallelism.ranks_per_replica),
        )


def rank_device(plan: Plan, rank: int) -> torch.device:
    """The device in its node of a rank, counted over all replicas; BundleMismatch for none."""
    if plan.topology.device.startswith("cpu"):
        return torch.device("cpu")
    index = plan.placement.rank_map[rank][1]
    if index >= torch.cuda.device_count():
        raise BundleMismatch(
            f"rank {rank} of the plan runs on device {index} of its node, and this one has "
            f"{torch.cuda.device_count()} CUDA devices; nearest: plan for the devices that are here"
        )
    return torch.device("cuda", index)


class _Stage:
    """Runs the steps of one bundle."""

    def __init__(
        self,
        rank: Rank,
        comm: RankComm,
        groups: Groups,
        *,
        inbox: Inbox,
        progress: Progress,
        number: int,
        graphs: StageGraphs | None,
        agreement: Agreement,
    ) -> None:
        """Warms up and records graphs: all ranks do so at the same time."""
        self._rank = rank
        self._comm = comm
        self._groups = groups
        self._inbox = inbox
        self._progress = progress
        self._number = number
        self._graphs = graphs
        self._run_number = 0
        self._hand_over = HandOver(rank.plan, groups, rank.device)
        self._queue: deque[_Prepared] = deque()
        self._watch = Stopwatch(rank.device)
        self._ended = self._watch.mark()
        self._pending: deque[tuple[int, _Times, Drawn]] = deque()
        """Step, times and tokens of what the device may still be at."""
        self._warm_up()
        if graphs is not None:
            with torch.inference_mode():
                graphs.record(agreement)

    def graphs(self) -> tuple[int, str]:
        """Sizes of decode steps that are recorded, and why none are where that failed."""
        return (0, "") if self._graphs is None else (self._graphs.count(), self._graphs.problem)

    def run(self) -> wire.Stop | wire.Open:
        """Runs steps until the driver wants something else."""
        while True:
            if not self._queue:
                self._progress.rest()
            while len(self._queue) < AHEAD:
                message = self._message()
                if message is None:
                    break
                if isinstance(message, wire.StepMessage):
                    self._queue.append(self._prepared(message))
                elif isinstance(message, wire.Stop) and message.failed:
                    return message
                else:
                    self._finish()
                    if isinstance(message, wire.Stop | wire.Open):
                        return message
                    if isinstance(message, wire.Start):
                        self._start(message)
            self._report()
            if self._queue:
                self._run(self._queue.popleft())

    def _finish(self) -> None:
        """Runs what is left: the driver has its tokens and did not wait for every rank."""
        while self._queue:
            self._run(self._queue.popleft())
        self._hand_over.drain()
        self._rank.synchronise()
        self._report(all_of_them=True)

    def _message(self) -> wire.FromDriver | None:
        """The next message; None where there is something else to do first."""
        while not self._queue and self._pending:
            message = self._inbox.receive(timeout_s=0.0)
            if message is not None:
                return message
            if self._watch.reached(self._pending[0][1].ended):
                return None
            time.sleep(PENDING_POLL_S)  # a wait for messages could not be as short
        return self._inbox.receive(timeout_s=0.0 if self._queue else None)

    def _start(self, message: wire.Start) -> None:
        self._run_number = message.run
        self._rank.table = RequestTable()
        if self._graphs is not None:
            self._graphs.used = message.graphs
        self._inbox.restart()
        self._inbox.send(wire.Started(self._number, message.run))

    def _warm_up(self) -> None:
        """Every rank runs a chunk and a decode for nobody, stage by stage."""
        for rows in self._rank.warm_up_rows():
            self._run(self._ready(-1, rows), warm_up=True)
        self._hand_over.drain()
        self._rank.synchronise()

    def _prepared(self, message: wire.StepMessage) -> _Prepared:
        """Applies a step to the table and makes all that can be made before its input is there."""
        table = self._rank.table
        step = wire.to_step(message)
        for each in message.added:
            table.add(each.number, wire.prompt_of(each), each.sampling)
        table.append(message.sampled)
        table.apply(step)
        if table.totals() != message.totals:
            raise MedhaError(
                f"rank {self._number} holds {table.totals()} at step {step.step_id}, the driver "
                f"{message.totals}: the states of the ranks differ; this is a defect of the runtime"
            )
        return self._ready(step.step_id, self._rank.rows(table.rows(step)))

    def _ready(self, step_id: int, rows: list[Row]) -> _Prepared:
        if not rows:
            return _Prepared(step_id=step_id, rows=rows)
        rank, graphs = self._rank, self._graphs
        by_graph = graphs is not None and graphs.takes(rows)
        arrival = self._expected(rows) if self._hand_over.is_posted_ahead else None
        return _Prepared(
            step_id=step_id,
            rows=rows,
            inputs=None if by_graph else rank.inputs(rows),
            numbers=graphs.numbers(rows) if graphs is not None and by_graph else None,
            exchange=rank.exchange(rows, self._groups.kvp_ranks),
            arrival=arrival,
        )

    def _expected(self, rows: Sequence[Row]) -> Arrival | None:
        return self._hand_over.expect(sum(row.tokens for row in rows))

    def _run(self, step: _Prepared, *, warm_up: bool = False) -> None:
        if not step.rows:
            return
        rank = self._rank
        self._progress.step_id = step.step_id
        what = f"step {step.step_id} on rank {self._number}"
        with torch.inference_mode(), rank.explained(what):
            hidden_TD = None
            arrival = step.arrival or self._expected(step.rows)
            if arrival is not None:
                self._progress.enter(f"{WAITS} for stage {rank.place.stage - 1}")
                hidden_TD = arrival.wait()
            self._progress.enter(COMPUTES)
            started = self._watch.mark()
            self._comm.exchange, self._comm.merge_s = step.exchange, 0.0
            out, drawn = self._launched(step, hidden_TD)
            if out is not None:
                self._hand_over.send(out)
        ended = self._watch.mark()
        if not warm_up:
            times = _Times(self._ended, started, ended, self._comm.merge_s)
            self._pending.append((step.step_id, times, drawn))
            self._progress.unfinished = self._pending[0][0]
            self._report()
        self._ended = ended

    def _launched(self, step: _Prepared, hidden_TD: Tensor | None) -> tuple[Tensor | None, Drawn]:
        """What goes to the next stage, or the tokens on the rank that draws."""
        rank, graphs = self._rank, self._graphs
        draws = rank.is_last and rank.place.tp == 0
        if graphs is not None and step.numbers is not None:
            out = graphs.run(step.numbers, hidden_TD)
            drawn = graphs.drawn(step.rows) if draws else NOTHING_DRAWN
        else:
            assert step.inputs is not None, "a step is prepared for one of both"
            step.inputs.hidden_TD = hidden_TD
            out = rank.forward(step.inputs)
            drawn = rank.draw(out, step.rows, None) if draws else NOTHING_DRAWN
        return None if rank.is_last else out, drawn

    def _report(self, *, all_of_them: bool = False) -> None:
        """Tells of the steps that the device has finished; only the first tp rank has a say."""
        while self._pending and (all_of_them or self._watch.reached(self._pending[0][1].ended)):
            step_id, times, drawn = self._pending[0]
            waited_s = self._watch.seconds(times.before, times.started)
            seconds = self._watch.seconds(times.started, times.ended)
            self._pending.popleft()
            self._progress.finished(self._pending[0][0] if self._pending else None)
            with self._rank.explained(f"step {step_id} on rank {self._number}"):
                tokens = drawn.tokens()
            if self._rank.place.tp > 0:
                continue
            self._inbox.send(
                wire.StageDone(
                    rank=self._number,
                    run=self._run_number,
                    step_id=step_id,
                    waited_s=waited_s,
                    seconds=seconds,
                    merge_s=times.merge_s,
                    tokens=tokens,
                )
            )


def worker_main(setup: Setup, records: RecorderOf = recorder_of) -> NoReturn:
    """Does in this process what a worker does, and ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's; it ends its workers
    status = run_worker(setup, records)
    sys.stdout.flush()
    sys.stderr.flush()
    # not sys.exit: communicators of ranks that are gone may block in their destructors
    os._exit(status)

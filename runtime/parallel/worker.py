"""One rank of a run: joins the driver, proves what it holds, loads, and runs steps until the end.

A step is prepared when it arrives (table, tensors, posted receive) and run in its turn, so what the
next step needs is under way while this one runs. Whatever fails is said to the driver, then the
process ends: no rank goes on with a state that others do not share.
"""

import os
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
from msgspec import Struct
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from plans.codec import content_hash
from plans.errors import BundleMismatch, MedhaError
from plans.mesh import coordinates
from plans.plan import Plan
from runtime.parallel import wire
from runtime.parallel.groups import Groups, RankComm, join_groups
from runtime.parallel.inbox import Inbox, start_beats
from runtime.parallel.inputs import PackedInputs
from runtime.parallel.kvp import Exchange, exchange_of
from runtime.parallel.progress import COMPUTES, WAITS, Progress
from runtime.parallel.rank import NOTHING_DRAWN, Drawn, Rank
from runtime.parallel.spp import Arrival, HandOver
from runtime.parallel.stopwatch import Mark, Stopwatch
from runtime.parallel.table import RequestTable, Row
from runtime.program import Bundle, load_bundle
from runtime.weights import load_weights, random_weights, sources

RANDOM = "random"
CONTROL_KEY = "control"
"""Key of the store under which the driver says where it listens."""
AHEAD = 2
"""Steps prepared before they run: the next one, and one that may arrive meanwhile."""
PENDING_POLL_S = 5e-5
"""How often a rank looks whether its device has finished, while it has nothing else to do."""


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
    inputs: PackedInputs | None
    """None where this group has no row of the step."""
    exchange: Exchange | None = None
    arrival: Arrival | None = None


@dataclass(frozen=True)
class _Times:
    """Marks of a step, and the host seconds of its merges."""

    before: Mark
    """End of the step before."""
    started: Mark
    ended: Mark
    merge_s: float


def run_worker(setup: Setup) -> int:
    """Serves until the driver says stop; the exit status."""
    torch.set_num_threads(setup.threads)
    progress = Progress()
    store = _store(setup)
    address = store.get(CONTROL_KEY).decode()
    inbox = Inbox(address, setup.rank)
    start_beats(inbox, address, setup.rank, progress, os.getppid())
    worker = Worker(setup, store, inbox, progress)
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

    def __init__(self, setup: Setup, store: Store, inbox: Inbox, progress: Progress) -> None:
        """Holds nothing yet."""
        self._setup = setup
        self._store = store
        self._inbox = inbox
        self._progress = progress
        self._groups: Groups | None = None

    def serve(self) -> int:
        """Opens bundles and runs steps until the end; the exit status."""
        opened: wire.Open | None = wire.Open(
            self._setup.bundle, self._setup.weights, self._setup.seed
        )
        while opened is not None:
            bundle = load_bundle(opened.bundle)
            if not self._agree(bundle, opened):
                return 1
            stage = self._load(bundle, opened)
            self._progress.loading = False
            self._inbox.send(wire.Ready(self._setup.rank))
            last = stage.run()
            if isinstance(last, wire.Stop):
                return int(last.failed)
            opened = last
        return 0

    def _agree(self, bundle: Bundle, opened: wire.Open) -> bool:
        """The hand-shake; nothing large is loaded before it."""
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
        return isinstance(self._inbox.receive(timeout_s=None), wire.Welcome)

    def _load(self, bundle: Bundle, opened: wire.Open) -> "_Stage":
        plan, rank = bundle.plan, self._setup.rank
        place, tp = coordinates(plan.parallelism, rank), plan.parallelism.tp
        first = self._setup.replica * plan.parallelism.ranks_per_replica
        device = rank_device(plan, first + rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self._groups is None:
            self._groups = join_groups(plan.parallelism, rank, self._store, device)
        program = bundle.load_stage(place.stage)
        if opened.weights == RANDOM:
            weights = random_weights(
                program.parameters, seed=opened.seed, tp=tp, tp_rank=place.tp, device=device
            )
        else:
            stages = range(plan.parallelism.spp)
            whole = {
                name for stage in stages for name in sources(bundle.load_stage(stage).parameters)
            }
            weights = load_weights(
                opened.weights,
                program.parameters,
                tp=tp,
                tp_rank=place.tp,
                device=device,
                whole=whole,
            )
        comm = RankComm(self._groups, self._progress)
        runner = Rank(plan, place, program=program, weights=weights, comm=comm, device=device)
        return _Stage(
            runner, comm, self._groups, inbox=self._inbox, progress=self._progress, number=rank
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
    ) -> None:
        """Warms up: all ranks do so at the same time."""
        self._rank = rank
        self._comm = comm
        self._groups = groups
        self._inbox = inbox
        self._progress = progress
        self._number = number
        self._run_number = 0
        self._hand_over = HandOver(rank.plan, groups, rank.device)
        self._queue: deque[_Prepared] = deque()
        self._watch = Stopwatch(rank.device)
        self._ended = self._watch.mark()
        self._pending: deque[tuple[int, _Times, Drawn]] = deque()
        """Step, times and tokens of what the device may still be at."""
        self._warm_up()

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
                        self._start(message.run)
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

    def _start(self, run: int) -> None:
        self._run_number = run
        self._rank.table = RequestTable()
        self._inbox.restart()
        self._inbox.send(wire.Started(self._number, run))

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
            return _Prepared(step_id=step_id, rows=rows, inputs=None)
        rank = self._rank
        # first of all, so that it stands behind no copy and no kernel of this rank
        arrival = self._hand_over.expect(sum(row.tokens for row in rows))
        return _Prepared(
            step_id=step_id,
            rows=rows,
            inputs=rank.inputs(rows),
            exchange=exchange_of(
                rank.plan, rows, rank.place.group, self._groups.kvp_ranks, rank.device
            ),
            arrival=arrival,
        )

    def _run(self, step: _Prepared, *, warm_up: bool = False) -> None:
        if step.inputs is None:
            return
        rank = self._rank
        self._progress.step_id = step.step_id
        what = f"step {step.step_id} on rank {self._number}"
        with torch.inference_mode(), rank.explained(what):
            if step.arrival is not None:
                self._progress.enter(f"{WAITS} for stage {rank.place.stage - 1}")
                step.inputs.hidden_TD = step.arrival.wait()
            self._progress.enter(COMPUTES)
            started = self._watch.mark()
            self._comm.exchange, self._comm.merge_s = step.exchange, 0.0
            out = rank.forward(step.inputs)
            drawn = NOTHING_DRAWN
            if not rank.is_last:
                self._hand_over.send(out)
            elif rank.place.tp == 0:
                drawn = rank.draw(out, step.rows, None)
        ended = self._watch.mark()
        if not warm_up:
            times = _Times(self._ended, started, ended, self._comm.merge_s)
            self._pending.append((step.step_id, times, drawn))
            self._progress.unfinished = self._pending[0][0]
            self._report()
        self._ended = ended

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


def worker_main(setup: Setup) -> NoReturn:
    """Does in this process what a worker does, and ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's; it ends its workers
    status = run_worker(setup)
    sys.stdout.flush()
    sys.stderr.flush()
    # not sys.exit: communicators of ranks that are gone may block in their destructors
    os._exit(status)

"""The driver's end of the control plane: all workers of one replica behind one socket.

Only the thread of the replica's engine touches it. Every wait looks after the workers, so that a
failure is an error of whoever waits, and then nobody waits for long: all of them are ended.
"""

import time
from collections.abc import Collection, Iterator, Mapping

import msgspec
import torch
import zmq

from plans.codec import content_hash
from plans.errors import BundleMismatch, MedhaError
from plans.plan import Plan
from runtime.parallel import wire
from runtime.parallel.graphs import warn_unrecorded
from runtime.parallel.watch import Process, Watch

JOIN_S = 120.0
"""How long all ranks may take to start and present themselves."""
LOAD_S = 3600.0
"""How long all ranks may take to load: a large checkpoint from a network drive, kernels compiled
for a new machine. A rank that dies or hangs meanwhile is noticed much earlier, by its beats."""
LOOK_S = 0.25
"""Longest wait without a look at the workers' health."""
GRACE_S = 0.5
"""After the first sign of a failure, time for its cause to show: others may fail because of it."""


class Workers:
    """All ranks of one replica, joined and ready."""

    def __init__(self, plan: Plan, *, bind: str, host: str, replica: int = 0) -> None:
        """Listens on a free port of the interface `bind`, which workers reach as `host`."""
        self._plan = plan
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.LINGER, 1000)
        port = self._socket.bind_to_random_port(f"tcp://{bind}")
        self.address = f"tcp://{host}:{port}"
        self._ranks = range(plan.parallelism.ranks_per_replica)
        self._replica = replica
        self._processes: dict[int, Process] = {}
        self._watch = Watch(plan, {}, time.monotonic(), replica=replica)
        self._runs = 0
        self.failed = False
        """Whether a rank has failed."""
        self.graphs = 0
        """Sizes of decode steps that every rank has recorded."""
        self.dropped = 0
        """Messages that were not of a rank of this replica, or could not be read."""

    @property
    def plan(self) -> Plan:
        """The plan that the workers have opened."""
        return self._plan

    # --- life ---------------------------------------------------------------------------------

    def join(
        self, processes: Mapping[int, Process], *, seed: int | None, graphs: bool = True
    ) -> None:
        """Compares all ranks with the plan, lets them load, and waits until they are ready.

        processes  those that this process started, by rank in the replica
        seed       of random weights, None where they come from a folder
        graphs     let them record decode steps where the program allows it
        errors     BundleMismatch where ranks differ, before anything is loaded; MedhaError where
                   one does not come or fails
        """
        self._processes = dict(processes)
        self._watch = Watch(self._plan, processes, time.monotonic(), replica=self._replica)
        hellos: dict[int, wire.Hello] = {}
        until_s = time.monotonic() + JOIN_S
        while len(hellos) < len(self._ranks):
            for message in self.poll(LOOK_S):
                if isinstance(message, wire.Hello):
                    hellos[message.rank] = message
                    self._watch.place(message)
            self._in_time(until_s, hellos, f"did not join within {JOIN_S:g} s")
        self._compare(hellos, seed)
        self._broadcast(wire.Welcome(graphs))
        ready: dict[int, wire.Ready] = {}
        until_s = time.monotonic() + LOAD_S
        while len(ready) < len(self._ranks):
            words = [each for each in self.poll(LOOK_S) if isinstance(each, wire.Ready)]
            ready |= {each.rank: each for each in words}
            self._in_time(until_s, ready, f"did not finish loading within {LOAD_S:g} s")
        for rank in ready:
            self._watch.ready(rank)
        self.graphs = min(each.graphs for each in ready.values())
        if ready[0].problem:  # all say the same
            warn_unrecorded("decode steps", MedhaError(ready[0].problem))

    def _in_time(self, until_s: float, found: Collection[int], problem: str) -> None:
        missing = [rank for rank in self._ranks if rank not in found]
        if missing and time.monotonic() > until_s:
            self.failed = True
            raise MedhaError(f"ranks {missing} {problem}")

    def _compare(self, hellos: Mapping[int, wire.Hello], seed: int | None) -> None:
        wanted = {
            "ranks": self._plan.parallelism.ranks,
            "plan_hash": content_hash(self._plan),
            "torch": str(torch.__version__),
            "seed": seed,
        }
        problems = []
        for rank in self._ranks:
            hello = hellos[rank]
            for field, value in wanted.items():
                found = getattr(hello, field)
                if found != value:
                    problems.append(f"  rank {rank} on {hello.host}: {field} {found}, not {value}")
        if problems:
            text = "ranks do not belong together:\n" + "\n".join(problems)
            self.failed = True
            self._broadcast(wire.Refusal(text))
            raise BundleMismatch(
                f"{text}\ngive every node the same bundle, flags and versions, and start again"
            )

    def open(
        self, bundle: str, plan: Plan, weights: str, seed: int, *, graphs: bool = True
    ) -> None:
        """Changes all ranks to another bundle of the same mesh; nothing may be in flight."""
        if plan.parallelism != self._plan.parallelism:
            raise BundleMismatch(f"{bundle}: its mesh is {plan.parallelism}, not the workers'")
        self._plan = plan
        self._broadcast(wire.Open(bundle, weights, seed))
        self.join(self._processes, seed=seed if weights == "random" else None, graphs=graphs)

    def start(self, *, graphs: bool = True) -> int:
        """Lets all ranks forget all requests; nothing may be in flight. The number of the run.

        graphs  run decode steps by graph where they are recorded
        """
        self._runs += 1
        self._broadcast(wire.Start(self._runs, graphs))
        started: set[int] = set()
        while len(started) < len(self._ranks):
            words = [each for each in self.poll(LOOK_S) if isinstance(each, wire.Started)]
            started |= {each.rank for each in words if each.run == self._runs}
        return self._runs

    def stop(self) -> None:
        """Tells all ranks to end."""
        try:
            self._broadcast(wire.Stop(self.failed))
        finally:
            self._context.destroy(linger=1000)

    # --- messages -----------------------------------------------------------------------------

    def send_step(self, message: wire.StepMessage) -> None:
        """To all ranks."""
        self._broadcast(message)

    def _broadcast(self, message: wire.FromDriver) -> None:
        data = wire.encode(message)
        for rank in self._ranks:
            try:
                self._socket.send_multipart([f"rank-{rank}".encode(), data], zmq.NOBLOCK)
            except zmq.ZMQError:  # gone or full; whoever waits next learns the reason
                continue

    def poll(self, timeout_s: float, *, in_flight: bool = False) -> Iterator[wire.FromWorker]:
        """Messages that are here or come within the time, but for the beats.

        in_flight  steps are, so that a rank that does not get on is an error
        errors     MedhaError that says which rank failed and how
        """
        found: list[wire.FromWorker] = []
        self._receive(min(timeout_s, LOOK_S), found)
        problem = self._watch.check(time.monotonic(), in_flight=in_flight)
        if problem is not None or any(isinstance(each, wire.Failure) for each in found):
            self._fail(problem, found)
        return iter(found)

    def _receive(self, timeout_s: float, found: list[wire.FromWorker]) -> None:
        """Takes every message there is; waits only for the first."""
        wait_ms = max(round(timeout_s * 1e3), 0)
        while self._socket.poll(wait_ms):
            wait_ms = 0
            message = self._known(self._socket.recv_multipart())
            if message is None:
                self.dropped += 1
            elif isinstance(message, wire.Beat):
                self._watch.beat(message, time.monotonic())
            else:
                found.append(message)

    def _known(self, frames: list[bytes]) -> wire.FromWorker | None:
        """A message of one of the ranks, under its own name; None for anything else.

        The port may be open to a network, where others may try what listens there.
        """
        if len(frames) != 2:
            return None
        name, data = frames
        try:
            message: wire.FromWorker = wire.decode_from_worker(data)
        except msgspec.DecodeError:  # and what is no message of ours, a ValidationError
            return None
        role = "beat" if isinstance(message, wire.Beat) else "rank"
        is_its_own = message.rank in self._ranks and name == f"{role}-{message.rank}".encode()
        return message if is_its_own else None

    def _fail(self, problem: str | None, found: list[wire.FromWorker]) -> None:
        """Gathers what else shows, and raises the likeliest cause."""
        self.failed = True
        until_s = time.monotonic() + GRACE_S
        while time.monotonic() < until_s:
            self._receive(0.05, found)
        failures = [each for each in found if isinstance(each, wire.Failure)]
        first = self._replica * len(self._ranks)
        own = "; ".join(
            f"rank {first + each.rank}, step {each.step_id}: {each.text}" for each in failures
        )
        gone = self._watch.gone()
        if gone is not None and "signal" in gone:
            raise MedhaError(f"{gone}; the run cannot go on")
        if failures:
            raise MedhaError(f"{own}; the run cannot go on")
        raise MedhaError(f"{problem or gone}; the run cannot go on")

"""Messages that come late and out of order, and ranks that stumble, change and block nothing.

A relay stands between driver and workers and holds every message for a random time; the programs
pause at random in every product of every layer, on each rank differently.
"""

import heapq
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from parallel_worlds import (
    FAMILIES,
    SEED,
    RandomScheduler,
    assert_greedy,
    mesh_bundle,
    mesh_plan,
    prompt_of,
)

from plans.mesh import Parallelism
from plans.plan import Plan
from runtime.clock import WallClock
from runtime.parallel import launch
from runtime.parallel.control import Workers
from runtime.parallel.executor import ParallelExecutor
from runtime.program import load_bundle

HELD_S = 0.02
STUMBLES = """

_whole_linear = linear
_draws = __import__("random").Random(__import__("os").getpid())


def linear(*args):
    if _draws.random() < 0.1:
        __import__("time").sleep(_draws.random() * 0.01)
    return _whole_linear(*args)
"""


class Relay:
    """Workers connect to it, it connects to the driver; each message waits for its own time."""

    def __init__(self, driver: str, ranks: int) -> None:
        self._context = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        port = self._front.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"
        self._backs = {}
        for name in [
            f"{kind}-{rank}".encode() for kind in ("rank", "beat") for rank in range(ranks)
        ]:
            back = self._context.socket(zmq.DEALER)
            back.identity = name
            back.connect(driver)
            self._backs[name] = back
        self._draws = random.Random(5)
        self._held: list[tuple[float, int, bytes, bool, bytes]] = []
        self.overtakings = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _run(self) -> None:
        poller = zmq.Poller()
        for socket in (self._front, *self._backs.values()):
            poller.register(socket, zmq.POLLIN)
        count, newest = 0, {}
        while not self._stopped.is_set():
            ready = dict(poller.poll(1))
            messages = []
            if self._front in ready:
                name, data = self._front.recv_multipart()
                messages.append((name, True, data))
            messages += [
                (name, False, back.recv()) for name, back in self._backs.items() if back in ready
            ]
            for name, inward, data in messages:
                due_s = time.monotonic() + self._draws.random() * HELD_S
                count += 1
                heapq.heappush(self._held, (due_s, count, name, inward, data))
            while self._held and self._held[0][0] <= time.monotonic():
                _, number, name, inward, data = heapq.heappop(self._held)
                self.overtakings += number < newest.get((name, inward), 0)
                newest[name, inward] = max(number, newest.get((name, inward), 0))
                if inward:
                    self._backs[name].send(data)
                else:
                    self._front.send_multipart([name, data])


@pytest.fixture
def relays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Relay]]:
    """Puts a relay before the driver of each run."""
    made: list[Relay] = []

    class Relayed(Workers):
        def __init__(self, plan: Plan, *, bind: str, host: str, replica: int = 0) -> None:
            super().__init__(plan, bind=bind, host=host, replica=replica)
            made.append(Relay(self.address, plan.parallelism.ranks))
            self.address = made[-1].address

    monkeypatch.setattr(launch, "Workers", Relayed)
    yield made
    for relay in made:
        relay.stop()


def test_late_and_reordered_messages_and_stumbling_ranks_change_no_token(
    relays: list[Relay], tmp_path: Path
):
    plan = mesh_plan(Parallelism(spp=2, kvp=2), FAMILIES["qwen3"])
    bundle = mesh_bundle(tmp_path / "bundle", plan, {"linear.py": STUMBLES})
    plan = load_bundle(bundle).plan
    with launch.running_workers(str(bundle), plan, "random", SEED, None) as [workers]:
        for seed in range(2):
            executor = ParallelExecutor(plan, workers, WallClock())
            scheduler = RandomScheduler(plan, executor, random.Random(seed))
            for number in range(5):
                scheduler.add(number, prompt_of(40 * number + 7, seed + number), 6)
            scheduler.run()
            for known in scheduler.done.values():
                assert_greedy(FAMILIES["qwen3"], known.prompt, known.answer)
        overtakings = relays[0].overtakings
    assert overtakings > 0, "no message overtook another: the relay does not reorder"

"""A worker that opens another bundle holds nothing of the one before when it loads."""

import gc
import weakref
from types import SimpleNamespace
from typing import Any

from runtime.parallel import wire, worker
from runtime.parallel.progress import Progress


class Stage:
    """With a cycle, as those of a rank and its graphs; the first one ends for another bundle."""

    def __init__(self, last: wire.Open | wire.Stop) -> None:
        self.last = last
        self.cycle = self

    def graphs(self) -> tuple[int, str]:
        return 0, ""

    def run(self) -> wire.Open | wire.Stop:
        return self.last


def test_the_weights_before_are_gone_when_the_next_ones_are_loaded(monkeypatch):
    made: list[weakref.ref[Stage]] = []
    alive: list[list[bool]] = []

    def load(self: object, bundle: object, opened: object, *, graphs: bool) -> Stage:
        alive.append([each() is not None for each in made])
        stage = Stage(wire.Stop(failed=False) if made else wire.Open("b", "random", 0))
        made.append(weakref.ref(stage))
        return stage

    monkeypatch.setattr(worker, "load_bundle", lambda folder: None)
    monkeypatch.setattr(
        worker.Worker, "_agree", lambda self, bundle, opened: SimpleNamespace(graphs=False)
    )
    monkeypatch.setattr(worker.Worker, "_load", load)
    setup: Any = SimpleNamespace(bundle="a", weights="random", seed=0, rank=0)
    inbox: Any = SimpleNamespace(send=lambda message: None)
    store: Any = None
    try:
        served = worker.Worker(setup, store, inbox, Progress(), lambda device: None)
        assert served.serve() == 0
    finally:
        gc.unfreeze()
    assert alive == [[], [False]]

"""Records launches and runs them again: CUDA graphs, behind what a test can do on a CPU."""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

import torch

Replay = Callable[[], None]


class Recorder(Protocol):
    """What it records reads and writes the same tensors whenever it runs.

    All of it shares one pool of memory: a tensor made while recording is overwritten by whatever
    is recorded behind its last use. So what is to outlive that is held, or copied elsewhere.
    """

    def session(self) -> AbstractContextManager[None]:
        """Recording is done inside one; nothing else may be under way on the device."""
        ...

    def begin(self) -> None:
        """Launches from now on are recorded and not run."""
        ...

    def end(self) -> Replay:
        """What runs the launches since `begin`."""
        ...


class CudaRecorder:
    """Graphs of one device."""

    def __init__(self, device: torch.device) -> None:
        """Takes no memory yet."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None

    @contextmanager
    def session(self) -> Iterator[None]:
        """On a stream of its own, as recording has to be, and without collections of garbage."""
        gc.collect()
        collects = gc.isenabled()
        gc.disable()  # what it frees may not be freed while a stream is recorded
        torch.cuda.synchronize(self._device)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            if self._graph is not None:  # something failed between begin and end
                with suppress(RuntimeError):
                    self._graph.capture_end()
                self._graph = None
            if collects:
                gc.enable()
            torch.cuda.synchronize(self._device)

    def begin(self) -> None:
        """Begins a graph."""
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: another thread of this process may allocate meanwhile
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Replay:
        """Ends it."""
        assert self._graph is not None, "begin comes before end"
        graph, self._graph = self._graph, None
        graph.capture_end()
        return graph.replay

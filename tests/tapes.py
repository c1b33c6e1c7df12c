"""Recording on a CPU: a recorder that notes operations and runs them again, and ranks that use it.

Light to import: the processes of a mesh do.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runtime.parallel import stage_graphs
from runtime.parallel.recorder import Replay
from runtime.parallel.worker import Setup, worker_main


class Tape(TorchDispatchMode):
    """Notes every operation and its results."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.notes.append((func, args, kwargs or {}, results))
        return results

    def run(self) -> None:
        """All of them again, their results to where the first ones were."""
        with torch.inference_mode():
            for func, args, kwargs, results in self.notes:
                found = func(*args, **kwargs)
                for old, new in zip(tree_leaves(results), tree_leaves(found), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)
                    elif isinstance(new, torch.ScriptObject):  # a collective under way
                        new.wait()


class TapeRecorder:
    """Records operations on a CPU; unlike a graph, it runs them while it records."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0
        self._tape: Tape | None = None

    @contextmanager
    def session(self) -> Iterator[None]:
        yield
        assert self._tape is None, "begun and not ended"

    def begin(self) -> None:
        assert self._tape is None, "two recordings at once"
        self._tape = Tape()
        self._tape.__enter__()

    def end(self) -> Replay:
        tape, self._tape = self._tape, None
        assert tape is not None
        tape.__exit__(None, None, None)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            tape.run()

        return replay


# --- ranks that record ----------------------------------------------------------------------------

SIZES = (1, 2, 4)
"""Few and small: some steps have more sequences."""
RECORDABLE = "\nRECORDABLE = True\n"
"""Behind a stage of reference functions, with what follows behind its attention."""
DENSE_DECODES = '''

_by_lengths = paged_attention


def paged_attention(q_TNH, k_pages, v_pages, written, inputs, scale, k_scales=None, v_scales=None):
    """Of a recorded step, over all pages of the table: no number is read on the host."""
    if not inputs.recorded:
        return _by_lengths(q_TNH, k_pages, v_pages, written, inputs, scale)
    table_TP = inputs.page_table_BP.long()
    k_TSKH, v_TSKH = (pages[table_TP].flatten(1, 2) for pages in (k_pages, v_pages))
    group = q_TNH.shape[1] // k_pages.shape[2]
    k_TSNH, v_TSNH = (each.repeat_interleave(group, 2) for each in (k_TSKH, v_TSKH))
    logits_TNS = torch.einsum("tnh,tsnh->tns", q_TNH, k_TSNH) * scale
    seen_TS = torch.arange(k_TSNH.shape[1]) < inputs.kv_lens_B[:, None]
    logits_TNS = logits_TNS.masked_fill(~seen_TS[:, None], -1e30)
    return torch.einsum("tns,tsnh->tnh", logits_TNS.softmax(-1), v_TSNH), logits_TNS.logsumexp(-1)
'''


def recordable_additions(stages: int) -> dict[str, str]:
    """What mesh_bundle appends to a program of reference functions, so that it can be recorded."""
    texts = {f"stage_{stage}.py": RECORDABLE for stage in range(stages)}
    return {**texts, "paged_attention.py": DENSE_DECODES}


class Counting(TapeRecorder):
    """Tells another process how often its tapes ran; may fail where it ends a recording."""

    def __init__(self, counts: Any, rank: int, *, fails_at: int) -> None:
        super().__init__()
        self._counts = counts
        self._rank = rank
        self._fails_at = fails_at

    def end(self) -> Replay:
        replay = super().end()
        if self.recorded == self._fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory")

        def counted() -> None:
            self._counts[self._rank] += 1
            replay()

        return counted


def recording_main(setup: Setup, counts: Any, fails_at: int) -> None:
    """A rank as worker_main runs it, but for what it records with."""
    stage_graphs.SIZES = SIZES
    worker_main(setup, lambda _: Counting(counts, setup.rank, fails_at=fails_at))


def recording_starter(counts: Any, fails_at: dict[int, int]) -> Callable[[Setup], BaseProcess]:
    """In place of launch.start_worker.

    counts    shared array: runs of recorded pieces, by rank
    fails_at  by rank, the recording at whose end it fails
    """

    def start(setup: Setup) -> BaseProcess:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["runtime.parallel.worker"])
        arguments = (setup, counts, fails_at.get(setup.rank, 0))
        process = context.Process(target=recording_main, args=arguments, daemon=True)
        process.start()
        return process

    return start

"""Times on the device: host time on a CPU, events of the current stream on a GPU."""

import time

import torch

Mark = float | torch.cuda.Event


class Stopwatch:
    """Marks points of the work and tells the seconds between them."""

    def __init__(self, device: torch.device) -> None:
        """For the current stream of the device."""
        self._cuda = device.type == "cuda"

    def mark(self) -> Mark:
        """The point that the work given to the device so far will reach."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def reached(self, mark: Mark) -> bool:
        """Whether the device is beyond a mark."""
        return True if isinstance(mark, float) else bool(mark.query())  # type: ignore[no-untyped-call]

    def seconds(self, first: Mark, last: Mark) -> float:
        """Time between two marks of one stream; waits until the device is beyond the last."""
        if isinstance(first, float) or isinstance(last, float):
            assert isinstance(first, float)
            assert isinstance(last, float)
            return last - first
        last.synchronize()  # else elapsed_time may raise
        return float(first.elapsed_time(last)) * 1e-3

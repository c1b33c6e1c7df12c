"""Time as an argument: seconds since the engine started, virtual or real."""

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds as float64; 0 at the start of the engine."""

    def now_s(self) -> float:
        """The time."""
        ...

    def sleep_until(self, at_s: float) -> None:
        """Lets time pass; returns at once when at_s is over."""
        ...


class VirtualClock:
    """Moves only when told: the simulator's clock."""

    def __init__(self) -> None:
        """Starts at 0."""
        self._now_s = 0.0

    def now_s(self) -> float:
        """The virtual time."""
        return self._now_s

    def sleep_until(self, at_s: float) -> None:
        """Jumps forward; never back."""
        self._now_s = max(self._now_s, at_s)


class WallClock:
    """The machine's monotonic clock."""

    def __init__(self) -> None:
        """Starts at 0 now."""
        self._start_s = time.monotonic()

    def now_s(self) -> float:
        """Seconds since construction."""
        return time.monotonic() - self._start_s

    def sleep_until(self, at_s: float) -> None:
        """Sleeps."""
        time.sleep(max(at_s - self.now_s(), 0.0))

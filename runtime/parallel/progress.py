"""Where a worker is: written by the thread that works, read by the thread that beats."""

COMPILES = "compiles a kernel"
COMPUTES = "computes"
IDLE = "waits for a step"
LOADS = "loads"
WAITS = "waits"
"""How the name of every phase begins in which a rank waits for others."""


class Progress:
    """One writer, one reader; each field is replaced as a whole."""

    def __init__(self) -> None:
        """At the start of the process."""
        self.step_id = -1
        self.loading = True
        """Until it can run steps: first calls of a device's libraries take their time."""
        self.phase = LOADS
        self.moves = 0

    def enter(self, phase: str) -> None:
        """Notes the phase that begins."""
        self.phase = phase
        self.moves += 1

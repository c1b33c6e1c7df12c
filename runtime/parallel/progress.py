"""Where a worker is: written by the thread that works, read by the thread that beats."""

COMPILES = "compiles a kernel"
COMPUTES = "computes"
DEVICE = "has work on its device"
IDLE = "waits for a step"
LOADS = "loads"
WAITS = "waits"
"""How the name of every phase begins in which a rank waits for others."""


class Progress:
    """One writer, one reader; each field is replaced as a whole."""

    def __init__(self) -> None:
        """At the start of the process."""
        self.step_id = -1
        """Step that it gives, or last gave, to its device."""
        self.unfinished: int | None = None
        """Oldest step that it has given to its device and that is not known to have ended."""
        self.loading = True
        """Until it can run steps: first calls of a device's libraries take their time."""
        self.phase = LOADS
        self.moves = 0

    @property
    def oldest_step(self) -> int:
        """The step that it has to get on with first."""
        unfinished = self.unfinished
        return self.step_id if unfinished is None else unfinished

    def rest(self) -> None:
        """Notes, once however often it is called, that nothing is to be given to the device."""
        phase = IDLE if self.unfinished is None else DEVICE
        if self.phase != phase:
            self.enter(phase)

    def finished(self, unfinished: int | None) -> None:
        """Notes that the device has come to the end of a step, and which one is the oldest now."""
        self.unfinished = unfinished
        self.moves += 1

    def enter(self, phase: str) -> None:
        """Notes the phase that begins."""
        self.phase = phase
        self.moves += 1

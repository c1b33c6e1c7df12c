"""A request and what the engine remembers of it.

The frozen half is what the user asked for. The live half has one owner, the engine: cursors in
tokens of the whole sequence (prompt and answer so far), pages by shard, and the times that the
metrics are made of.

    scheduled   tokens submitted to the first stage
    computed    tokens whose step has ended: their KV exists
    length      prompt + generated; a token is sampled when `length` tokens are computed

A request is in prefill while more than its newest token is missing, so a fresh prompt and a
recomputation after an eviction are one case; otherwise it decodes.
"""

from dataclasses import dataclass, field

from msgspec import Struct

NEVER = float("nan")


class Request(Struct, frozen=True, kw_only=True):
    """What a user asked for."""

    number: int
    """Unique; also the tie-break of every order: lower came first."""
    arrival_s: float
    """Clock of the scheduled arrival; waiting counts from here."""
    prompt_tokens: int
    max_tokens: int
    """Most tokens that are generated."""
    ttft_target_s: float | None = None
    """Own deadline of the first token, relative to arrival; None takes the plan's."""
    tbt_target_s: float | None = None
    """Own limit between tokens; None takes the plan's."""
    class_name: str | None = None
    """Class of the plan's targets, if any."""


@dataclass(slots=True)
class Sequence:
    """The engine's memory of one request that has arrived and not ended."""

    request: Request
    deadline_s: float
    """Relative to arrival; fixed at arrival."""
    work_s: float
    """Predicted seconds of its lone prefill; fixed at arrival."""
    tbt_s: float
    long: bool = False
    """Its class in reports and for the packer."""
    number: int = field(init=False)
    """The request's number."""
    own_tbt: bool = field(init=False)
    """The request has a target of its own between tokens."""
    whole_s: float = field(init=False)
    """Predicted seconds of the prefill that it has to do: more than work_s where it was evicted."""
    served_before: int = 0
    """Prefill tokens that the engine had submitted, of all requests, when this one arrived."""
    scheduled: int = 0
    computed: int = 0
    generated: int = 0
    in_flight: int = 0
    """Steps that hold work of it."""
    home: int = 0
    pages: list[list[int]] = field(default_factory=list)
    """Page numbers by shard."""
    prefix_lost: int = 0
    """Tokens computed and thrown away, to be computed again."""
    evictions: int = 0
    first_chunk_s: float = NEVER
    first_token_s: float = NEVER
    last_token_s: float = NEVER

    def __post_init__(self) -> None:
        """Fills what is read in every step."""
        self.number = self.request.number
        self.own_tbt = self.request.tbt_target_s is not None
        self.whole_s = self.work_s

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return self.request.prompt_tokens + self.generated

    @property
    def missing(self) -> int:
        """Tokens not yet submitted."""
        return self.length - self.scheduled


class Record(Struct, frozen=True, kw_only=True):
    """What the metrics keep of an ended or refused request."""

    request: Request
    deadline_s: float
    work_s: float
    first_chunk_s: float
    first_token_s: float
    finished_s: float
    generated: int
    evictions: int
    recomputed_tokens: int
    reason: str
    """`length`, `stop`, `cancelled`, `refused`; `unfinished` where the run ended before, `failed`
    where it broke off."""

    @property
    def finished(self) -> bool:
        """Whether it ran to its end."""
        return self.reason in {"length", "stop"}

    @property
    def ttft_s(self) -> float:
        """Seconds from arrival to the first token; infinite where there was none."""
        if self.first_token_s != self.first_token_s:  # NaN: no token
            return float("inf")
        return self.first_token_s - self.request.arrival_s

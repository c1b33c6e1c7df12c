"""The execution plan: everything that changes tokens or timing, as one frozen value.

Written as canonical YAML by plans/codec.py, checked by plans/check.py. What says where to run it
(weights, port, log level) is a flag of the commands and not in here.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from plans.chunks import Prefill
from plans.mesh import Parallelism
from plans.model import Count, Dtype, Model
from plans.steptime import StepTime
from plans.topology import Topology
from plans.workload import Limits, Targets, Workload

SCHEMA: Literal[1] = 1
HASH_FREE_FIELDS = ("name", "made_by", "predicted")
"""Fields that do not change what runs and so stay out of the content hash."""


class MadeBy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the plan came to be."""

    medha: str
    """Version of the planner."""
    effort: str
    seed: Annotated[int, Meta(ge=0)]
    command: str
    """Shell command that makes the plan again."""


class Placement(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which device each rank runs on."""

    rank_map: tuple[tuple[int, int], ...]
    """(node, device) of each rank, ranks in the order of plans/mesh.py."""
    idle: tuple[tuple[int, int], ...] = ()
    """(node, device) of each device that no rank uses."""


class Kv(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The paged KV cache."""

    page_tokens: Literal[16, 32, 64, 128, 256]
    dtype: Dtype
    pages_per_rank: Count
    """Pages of the pool that each rank holds; all layers of its stage share one page number."""
    tokens_per_kvp_shard: Count
    """Tokens of one request that one group holds, a multiple of page_tokens."""


class Memory(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes on the rank that holds most."""

    capacity_bytes: Count
    weights_bytes: Count
    activations_bytes: Count
    """Largest step: every live buffer of the program, and the logits."""
    reserved_bytes: Annotated[int, Meta(ge=0)]
    """Context, graphs, communicators, fragmentation."""
    kv_bytes: Count
    free_bytes: Annotated[int, Meta(ge=0)]


class Scheduler(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How requests are ordered and steps are filled (design section 4)."""

    policy: str = "lars-lanes"
    step_budget_s: Annotated[float, Meta(gt=0)] = 0.03
    """Predicted time of a step, summed over its stages, while anything decodes."""
    idle_budget_s: Annotated[float, Meta(gt=0)] = 0.1
    """The same while nothing decodes."""
    max_yield: Annotated[float, Meta(ge=0, lt=1)] = 0.4
    """Most of a step that a long prefill leaves to short ones."""
    long_tokens: Count = 65536
    """Prompts from this length on are long."""
    best_effort_share: Annotated[float, Meta(gt=0, lt=1)] = 0.1
    """Share of all prefill time that requests of the best-effort class get while they wait."""
    min_chunk_tokens: Count = 32
    """Progress that a prefill makes even where the budget is already spent."""
    max_step_tokens: Count = 8192
    """Tokens of one step; activations are sized for it."""


class When(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Steps for which a kernel is used."""

    tokens_max: Count | None = None
    """Tokens of the step; None has no bound."""


class Kernel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One op of the program and the file that implements it."""

    op: str
    when: When = When()
    target: Literal["torch", "triton", "flash_attn"]
    params: dict[str, int] = {}
    """Tunables, as named in the op's spec."""
    file: str


class Percentiles(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nearest-rank percentiles in seconds; None where that sample never came."""

    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None


class Replay(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one replica did with the plan's workload in virtual time, on the runtime's own loop.

    Lengths are stratified, so that few requests hold the mix; arrivals are Poisson. All replicas
    are taken to be alike: rates here are of all, counts of the one that was run.
    """

    policy: str
    seed: Annotated[int, Meta(ge=0)]
    arrival_rps: Annotated[float, Meta(gt=0)]
    """Offered to all replicas together."""
    duration_s: float
    """Virtual seconds from the first arrival to where the run was stopped."""
    requests: int
    """That arrived at the one replica."""
    finished: int
    undecided: int
    """Neither finished nor beyond a target when the run was stopped; in no percentile."""
    steps: int
    utilisation: float
    """Share of the time in which the slowest stage worked."""
    arrivals_per_s: float
    """Requests of the one replica over duration_s: the left factor of Little's law."""
    in_system_mean: float
    """Mean number of requests in the replica, integrated over the engine's own events."""
    time_in_system_mean_s: float
    """Mean time of a request in the replica within the run, from the records."""
    least_slowdown: float | None = None
    """Smallest TTFT over the lone time of the same prompt; below 1 where chunks that are shorter
    than the schedule's suit a length better. None where nothing started."""
    attainment: float
    """Share of the decided requests that met their SLO."""
    goodput_rps: float
    """attainment x arrival_rps."""
    ttft_s: dict[str, Percentiles]
    """By class: all, short, long."""
    tbt_s: dict[str, Percentiles]
    """Single gaps, by class."""


class Predicted(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the planner expects; never read by the runtime to decide anything."""

    ttft_s: dict[str, float]
    """Time to the first token of a lone prompt, by its tokens."""
    tbt_s: dict[str, float]
    """Time between tokens of one lone request, by its context tokens."""
    capacity_rps: float
    """Requests a second of the workload at which prefill and decode fill the devices."""
    goodput_rps: float | None = None
    """Requests a second that met their SLO in `replay`; None where none was run."""
    bound_by: str
    """What limits capacity."""
    error_band: float
    """Half width of the band around the times, as a share."""
    provenance: dict[str, str]
    """Term to `measured`, `interpolated`, `extrapolated by x` or `formula`."""
    replay: Replay | None = None
    notes: tuple[str, ...] = ()
    """What the reader must know: assumed RoPE scaling, idle devices, ..."""


class Plan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A deployment of one model on one machine for one workload."""

    schema: Literal[1] = SCHEMA
    name: str
    made_by: MadeBy
    model: Model
    workload: Workload
    targets: Targets
    limits: Limits
    topology: Topology
    parallelism: Parallelism
    stages: tuple[tuple[int, int], ...]
    """Layer range [first, end) of each stage; uneven cuts are legal."""
    placement: Placement
    prefill: Prefill
    kv: Kv
    memory: Memory
    scheduler: Scheduler
    step_time: StepTime
    kernels: tuple[Kernel, ...] = ()
    files: dict[str, str] = {}
    """sha256 of every file of the program, by path inside the bundle."""
    predicted: Predicted

    def hashed(self) -> dict[str, Any]:
        """Field values that the content hash covers, in field order."""
        return {
            field: getattr(self, field)
            for field in self.__struct_fields__
            if field not in HASH_FREE_FIELDS
        }

"""The question that a search answers: what to serve, on what, for whom, within which limits.

`make_world` fills in what the user left open (context, budgets, dtypes) and writes down what it
assumed; everything after it is a pure function of the result.
"""

from dataclasses import dataclass, replace

from msgspec import structs

from plans.errors import UsageError
from plans.model import Model, RopeScaling
from plans.plan import Scheduler
from plans.topology import Device, Topology
from plans.workload import (
    ClassTargets,
    Limits,
    RequestClass,
    Targets,
    TtftTarget,
    Workload,
    length_at,
)

PAGE_TOKENS = 128
TTFT_QUANTILE = 0.9
"""A TTFT target holds for a lone prompt of this quantile of a class's prompt lengths."""
STEP_SHARE = 0.6
"""step_budget_s as a share of the TBT target: the rest absorbs what the formula misses."""
IDLE_BUDGET_S = 0.1
"""A prompt that arrives waits at most this long for the chunk in flight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """One planning question, complete."""

    model: Model
    device: Device
    topology: Topology
    workload: Workload
    targets: Targets
    limits: Limits
    scheduler: Scheduler
    kv_dtype: str
    page_tokens: int = PAGE_TOKENS
    ttft_slo_s: float | None = None
    """Hard: no plan that misses it is emitted."""
    tbt_slo_s: float | None = None
    """Hard as well."""
    objective: str = "goodput"
    """A name of planner/objective.py."""
    rate_rps: float | None = None
    """Hard: requests a second that the plan must sustain."""
    weight_dtypes: tuple[str, ...] = ()
    """To choose from; empty takes the model's own."""
    kv_dtypes: tuple[str, ...] = ()
    """To choose from; empty takes kv_dtype."""
    notes: tuple[str, ...] = ()
    """Assumptions that the reader of the plan must know."""

    @property
    def most_full_requests(self) -> int:
        """Requests at the context limit that the KV pool makes room for at most.

        A GPU's memory is the engine's alone; a CPU's belongs to everything on the machine.
        """
        return 4 if self.device.kind == "cpu" else self.limits.sequences

    @property
    def gpus(self) -> int:
        """Devices asked for."""
        return self.topology.devices

    @property
    def longest_prompt(self) -> int:
        """Prompt that leaves room for one token of the answer."""
        return max(self.limits.context_tokens - 1, 1)

    def with_devices(self, topology: Topology) -> "World":
        """The same question on another machine."""
        return replace(self, topology=topology)


def make_world(
    *,
    model: Model,
    device: Device,
    topology: Topology,
    workload: Workload,
    context_tokens: int | None = None,
    ttft_slo_s: float | None = None,
    tbt_slo_s: float | None = None,
    objective: str = "goodput",
    rate_rps: float | None = None,
    weight_dtypes: tuple[str, ...] = (),
    kv_dtypes: tuple[str, ...] = (),
) -> World:
    """Completes a question; raises UsageError for values that can never hold."""
    context = context_tokens or default_context(workload)
    if context < 2:
        raise UsageError(f"--max-context {context}: a prompt and an answer need at least 2 tokens")
    for flag, value in (("--ttft-slo", ttft_slo_s), ("--tbt-slo", tbt_slo_s)):
        if value is not None and value <= 0:
            raise UsageError(f"{flag} {value:g}: must be above 0 seconds")
    notes = []
    stretched = stretch_rope(model, context)
    if stretched.rope.scaling and stretched.rope != model.rope:
        scaling = stretched.rope.scaling
        notes.append(
            f"assumed RoPE scaling {scaling.kind} x {scaling.factor:g}: the context of {context}"
            f" tokens exceeds the {model.context_limit} that {model.name} was trained for;"
            " quality beyond them is unknown"
        )
    longest = workload.max_context_tokens
    if longest > context:
        notes.append(
            f"workload {workload.name} has requests of up to {longest} tokens; lengths are cut at"
            f" the context of {context}"
        )
    cpu = device.kind == "cpu"
    tbt_s = tbt_slo_s or Targets().tbt_s
    classes = {
        each.name: ClassTargets(ttft_s=ttft_slo_s)
        for each in slo_classes(workload)
        if ttft_slo_s is not None
    }
    step_budget_s = STEP_SHARE * tbt_s
    return World(
        model=stretched,
        device=device,
        topology=topology,
        workload=workload,
        targets=Targets(ttft=TtftTarget(), tbt_s=tbt_s, classes=classes),
        limits=Limits(context_tokens=context, sequences=32 if cpu else 512),
        scheduler=Scheduler(
            step_budget_s=step_budget_s,
            idle_budget_s=max(IDLE_BUDGET_S, step_budget_s),
            max_step_tokens=2048 if cpu else 8192,
        ),
        kv_dtype=kv_dtype(model, device),
        ttft_slo_s=ttft_slo_s,
        tbt_slo_s=tbt_slo_s,
        objective=objective,
        rate_rps=rate_rps,
        weight_dtypes=weight_dtypes,
        kv_dtypes=kv_dtypes,
        notes=tuple(notes),
    )


def default_context(workload: Workload) -> int:
    """The longest request of the workload, up to a power of two that is near, else to a page."""
    longest = workload.max_context_tokens
    power = 1 << (longest - 1).bit_length()
    if power <= 1.1 * longest:  # 1,000,000 tokens mean 1m
        return power
    return -(-longest // PAGE_TOKENS) * PAGE_TOKENS


def kv_dtype(model: Model, device: Device) -> str:
    """fp32 on a CPU; on a GPU the dtype of the activations, which is bf16 for fp8 weights."""
    if device.kind == "cpu":
        return "fp32"
    return "fp16" if model.weight_dtype == "fp16" else "bf16"


def stretch_rope(model: Model, context_tokens: int) -> Model:
    """The model with RoPE scaling that reaches the context; unchanged where its own does.

    The kind that the checkpoint has is kept with a larger factor; none becomes yarn.
    """
    if context_tokens <= model.context_limit:
        return model
    old = model.rope.scaling
    if old is None:
        scaling = RopeScaling(
            kind="yarn",
            factor=context_tokens / model.context_limit,
            original_context_tokens=model.context_limit,
            assumed=True,
        )
    else:
        factor = max(context_tokens / old.original_context_tokens, old.factor)
        scaling = structs.replace(old, factor=factor, assumed=True)
    return structs.replace(model, rope=structs.replace(model.rope, scaling=scaling))


def slo_classes(workload: Workload) -> tuple[RequestClass, ...]:
    """Classes that --ttft-slo speaks of: those of short prompts, or all where none is short.

    Long prompts keep their relative deadline, multiplier x solo prefill: no fixed number of seconds
    suits 64k and 1m tokens alike.
    """
    long_tokens = Scheduler().long_tokens
    short = [each for each in workload.classes if slo_prompt(each) < long_tokens]
    return tuple(short or workload.classes)


def slo_prompt(each: RequestClass) -> int:
    """Prompt for which the TTFT target of a class is judged."""
    return length_at(each.input_tokens, TTFT_QUANTILE)


def asked_dtypes(asked: str | None) -> tuple[str, ...]:
    """Dtypes that a flag lets the search choose from; none means the dtype as it is."""
    if asked is None:
        return ()
    return ("bf16", "fp8") if asked == "auto" else (asked,)

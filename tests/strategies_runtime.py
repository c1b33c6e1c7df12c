"""Hypothesis strategies for the runtime: plans small enough to be crowded, and requests."""

from typing import Any

import msgspec
from hypothesis import strategies as st
from strategies import make_plan, tiny_step_time

from plans.mesh import Parallelism
from plans.plan import Plan, Scheduler
from plans.steptime import Knot
from runtime.request import Request
from runtime.scheduler import ENGINES, POLICIES


def sim_plan(
    *, spp: int = 1, kvp: int = 1, spare_pages: int = 64, sequences: int = 16, **changes: object
) -> Plan:
    plan = make_plan(
        parallelism=Parallelism(spp=spp, kvp=kvp),
        # as much host time over all stages as one stage has, so that decodes leave room for chunks
        step_time=tiny_step_time(
            overhead_s=0.001 / spp, hop_latency_s=1e-5, merge_latency_s=1e-5, margin=0.1
        ),
        spare_pages=spare_pages,
        **changes,
    )
    limits = msgspec.structs.replace(plan.limits, sequences=sequences)
    return msgspec.structs.replace(plan, limits=limits)


QUANTUM_S = 2.0**-10
"""Seconds of a token on a linear plan: a binary fraction, so that sums of it are exact."""


def linear_plan(
    *, spp: int = 1, kvp: int = 1, spare_pages: int = 640, sequences: int = 1024, **changes: Any
) -> Plan:
    """Steps take QUANTUM_S a token, whatever it is; `changes` are of the scheduler."""
    layer_s = QUANTUM_S / 4  # four layers
    knots = (Knot(at=1, seconds=layer_s), Knot(at=2, seconds=2 * layer_s))
    free = dict.fromkeys(("overhead_s", "pair_s", "key_s", "decode_key_s", "decode_sequence_s"), 0)
    time = tiny_step_time(matmul=knots, head=(), margin=0.0, **free)
    plan = make_plan(
        parallelism=Parallelism(spp=spp, kvp=kvp),
        step_time=time,
        rows=((1024, 512),),
        spare_pages=spare_pages,
    )
    scheduler = {
        "step_budget_s": 64 * QUANTUM_S,
        "idle_budget_s": 128 * QUANTUM_S,
        "long_tokens": 256,
        "min_chunk_tokens": 4,
        "max_step_tokens": 1024,
    }
    return msgspec.structs.replace(
        plan,
        limits=msgspec.structs.replace(plan.limits, sequences=sequences),
        scheduler=Scheduler(**(scheduler | changes)),
    )


@st.composite
def requests(draw: st.DrawFn, *, context: int = 1024, most: int = 12) -> list[Request]:
    arrivals = sorted(draw(st.lists(st.floats(0, 0.2), min_size=1, max_size=most)))
    found = []
    for number, arrival_s in enumerate(arrivals):
        prompt = draw(st.one_of(st.integers(1, 40), st.integers(1, context - 1)))
        found.append(
            Request(
                number=number,
                arrival_s=arrival_s,
                prompt_tokens=prompt,
                max_tokens=draw(st.integers(1, min(60, context - prompt))),
                ttft_target_s=draw(st.none() | st.floats(0.001, 1)),
                tbt_target_s=draw(st.none() | st.floats(0.001, 0.2)),
            )
        )
    return found


@st.composite
def sim_plans(draw: st.DrawFn) -> Plan:
    return sim_plan(
        spp=draw(st.integers(1, 4)),
        kvp=draw(st.sampled_from([1, 1, 2, 3, 4])),
        spare_pages=draw(st.sampled_from([0, 1, 3, 64])),
        sequences=draw(st.sampled_from([1, 2, 5, 16])),
    )


SPECS = st.sampled_from(
    [
        *POLICIES,
        *ENGINES,
        "fcfs,chunk=40",
        "fcfs@vllm,ahead,chunk=50",
        "hrrn@sglang,chunk=7",
        "hrrn@sglang,chunk=60,mixed",
        "lars,chunk=7",
        "srpt,aging=0.5",
        "threshold,threshold=20",
        "threshold@vllm,adaptive,always,chunk=90,threshold=20",
        "turns@lmdeploy,chunk=40",
    ]
)

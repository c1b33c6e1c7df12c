"""What the paper's scheduling experiments are made of: the plan, the mixes, the policies, the grid.

Source: arXiv 2409.17264v5, section 6.2: Llama-3 8B on two DGX A100 (16 x 80 GB) at TP8 x SPP2,
Poisson arrivals at 0.25 to 1.75 requests/s for 60 minutes, mixes of 0, 1 and 5 % long prompts. The
paper does not state its step budget, yield cap, bound between short and long, nor its deadlines:
those of the plan are ours (step 30 ms, 100 ms while nothing decodes; yield 0.4; long from 65,536
tokens on; deadline max(1.5 x lone prefill, 0.5 s), the rule of the authors' public code).
"""

from pathlib import Path

from planner.assemble import to_plan
from planner.catalog import load_device, load_model, load_workload, topology_for
from planner.search import price
from planner.space import Candidate, cut_layers
from planner.world import make_world
from plans.check import check_plan
from plans.mesh import Parallelism
from plans.plan import MadeBy, Plan

MODEL, HARDWARE, GPUS, WORKLOAD = "llama3-8b", "a100", 16, "paper-mix-5"
TP, SPP = 8, 2
MIXES = (0, 1, 5)
"""Per cent of long prompts."""
RATES = (0.25, 0.75, 1.25, 1.75)
"""Requests a second."""
WINDOW_S = 3600.0
"""Arrivals of one run."""

PUBLISHED = ("lars-paper", "lrs", "slack", "slack-remaining", "edf", "srpt")
OURS = ("lars-lanes", "lars")
STATIC = ("fcfs", "fcfs-whole", "fcfs,chunk=512", "fcfs,chunk=2048")
PEERS = ("hrrn", "threshold", "turns")
ENGINES = ("fcfs@vllm", "threshold@vllm", "hrrn@sglang", "hrrn@sglang,mixed", "turns@lmdeploy")
POLICIES = (*OURS, *PUBLISHED, *STATIC, *PEERS, *ENGINES)


def paper_plan() -> Plan:
    """The planner's plan with its degrees fixed: one replica at TP8 x SPP2, no KVP."""
    world = make_world(
        model=load_model(MODEL),
        device=load_device(HARDWARE),
        topology=topology_for(load_device(HARDWARE), GPUS, None),
        workload=load_workload(WORKLOAD),
    )
    candidate = Candidate(
        parallelism=Parallelism(tp=TP, spp=SPP, kvp=1, replicas=1, idle=0),
        stages=cut_layers(world.model.layers, SPP),
    )
    plan = to_plan(
        world,
        price(world, candidate),
        name=f"{MODEL}-{GPUS}x{HARDWARE}-tp{TP}-spp{SPP}",
        made_by=MadeBy(medha="bench", effort="quick", seed=0, command="python -m bench.paper plan"),
        notes=world.notes,
    )
    check_plan(plan, where="bench/paper_setup.py")
    return plan


def mix_file(traces: Path, mix: int) -> Path:
    """The authors' public lengths of a mix; arrivals are ours."""
    return traces / f"medha_mix_{mix}pct_long.csv"

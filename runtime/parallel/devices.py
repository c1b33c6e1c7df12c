"""Whether the GPUs of this machine are the ones that a plan was made for.

A plan's times, chunk sizes, page pool and tuned kernels are of one device. On another one the
program still runs, and what the plan promises does not hold: that is said before weights load.
"""

import re
from collections.abc import Sequence

import torch

from plans.plan import Plan


def other_devices(planned: str, here: Sequence[str]) -> list[str]:
    """Those of the devices here, as torch names them, that are not of the planned kind.

    planned  a name of the planner's catalog, whose first word is the product's: h100-sxm-80gb
    """
    product = planned.split("-", maxsplit=1)[0].lower()
    return [name for name in here if product not in re.split(r"[^a-z0-9]+", name.lower())]


def warning(plan: Plan) -> str:
    """What to say where GPUs here are of another kind; empty where nothing is, or for CPUs."""
    planned = plan.topology.device
    if planned.startswith("cpu"):
        return ""

    here = [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())]
    if not (other := other_devices(planned, here)):
        return ""
    return (
        f"warning: the plan is for {planned}, and here is {', '.join(sorted(set(other)))}: its "
        "predicted times, chunk sizes and tuned kernels are those of the planned device; "
        "nearest: medha-plan --hardware with the device that is here"
    )

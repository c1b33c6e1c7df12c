"""The device that tuning and profiling run on, in the words that their records carry."""

import subprocess
from dataclasses import dataclass

import torch
import triton

from codegen.problems import Where


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The first CUDA device, and what drives it."""

    name: str
    """As torch names it."""
    memory_bytes: int
    compute_capability: str
    driver: str
    torch: str
    triton: str
    devices: int
    """All that are visible here."""


def machine() -> Machine | None:
    """This machine's device, or None where no CUDA device is visible."""
    if not torch.cuda.is_available():
        return None
    return Machine(
        name=torch.cuda.get_device_name(0),
        memory_bytes=torch.cuda.get_device_properties(0).total_memory,
        compute_capability=".".join(map(str, torch.cuda.get_device_capability(0))),
        driver=_driver(),
        torch=str(torch.__version__),
        triton=str(triton.__version__),
        devices=torch.cuda.device_count(),
    )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603 - fixed words
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return text.split("\n")[0].strip()


def first_device() -> Where:
    """Problems on the first CUDA device, bf16, data not in L2."""
    return Where(device=torch.device("cuda", 0))

"""What the cases of sanitize.py are made of: data from the host, errors as shares of tolerances."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from codegen.kernels import load_spec

GOOD = 6e-3
"""|found - reference| / |reference| of attention: as in attention_check.py."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One process under a tool."""

    kernels: tuple[str, ...]
    """What it launches, `folder/file:function`."""
    run: Callable[[torch.device], float]
    """Its error as a share of what is allowed: good up to 1, NaN is not."""
    hopper: bool = False
    """Gluon kernels, which no interpreter runs."""


def normal(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """On the host; bf16 values that fp16 holds too."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).bfloat16()


def typed(device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """On the device, in bf16; in fp16 in the interpreter, which has no products of bf16."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    return [each.to(dtype).to(device) for each in tensors]


def share(op: str, found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error as a share of the op's tolerance."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[found.dtype]
    wide = expected.cpu().double()
    apart = (found.cpu().double() - wide).abs() / wide.abs().clamp_min(1)
    return float(apart.max()) / load_spec(op).tolerance[name]


def worst(*shares: float) -> float:
    """The largest; NaN if any is."""
    return max(shares, key=lambda each: math.inf if math.isnan(each) else each)


def on_host(tensors: Sequence[Any]) -> list[Any]:
    """Copies for a reference."""
    return [each.cpu() if isinstance(each, torch.Tensor) else each for each in tensors]

"""A rank of tests/codegen/test_all_reduce_kernel.py that is a process: it imports what it runs."""

import random
import time
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from codegen.kernels.all_reduce_add_rms_norm.triton import one_shot
from runtime.parallel.peers import addressed

SLOTS = 6
EPS = 1e-5
LAUNCHES = 40
DELAYS_S = (0.0, 0.0, 0.0, 0.001, 0.004)
WIDTH = 40


def summed(shares: list[Tensor], residual: Tensor) -> Tensor:
    """The definition: fp32 in the order of the ranks, one rounding, and that of the sum."""
    total = torch.zeros(shares[0].shape)
    for each in shares:
        total = total + each.float()
    return (total.to(residual.dtype).float() + residual.float()).to(residual.dtype)


def launch_inputs(number: int, ranks: int) -> tuple[list[Tensor], Tensor]:
    """Shares of all ranks and residual of a launch; as many tokens as all draw alike.

    Rows follow each other in the interpreter, so that a rank gets ahead where there is one.
    """
    tokens = random.Random(number).choice((1, 1, 1, 2, SLOTS))
    generator = torch.Generator().manual_seed(number)
    shares = torch.randn((ranks, tokens, WIDTH), generator=generator)
    return list(shares), torch.randn((tokens, WIDTH), generator=generator)


def run_rank(rank: int, memory: list[Tensor], wrong: Any) -> None:
    """Launches with delays of its own, and says which sums were not those of the definition."""
    torch.set_num_threads(1)
    peers = addressed(
        [each.data_ptr() for each in memory],
        rank=rank,
        slots=SLOTS,
        slot_bytes=4 * WIDTH,
        device=torch.device("cpu"),
    )
    delays = random.Random(rank)
    weight = torch.ones(WIDTH)
    # a program is slow between its share and its flag, and between the peers' flags and shares
    InterpreterBuilder.create_barrier = lambda self: time.sleep(delays.choice(DELAYS_S))
    for number in range(LAUNCHES):
        shares, residual = launch_inputs(number, len(memory))
        time.sleep(delays.choice(DELAYS_S))
        _, total = one_shot(shares[rank], residual, weight, EPS, peers)
        if not torch.equal(total, summed(shares, residual)):
            wrong.put((rank, number))
    wrong.put(None)

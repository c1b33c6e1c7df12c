"""Draws a token for each row of logits, which are read once.

The first kernel streams the logits and keeps the best of each 64 tokens, and their sum of
exponentials where no top-k bounds what can be drawn. The second has a row a program: no token among
the k best lies outside the groups whose best is among the k best of all groups, so it reads those
again, collects their tokens above that bound in order, and searches thresholds among them: the k-th
best logit, then the logit at which the nucleus ends, each by three bits of its pattern at a time.
The draw is a running sum over what is left, in the order of tokens and in double precision, as the
reference has it.

Where the collected tokens do not hold the whole nucleus, or are too many because they tie, the same
steps run over the whole row: slow, and exact. Results differ from the reference only where a
probability lies within double precision of a threshold or of the number that picks.
"""

import torch
import triton

from .tiles import GROUP, LIST, group_best_kernel, pick_kernel

GROUPS = 32
"""Groups of 64 tokens that a program of the first kernel reads."""
CANDIDATES = 64
"""Best groups that are collected where no top-k says how many."""


def sample(logits_RV: torch.Tensor, controls_R5: torch.Tensor) -> torch.Tensor:
    """int64 [2, R]: tokens, and 1 where the row's best logit is finite."""
    if logits_RV.stride(-1) != 1:
        logits_RV = logits_RV.contiguous()
    rows, vocab = logits_RV.shape
    device = logits_RV.device
    groups = triton.cdiv(vocab, GROUP.value)
    every = triton.next_power_of_2(groups)
    drawn_2R = torch.empty((2, rows), dtype=torch.int64, device=device)
    keys = torch.empty((rows, groups), dtype=torch.int64, device=device)
    sums = torch.empty((rows, groups), dtype=torch.float64, device=device)
    chosen = torch.empty((rows, groups), dtype=torch.int32, device=device)
    found = torch.empty((rows, LIST.value), dtype=torch.int32, device=device)
    for first in range(0, rows, 65535):  # the second dimension of a grid ends there
        count = min(rows - first, 65535)
        group_best_kernel[(triton.cdiv(groups, GROUPS), count)](
            logits_RV[first:],
            controls_R5[first:],
            keys[first:],
            sums[first:],
            logits_RV.stride(0),
            vocab,
            groups,
            GROUPS=GROUPS,
            num_warps=4,
        )
    if rows:
        pick_kernel[(rows,)](
            logits_RV,
            controls_R5,
            keys,
            sums,
            chosen,
            found,
            drawn_2R,
            logits_RV.stride(0),
            rows,
            vocab,
            groups,
            CANDIDATES=CANDIDATES,
            ALL=every,
            num_warps=8 if every <= 2048 else 16,
        )
    return drawn_2R

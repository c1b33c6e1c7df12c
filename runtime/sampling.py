"""Draws tokens from logits: greedy, or by temperature, top-k, top-p and min-p, in this order.

1. logits are divided by the temperature; 0 means argmax (of equal logits the lowest token)
2. top-k: every token below the k-th best logit goes; ties with the k-th stay
3. top-p: of what is left, best first (ties: lowest token first), a token stays while the
   probability before it is below top_p, so at least one does
4. min-p: of what is left, tokens less likely than min_p x the most likely one go

This is the order of Hugging Face generate; vLLM applies min-p before top-k, which only matters
where top-p is set too. One number in [0, 1) for each (seed, position) then picks by inverse CDF
over what is left. So a draw depends on the request's seed, how many tokens it has generated and its
logits alone: not on its batch, the step, a preemption, the layout or the device. A program of our
kernels has a sampler of its own, which draws the same: also in double precision, but adding up in
another order, so it may decide otherwise where a threshold, or the number that picks, lies within
V x 2^-52 of where two tokens meet: 2^-35 for 128K tokens, which have 2^17 such places. The CDF runs
in token order, not best first: logits that differ in their last bits (another layout) then move its
edges by as little, where a swap of two near-equal tokens would move whole intervals.

Letters: R rows, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from plans.errors import MedhaError
from runtime.parallel.transfers import Array, to_device
from runtime.sampling_params import SamplingParams

ROWS_AT_ONCE = 32
"""Rows that are drawn together: each holds the vocabulary several times in fp64."""


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) of a request's random stream at a position: 53 bits of a hash."""
    key = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    bits = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return (bits >> 11) * 2.0**-53


def probabilities(logits_RV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """What is drawn from: float64 [R, V], each row summing to 1, 0 for tokens filtered out.

    Rows that are greedy hold 1 at their best token. Filters that no row has cost nothing.
    """
    vocab = logits_RV.shape[-1]
    counts = [min(each.top_k or vocab, vocab) for each in params]
    table = np.array(
        [
            (each.temperature or 1.0, count - 1, each.top_p, each.min_p, each.greedy)
            for each, count in zip(params, counts, strict=True)
        ],
        dtype=np.float64,
    )
    columns = to_device([table], logits_RV.device)[0]
    temperature_R1, last_R1, top_p_R1, min_p_R1, greedy_R1 = columns.T[..., None]
    # the best logit becomes 0 first, so that no temperature can bring it to infinity
    logits_RV = logits_RV.double() - logits_RV.double().amax(dim=-1, keepdim=True)
    scaled_RV = logits_RV / temperature_R1
    if min(counts) < vocab:
        scaled_RV = _top_k(scaled_RV, last_R1, max(each for each in counts if each < vocab))
    chance_RV = scaled_RV.softmax(dim=-1)
    nucleus = [row for row, each in enumerate(params) if each.top_p < 1]
    if nucleus:
        rows = to_device([np.array(nucleus, dtype=np.int64)], logits_RV.device)[0]
        chance_RV = chance_RV.index_copy(0, rows, _top_p(scaled_RV[rows], top_p_R1[rows]))
    if any(each.min_p for each in params):
        chance_RV = chance_RV * (chance_RV >= min_p_R1 * chance_RV.amax(dim=-1, keepdim=True))
    if any(each.greedy for each in params):
        best_RV = torch.zeros_like(chance_RV).scatter(-1, logits_RV.argmax(-1, keepdim=True), 1.0)
        chance_RV = torch.where(greedy_R1 > 0, best_RV, chance_RV)
    total_R1: Tensor = chance_RV.sum(dim=-1, keepdim=True)
    normal_RV: Tensor = chance_RV / total_R1
    return normal_RV


def _top_k(scaled_RV: Tensor, last_R1: Tensor, most: int) -> Tensor:
    """Without what is below the k-th best; last_R1 is k - 1, at most `most` - 1 or the last one."""
    top_RK = scaled_RV.topk(most, dim=-1).values
    edge_R1 = top_RK.gather(-1, last_R1.long().clamp_max(most - 1))
    beyond_R1 = last_R1 >= most  # no limit: k is the vocabulary
    return scaled_RV.masked_fill((scaled_RV < edge_R1) & ~beyond_R1, -torch.inf)


def _top_p(scaled_RV: Tensor, top_p_R1: Tensor) -> Tensor:
    """Probabilities of the nucleus, the rest 0; not normalised again."""
    sorted_RV, order_RV = scaled_RV.sort(dim=-1, descending=True, stable=True)
    chance_RV = sorted_RV.softmax(dim=-1)
    keep_RV = chance_RV.cumsum(dim=-1) - chance_RV < top_p_R1
    keep_RV[:, 0] = True  # the best token, whatever rounding does to the sums
    return torch.zeros_like(scaled_RV).scatter(-1, order_RV, chance_RV * keep_RV)


def _inverse_cdf(logits_RV: Tensor, params: Sequence[SamplingParams], at_R1: Tensor) -> Tensor:
    chance_RV = probabilities(logits_RV, params)
    reached_RV = chance_RV.cumsum(dim=-1)
    token_R1 = torch.searchsorted(reached_RV, at_R1 * reached_RV[:, -1:], right=True)
    tokens_V = torch.arange(logits_RV.shape[-1], device=logits_RV.device)
    last_R1 = (tokens_V * (chance_RV > 0)).amax(dim=-1, keepdim=True)
    return torch.minimum(token_R1, last_R1).squeeze(-1)


def controls(params: Sequence[SamplingParams], positions: Sequence[int]) -> Array:
    """What a sampler is told of each row, float64 [R, 5]: temperature (0: the best token), top_k
    (0: all), top_p, min_p and the number in [0, 1) that picks."""
    rows = [
        (
            each.temperature,
            each.top_k,
            each.top_p,
            each.min_p,
            0.0 if each.greedy else uniform(each.seed, position),
        )
        for each, position in zip(params, positions, strict=True)
    ]
    return np.array(rows, dtype=np.float64).reshape(len(rows), 5)


def draw_greedy(logits_RV: Tensor) -> Tensor:
    """As `draw`, for rows that are all greedy: fit to be recorded in a CUDA graph."""
    best_R = logits_RV.argmax(dim=-1)  # of equal ones the first; NaN wins
    finite_R = logits_RV.gather(-1, best_R[:, None]).squeeze(-1).isfinite()
    return torch.stack((best_R, finite_R.long()))


def draw(
    logits_RV: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """One token for each row, on the device, which the host does not wait for.

    logits_RV  any float dtype; used in at least fp32
    positions  tokens that each row's request has generated so far
    sampler    the program's (runtime/program.py), for all rows; None draws here
    result     int64 [2, R]: tokens, and 1 where the row's best logit is finite (`checked`)
    """
    logits_RV = logits_RV.float()
    if sampler is not None:
        return sampler(logits_RV, to_device([controls(params, positions)], logits_RV.device)[0])
    drawn_2R = draw_greedy(logits_RV)
    random = [row for row, each in enumerate(params) if not each.greedy]
    for first in range(0, len(random), ROWS_AT_ONCE):
        chosen = random[first : first + ROWS_AT_ONCE]
        at = np.array([[uniform(params[row].seed, positions[row])] for row in chosen])
        rows, at_R1 = to_device([np.array(chosen, dtype=np.int64), at], logits_RV.device)
        token_R = _inverse_cdf(logits_RV[rows], [params[row] for row in chosen], at_R1)
        drawn_2R[0] = drawn_2R[0].index_copy(0, rows, token_R)
    return drawn_2R


def checked(drawn_2R: Tensor) -> list[int]:
    """The tokens of a draw; waits for the device if it has to.

    Raises MedhaError where a row holds NaN or its best logit is infinite.
    """
    tokens, finite = drawn_2R.tolist()
    if not all(finite):
        raise MedhaError(
            f"logits of row {finite.index(0)} are not finite: weights or dtype overflow; "
            "check the checkpoint, or plan with weight dtype bf16 or fp32"
        )
    return list(tokens)


def sample(
    logits_RV: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[int]:
    """`draw` and `checked` in one."""
    return checked(draw(logits_RV, params, positions))

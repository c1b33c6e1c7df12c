"""Draws tokens from logits: greedy, or by temperature, top-k, top-p and min-p, in this order.

1. logits are divided by the temperature; 0 means argmax (of equal logits the lowest token)
2. top-k: every token below the k-th best logit goes; ties with the k-th stay
3. top-p: of what is left, best first (ties: lowest token first), a token stays while the
   probability before it is below top_p, so at least one does
4. min-p: of what is left, tokens less likely than min_p x the most likely one go

This is the order of Hugging Face generate; vLLM applies min-p before top-k, which only matters
where top-p is set too. One number in [0, 1) for each (seed, position) then picks by inverse CDF
over what is left. So a draw depends on the request's seed, how many tokens it has generated and its
logits alone: not on its batch, the step, a preemption, the layout or the device. The CDF runs in
token order, not best first: logits that differ in their last bits (another layout) then move its
edges by as little, where a swap of two near-equal tokens would move whole intervals.

Letters: R rows, V vocabulary.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from plans.errors import MedhaError
from runtime.sampling_params import SamplingParams


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) of a request's random stream at a position: 53 bits of a hash."""
    key = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    bits = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return (bits >> 11) * 2.0**-53


def probabilities(logits_RV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """What is drawn from: float64 [R, V], each row summing to 1, 0 for tokens filtered out.

    Rows that are greedy hold 1 at their best token.
    """
    device = logits_RV.device

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

    vocab = logits_RV.shape[-1]
    # the best logit becomes 0 first, so that no temperature can bring it to infinity
    logits_RV = logits_RV.double() - logits_RV.double().amax(dim=-1, keepdim=True)
    scaled_RV = logits_RV / column([each.temperature or 1.0 for each in params])
    sorted_RV, order_RV = scaled_RV.sort(dim=-1, descending=True, stable=True)
    counts = [1 if each.greedy else min(each.top_k or vocab, vocab) for each in params]
    last_R1 = torch.tensor(counts, device=device)[:, None] - 1
    sorted_RV = sorted_RV.masked_fill(sorted_RV < sorted_RV.gather(-1, last_R1), -torch.inf)
    chance_RV = sorted_RV.softmax(dim=-1)
    before_RV = chance_RV.cumsum(dim=-1) - chance_RV
    # top_p 1 keeps all: rounding may bring the sum before a very unlikely token to 1
    most_R1 = column([2.0 if each.top_p == 1 else each.top_p for each in params])
    keep_RV = before_RV < most_R1
    keep_RV &= chance_RV >= column([each.min_p for each in params]) * chance_RV[:, :1]
    rank_V = torch.arange(vocab, device=device)
    greedy_R1 = torch.tensor([each.greedy for each in params], device=device)[:, None]
    keep_RV &= ~greedy_R1 | (rank_V == 0)
    keep_RV[:, 0] = True  # the best token, whatever rounding does to the sums
    chance_RV = torch.zeros_like(scaled_RV).scatter(-1, order_RV, chance_RV * keep_RV)
    return chance_RV / chance_RV.sum(dim=-1, keepdim=True)


def _draw(logits_RV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    chance_RV = probabilities(logits_RV, params)
    reached_RV = chance_RV.cumsum(dim=-1)
    at_R1 = torch.tensor(uniforms, dtype=torch.float64, device=logits_RV.device)[:, None]
    token_R1 = torch.searchsorted(reached_RV, at_R1 * reached_RV[:, -1:], right=True)
    tokens_V = torch.arange(logits_RV.shape[-1], device=logits_RV.device)
    last_R1 = torch.where(chance_RV > 0, tokens_V, 0).amax(dim=-1, keepdim=True)
    return torch.minimum(token_R1, last_R1).squeeze(-1)


def sample(
    logits_RV: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[int]:
    """One token for each row.

    logits_RV  any float dtype; used in at least fp32
    positions  tokens that each row's request has generated so far
    errors     MedhaError where a row holds NaN or its best logit is infinite
    """
    logits_RV = logits_RV.float()
    best_R, token_R = logits_RV.max(dim=-1)  # NaN wins a maximum, so this finds it
    first_R = logits_RV.argmax(dim=-1)  # max does not say which of equal logits it names
    drawn = [row for row, each in enumerate(params) if not each.greedy]
    token_R = first_R
    if drawn:
        rows = torch.tensor(drawn, device=logits_RV.device)
        uniforms = [uniform(params[row].seed, positions[row]) for row in drawn]
        drawn_R = _draw(logits_RV[rows], [params[row] for row in drawn], uniforms)
        token_R = token_R.index_copy(0, rows, drawn_R)
    finite, tokens = best_R.isfinite().tolist(), token_R.tolist()
    if not all(finite):
        raise MedhaError(
            f"logits of row {finite.index(False)} are not finite: weights or dtype overflow; "
            "check the checkpoint, or plan with weight dtype bf16 or fp32"
        )
    return list(tokens)

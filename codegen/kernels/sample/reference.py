"""A token for each row of logits: greedy, or by temperature, top-k, top-p and min-p, in this order.

The runtime draws by the same rules (runtime/sampling.py, which says why they are these); a row of
`controls` holds temperature (0: the best token), top_k (0: all), top_p, min_p and the number in
[0, 1) that picks. Everything is double precision.

R rows, V vocabulary.
"""

import torch


def sample(logits_RV: torch.Tensor, controls_R5: torch.Tensor) -> torch.Tensor:
    """int64 [2, R]: tokens, and 1 where the row's best logit is finite."""
    best_R = logits_RV.argmax(dim=-1)  # of equal ones the first; NaN wins
    finite_R = logits_RV.gather(-1, best_R[:, None]).squeeze(-1).isfinite()
    temperature_R1, top_k_R1, top_p_R1, min_p_R1, at_R1 = controls_R5.double().T[..., None]
    vocab = logits_RV.shape[-1]
    wide_RV = logits_RV.double()
    scaled_RV = wide_RV - wide_RV.amax(dim=-1, keepdim=True)
    scaled_RV /= torch.where(temperature_R1 > 0, temperature_R1, 1)
    sorted_RV, order_RV = scaled_RV.sort(dim=-1, descending=True, stable=True)
    last_R1 = torch.where(top_k_R1 > 0, top_k_R1, vocab).clamp(1, vocab).long() - 1
    beyond_RV = sorted_RV < sorted_RV.gather(-1, last_R1)  # ties with the k-th stay
    chance_RV = sorted_RV.masked_fill(beyond_RV, -torch.inf).softmax(dim=-1)
    keep_RV = (chance_RV.cumsum(dim=-1) - chance_RV < top_p_R1) | (top_p_R1 >= 1)
    keep_RV[:, 0] = True
    chance_RV = chance_RV * keep_RV
    chance_RV = chance_RV * (chance_RV >= min_p_R1 * chance_RV[:, :1])
    chance_RV = torch.zeros_like(chance_RV).scatter(-1, order_RV, chance_RV)
    reached_RV = chance_RV.cumsum(dim=-1)  # in the order of tokens, as the runtime has it
    token_R1 = torch.searchsorted(reached_RV, at_R1 * reached_RV[:, -1:], right=True)
    places_V = torch.arange(vocab, device=logits_RV.device)
    last_R1 = (places_V * (chance_RV > 0)).amax(dim=-1, keepdim=True)
    token_R = torch.minimum(token_R1, last_R1).squeeze(-1)
    token_R = torch.where(temperature_R1.squeeze(-1) > 0, token_R, best_R)
    return torch.stack((token_R, finite_R.long()))

"""Fixed turns, as LMDeploy's PyTorch engine takes them: three for short prompts, one for a long.

Long here means more than 8,192 tokens to do, so the last piece of a long prompt counts as short.
Shorts go by fewest tokens. One long is active until it has become short; the next is the one with
the fewest chunks, of which every two seconds of waiting take one off.
"""

import numpy as np

from runtime.scheduler.policy import Prefills, Ranked, plain

LONG_TOKENS = 8192
"""LMDeploy's max_prefill_token_num: what one prefill step holds."""
SHORT_TURNS = 3
CREDIT_S = 2.0
CHUNKS = 1 << 20
"""More chunks than any prompt has: the second place of a two-place key."""
FAR = 1e15
"""Beyond every key of a class; keys below 2**53 stay exact."""


class Turns:
    """Shorts first, but on each fourth step the long one."""

    def __init__(self, long_tokens: int = LONG_TOKENS) -> None:
        """Prompts with more tokens than this to do are long."""
        self._long_tokens = long_tokens

    def rank(self, waiting: Prefills, *, now_s: float) -> Ranked:
        """Fewest tokens among shorts, most credit among longs, classes by the turn of the step."""
        tokens = waiting.missing_tokens
        long = tokens > self._long_tokens
        chunks = -(-tokens // self._long_tokens)
        credit = np.floor((now_s - waiting.arrival_s) / CREDIT_S)
        longs = np.where(waiting.started, -FAR, (chunks - credit) * CHUNKS + chunks)
        ahead = waiting.step % (SHORT_TURNS + 1) == SHORT_TURNS
        return plain(np.where(long, longs + (-4 if ahead else 4) * FAR, tokens))

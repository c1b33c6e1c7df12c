"""Where an entry of an exchange between kvp groups lies: the packing and the merge agree on it.

An entry is a shared token for one peer; the bytes are those of reference.py.
"""

import triton
import triton.language as tl


def aligned(heads: int, head_dim: int) -> bool:
    """Whether the outputs of every peer begin at a multiple of 16 bytes."""
    return heads % 4 == 0 and head_dim % 8 == 0


@triton.jit
def entry_of(
    places_ptr,
    entries,
    at,
    heads,
    HEAD: tl.constexpr,
    SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Offsets of entry `at`: of its outputs in elements of SIZE bytes, of its log sums in fp32."""
    before = tl.load(places_ptr + at).to(tl.int64)
    count = tl.load(places_ptr + entries + at).to(tl.int64)
    inside = tl.load(places_ptr + 2 * entries + at).to(tl.int64)
    start = before * heads * (HEAD * SIZE + 4)
    out_at = start // SIZE + inside * heads * HEAD
    lse_at = (start + count * heads * HEAD * SIZE) // 4 + inside * heads
    if ALIGNED:
        out_at = tl.multiple_of(out_at, 16 // SIZE)
    return out_at, lse_at

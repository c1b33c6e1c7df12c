"""Norm, rotation and paged write of a whole projection in one pass: reads it once, one launch.

One token and some of its heads a program; queries go to their own tensor, keys and values straight
to their pages. Rounded once, at the end.
"""

import torch
import triton
import triton.language as tl

from codegen.kernels.linear.core import Heads


@triton.jit
def finish_heads_kernel(
    y_ptr,
    out_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_sin_ptr,
    k_pages_ptr,
    v_pages_ptr,
    slots_ptr,
    heads,
    kv_heads,
    eps,
    NORM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H2: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    head_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at_H2 = tl.arange(0, BLOCK_H2)
    whole_H2 = at_H2 < HALF
    there_N = head_N < heads + 2 * kv_heads
    query_N = head_N < heads
    turned_N = head_N < heads + kv_heads
    key_N = turned_N & (head_N >= heads)
    at = head_N[:, None] * (2 * HALF) + at_H2[None, :]
    y_ptr += token * ((heads + 2 * kv_heads) * (2 * HALF))
    inside = there_N[:, None] & whole_H2[None, :]
    a = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(y_ptr + HALF + at, mask=inside, other=0.0).to(tl.float32)
    slot = tl.load(slots_ptr + token)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)
        scale = tl.where(turned_N, scale, 1.0)[:, None]
        qa = tl.load(q_norm_ptr + at_H2, mask=whole_H2, other=0.0).to(tl.float32)[None, :]
        qb = tl.load(q_norm_ptr + HALF + at_H2, mask=whole_H2, other=0.0).to(tl.float32)[None, :]
        ka = tl.load(k_norm_ptr + at_H2, mask=whole_H2, other=0.0).to(tl.float32)[None, :]
        kb = tl.load(k_norm_ptr + HALF + at_H2, mask=whole_H2, other=0.0).to(tl.float32)[None, :]
        is_q, is_k = query_N[:, None], key_N[:, None]
        a *= scale * tl.where(is_q, qa, tl.where(is_k, ka, 1.0))
        b *= scale * tl.where(is_q, qb, tl.where(is_k, kb, 1.0))
    cos_sin_ptr += token * (2 * HALF) + at_H2
    cos = tl.load(cos_sin_ptr, mask=whole_H2, other=1.0)[None, :]
    sin = tl.load(cos_sin_ptr + HALF, mask=whole_H2, other=0.0)[None, :]
    first = a * cos - b * sin
    second = b * cos + a * sin
    out_ptr += token * (heads * (2 * HALF)) + at
    dtype = out_ptr.dtype.element_ty
    mask = query_N[:, None] & whole_H2[None, :]
    tl.store(out_ptr, first.to(dtype), mask=mask)
    tl.store(out_ptr + HALF, second.to(dtype), mask=mask)
    into = slot * (kv_heads * (2 * HALF)) + at - heads * (2 * HALF)
    pages = k_pages_ptr.dtype.element_ty
    mask = (key_N & (slot >= 0))[:, None] & whole_H2[None, :]
    tl.store(k_pages_ptr + into, first.to(pages), mask=mask)
    tl.store(k_pages_ptr + HALF + into, second.to(pages), mask=mask)
    into -= kv_heads * (2 * HALF)
    mask = (there_N & (head_N >= heads + kv_heads) & (slot >= 0))[:, None] & whole_H2[None, :]
    tl.store(v_pages_ptr + into, a.to(pages), mask=mask)
    tl.store(v_pages_ptr + HALF + into, b.to(pages), mask=mask)


def finish_heads(
    y_TO: torch.Tensor, q_TO: torch.Tensor, heads: Heads, *, heads_a_block: int
) -> None:
    """Fills q and the pages from a projection [T, (heads + 2 kv_heads) x head size]."""
    every = heads.heads + 2 * heads.kv_heads
    half = y_TO.shape[1] // every // 2
    norms = (q_TO, q_TO) if heads.q_norm_H is None else (heads.q_norm_H, heads.k_norm_H)
    tokens = y_TO.shape[0]
    block_n = min(heads_a_block, triton.next_power_of_2(every))
    block_h2 = triton.next_power_of_2(half)
    for first in range(0, tokens, 65535):  # the second dimension of a grid ends there
        count = min(tokens - first, 65535)
        finish_heads_kernel[(triton.cdiv(every, block_n), count)](
            y_TO[first:],
            q_TO[first:],
            *norms,
            heads.cos_sin_T2H2[first:],
            heads.k_pages,
            heads.v_pages,
            heads.slots_T[first:],
            heads.heads,
            heads.kv_heads,
            heads.eps,
            NORM=heads.q_norm_H is not None,
            HALF=half,
            BLOCK_N=block_n,
            BLOCK_H2=block_h2,
            num_warps=min(max(block_n * block_h2 // 256, 1), 8),
        )

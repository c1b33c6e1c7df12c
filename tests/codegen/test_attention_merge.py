"""The merge of a tile's pieces, beside the softmax over them in double precision."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels.paged_attention.tiles import merge_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_M, HEAD, UNTOUCHED = 16, 64, 9.0


@settings(max_examples=15)
@given(
    heads=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 3, 4, 8])),
    pieces=st.lists(st.sampled_from([1, 2, 5, 8, 17, 33]), min_size=1, max_size=3),
    one_row=st.booleans(),
    slots=st.sampled_from([1, 4, 8, 32]),
    seed=st.integers(0, 99),
)
def test_pieces_are_merged_by_their_share_of_the_softmax(heads, pieces, one_row, slots, seed):
    """Whatever rows a program takes; a piece without keys has no share, and one alone no merge."""
    kv_heads, group = heads
    generator = torch.Generator().manual_seed(seed)
    total = sum(pieces)
    partial = torch.randn(total, kv_heads, BLOCK_M, HEAD, generator=generator)
    lse = 4 * torch.randn(total, kv_heads, BLOCK_M, generator=generator)
    lse[torch.rand(lse.shape, generator=generator) < 0.2] = -torch.inf
    starts = [sum(pieces[:at]) for at in range(len(pieces))]
    rows = [[starts[at], count, at, at, at + 1] for at, count in enumerate(pieces)]
    merges = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
    out = torch.full((len(pieces), kv_heads, group, HEAD), UNTOUCHED, device=DEVICE)
    out_lse = torch.full(out.shape[:-1], UNTOUCHED, device=DEVICE)
    taken = 1 if one_row else 1 << (group - 1).bit_length()
    merge_kernel[(len(pieces), kv_heads * -(-group // taken))](
        partial.to(DEVICE), lse.to(DEVICE), merges, out, out_lse, 1, KV_HEADS=kv_heads,
        GROUP=group, HEAD=HEAD, BLOCK_M=BLOCK_M, ROWS=taken, SLOTS=slots, FIELDS=5, num_warps=1,
    )  # fmt: skip
    for at, (start, count) in enumerate(zip(starts, pieces, strict=True)):
        if count == 1:
            assert bool((out[at] == UNTOUCHED).all())
            continue
        parts_RKG = lse[start : start + count, :, :group].double() * 0.6931471805599453
        weight_RKG = parts_RKG.softmax(0).nan_to_num(0.0)  # no piece of it saw a key
        values_RKGH = partial[start : start + count, :, :group].double()
        expected = (values_RKGH * weight_RKG[..., None]).sum(0)
        # 33 terms of at most 5 in fp32, each weight off by two units in the last place
        torch.testing.assert_close(out[at].cpu().double(), expected, rtol=0, atol=36 * 5 * 2**-23)
        torch.testing.assert_close(
            out_lse[at].cpu().double(), parts_RKG.logsumexp(0), rtol=0, atol=2**-18
        )

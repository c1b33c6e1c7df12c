"""The merge of shards, and what a group runs and exchanges, against plain attention in float64."""

import math
import os
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import make_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from plans.mesh import Parallelism
from plans.plan import Plan
from runtime.executor.base import Chunk, Step
from runtime.parallel import merging
from runtime.parallel.inputs import pack, rows_of_group, sampled_rows
from runtime.parallel.kvp import (
    exchange_of,
    has_kernels,
    merge_shards,
    pack_partial,
    unpack_partial,
)
from runtime.parallel.table import Row, State, newest_shard, row_groups, step_groups
from runtime.sampling_params import SamplingParams

MERGE_TOLERANCE = 1e-6
"""Values below 1 in size; weights, sum and quotient round by 2^-24 each, over at most 8 shards:
8 x 3 x 2^-24 = 1.4e-6 at the very worst, and the errors of random signs stay below half of it."""
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kvp_plan(kvp: int) -> Plan:
    return make_plan(parallelism=Parallelism(kvp=kvp), rows=((64, 32), (256, 16)))


# --- the merge ----------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([1.0, 30.0, 300.0]),
)
def test_merged_shards_equal_attention_over_all_keys(sizes, seed, spread):
    """Logits spread so far that whole shards weigh nothing, and shards without a key."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sum(sizes), generator=generator, dtype=torch.float64) * spread
    values = torch.rand(sum(sizes), 4, generator=generator, dtype=torch.float64)
    outs, lses = [], []
    for start, end in pairwise([0, *np.cumsum(sizes).tolist()]):
        part = logits[start:end]
        empty = start == end
        outs.append(torch.zeros(4) if empty else part.softmax(0) @ values[start:end])
        lses.append(torch.tensor(-math.inf) if empty else part.logsumexp(0))
    out = torch.stack(outs).float()[:, None, None]
    lse = torch.stack(lses).float()[:, None, None]
    expected = logits.softmax(0) @ values if sum(sizes) else torch.zeros(4)
    # the log sums themselves are rounded to fp32: relative weights move by |lse| x 2^-24
    tolerance = MERGE_TOLERANCE + 2**-23 * float(logits.abs().max() if sum(sizes) else 0)
    found = merge_shards(out, lse)[0, 0]
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance)


def test_no_key_in_any_shard_gives_zero_and_no_nan():
    out = merge_shards(torch.zeros(3, 2, 1, 4), torch.full((3, 2, 1), -torch.inf))
    assert torch.equal(out, torch.zeros(2, 1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_partials_come_back_bit_by_bit(dtype):
    out = torch.randn(5, 3, 16).to(dtype)
    lse = torch.tensor([[0.1, -torch.inf, 7.0]]).expand(5, 3)
    packed = pack_partial(out, lse)
    assert packed.shape == (5, 3, 16 * out.element_size() + 4)
    found_out, found_lse = unpack_partial(packed, dtype)
    assert torch.equal(found_out, out)
    assert torch.equal(found_lse, lse)


# --- what a group runs --------------------------------------------------------------------------


def row_of(plan: Plan, *, prefix: int, tokens: int, home: int, samples: bool = True) -> Row:
    """A row whose shards hold distinct pages."""
    state = State(
        tokens=list(range(prefix + tokens)),
        prompt_tokens=prefix + tokens,
        sampling=SamplingParams(),
    )
    size, shard = plan.kv.page_tokens, plan.kv.tokens_per_kvp_shard
    for at in range((prefix + tokens - 1) // shard + 1):
        held = min(prefix + tokens - at * shard, shard)
        state.grow(at, tuple(range(10 * at + 3, 10 * at + 3 + -(-held // size))))
    return Row(number=0, state=state, prefix=prefix, tokens=tokens, home=home, samples=samples)


@st.composite
def kvp_rows(draw: st.DrawFn, most: int = 256) -> tuple[Plan, list[Row]]:
    kvp = draw(st.integers(1, 8))
    plan = kvp_plan(kvp)
    shard = plan.kv.tokens_per_kvp_shard
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        newest = draw(st.integers(0, kvp - 1))
        inside = draw(st.integers(0, shard - 1))
        tokens = draw(st.integers(1, min(shard - inside, most)))
        home = draw(st.integers(0, kvp - 1))
        rows.append(
            row_of(
                plan,
                prefix=newest * shard + inside,
                tokens=tokens,
                home=home,
                samples=draw(st.booleans()),
            )
        )
    return plan, rows


@given(kvp_rows())
def test_every_token_is_written_once_and_every_key_is_seen_once(case):
    """Over all groups, at the causal edge of any page offset."""
    plan, rows = case
    written = {id(row): [] for row in rows}
    seen = {id(row): 0 for row in rows}
    sampled: list[Row] = []
    for group in range(plan.parallelism.kvp):
        mine = rows_of_group(plan, rows, group)
        sampled += sampled_rows(plan, rows, group)
        if not mine:
            continue
        inputs = pack(plan, mine, group, CPU)
        starts = inputs.query_starts_B1.tolist()
        rows_sampled = []
        for at, row in enumerate(mine):
            span = slice(starts[at], starts[at + 1])
            assert inputs.token_ids_T[span].tolist() == list(
                range(row.prefix, row.prefix + row.tokens)
            )
            assert inputs.positions_T[span].tolist() == inputs.token_ids_T[span].tolist()
            seen[id(row)] += int(inputs.kv_lens_B[at])
            slots = inputs.slots_T[span].tolist()
            owns = slots[0] >= 0
            assert all((slot >= 0) == owns for slot in slots)
            assert owns == (row_groups(plan, row)[-1] == group)
            if owns:
                written[id(row)] += slots
                table = inputs.page_table_BP[at].tolist()
                shard_start = newest_shard(plan, row) * plan.kv.tokens_per_kvp_shard
                for slot, position in zip(slots, inputs.positions_T[span].tolist(), strict=True):
                    page, offset = divmod(position - shard_start, plan.kv.page_tokens)
                    assert slot == table[page] * plan.kv.page_tokens + offset
                if row.samples:
                    rows_sampled.append(starts[at + 1] - 1)
            else:
                assert int(inputs.kv_lens_B[at]) == plan.kv.tokens_per_kvp_shard
        assert inputs.sample_rows_R.tolist() == rows_sampled
    for row in rows:
        assert len(written[id(row)]) == row.tokens
        assert seen[id(row)] == row.prefix + row.tokens
    assert sorted(map(id, sampled)) == sorted(id(row) for row in rows if row.samples)


@given(kvp_rows())
def test_two_groups_list_the_same_tokens_for_each_other(case):
    """Sizes and order of every message agree at both ends without being told."""
    plan, rows = case
    groups = range(plan.parallelism.kvp)
    ranks = [100 + group for group in groups]
    sent: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for group in groups:
        mine = rows_of_group(plan, rows, group)
        exchange = exchange_of(plan, mine, group, ranks, CPU)
        alone = all(len(row_groups(plan, row)) == 1 for row in mine)
        assert (exchange is None) == alone, "a group that shares nothing waits for nobody"
        if exchange is None:
            continue
        owners = [(id(row), token) for row in mine for token in range(row.tokens)]
        for peer in exchange.peers:
            assert peer.rank == ranks[peer.group]
            common = exchange.rows_S[peer.shared_S].tolist()
            sent[group, peer.group] = [owners[token] for token in common]
    for (group, other), tokens in sent.items():
        assert sent[other, group] == tokens
        assert len(tokens) > 0


def test_groups_join_in_the_order_of_the_shards_and_not_by_number():
    plan = kvp_plan(4)
    row = row_of(plan, prefix=2 * plan.kv.tokens_per_kvp_shard, tokens=1, home=3)
    assert row_groups(plan, row) == [3, 0, 1]


@given(kvp_rows())
def test_a_step_waits_for_the_groups_of_its_rows_and_for_no_other(case):
    plan, rows = case
    step = Step(
        step_id=0,
        decodes=np.array([], dtype=np.int64),
        decode_prefix=np.array([], dtype=np.int64),
        decode_home=np.array([], dtype=np.int64),
        chunks=tuple(
            Chunk(request=at, tokens=row.tokens, prefix=row.prefix, home=row.home, samples=False)
            for at, row in enumerate(rows)
        ),
    )
    expected = {group for row in rows for group in row_groups(plan, row)}
    assert step_groups(plan, step) == expected
    working = {group for group in range(plan.parallelism.kvp) if rows_of_group(plan, rows, group)}
    assert working == expected


def _swapped(sent: dict[int, torch.Tensor], exchanges: dict, token_bytes: int):
    """What each group receives, as the network would bring it."""
    parts = {}
    for group, exchange in exchanges.items():
        sizes = [len(peer.shared_S) * token_bytes for peer in exchange.peers]
        for peer, part in zip(exchange.peers, sent[group].split(sizes), strict=True):
            parts[group, peer.group] = part
    return {
        group: torch.cat([parts[peer.group, group] for peer in exchange.peers])
        for group, exchange in exchanges.items()
    }


@settings(max_examples=4)
@given(kvp_rows(most=20), st.sampled_from([torch.float32, torch.float16]))
def test_the_kernels_of_a_gpu_exchange_and_merge_the_same_rows(case, dtype):
    """Every group's merged rows equal merge_shards of all that groups hold, and the others stay."""
    plan, rows = case
    heads, head_dim = 6, 16
    groups = range(plan.parallelism.kvp)
    mine = {group: rows_of_group(plan, rows, group) for group in groups}
    exchanges = {
        group: exchange
        for group in groups
        if (exchange := exchange_of(plan, mine[group], group, list(groups), DEVICE))
    }
    held: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    outs, lses, owners = {}, {}, {}
    for group in groups:
        owners[group] = [(id(row), token) for row in mine[group] for token in range(row.tokens)]
        tokens = len(owners[group])
        random = torch.Generator().manual_seed(group)
        outs[group] = torch.randn(tokens, heads, head_dim, generator=random).to(dtype)
        lses[group] = torch.randn(tokens, heads, generator=random) * 9
        lses[group][torch.rand(tokens, heads, generator=random) < 0.1] = -torch.inf
        outs[group], lses[group] = outs[group].to(DEVICE), lses[group].to(DEVICE)
        outs[group][lses[group] == -torch.inf] = 0
        for at, owner in enumerate(owners[group]):
            held[(*owner, group)] = outs[group][at].clone(), lses[group][at]
    sent = {
        group: merging.pack_shares(outs[group], lses[group], each.rows_E, each.places_3E)
        for group, each in exchanges.items()
    }
    size = heads * (head_dim * outs[0].element_size() + 4)
    for group, received in _swapped(sent, exchanges, size).items():
        each = exchanges[group]
        merging.merge_shares(
            outs[group], lses[group], each.rows_S, each.shares_GS, each.places_3E, received
        )
        for at, owner in enumerate(owners[group]):
            parts = [held[*owner, g] for g in groups if (*owner, g) in held]
            expected = merge_shards(
                torch.stack([out for out, _ in parts])[:, None],
                torch.stack([lse for _, lse in parts])[:, None],
            )[0]
            # the same arithmetic in fp32, but for how exp rounds; then one rounding to dtype
            atol = 2**-20 if dtype == torch.float32 else 2**-9
            torch.testing.assert_close(outs[group][at], expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("head_dim", "takes"), [(64, True), (80, False), (100, False), (128, True)]
)
def test_heads_that_are_no_power_of_two_merge_without_kernels(head_dim, takes):
    """Triton would not compile them; the operations of a CPU run on any device."""
    on_gpu = SimpleNamespace(is_cuda=True, shape=(3, 2, head_dim))
    assert has_kernels(on_gpu) == takes
    assert not has_kernels(torch.zeros(3, 2, head_dim))


@pytest.mark.parametrize("kernel", ["pack_kernel", "merge_kernel"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernels_of_a_gpu_compile_for_sm_90(kernel, head_dim):
    """Without spills, 16 bytes a load at head size 128; in a child process, which compiles."""
    lines = [
        "import re, triton",
        "from triton.backends.compiler import GPUTarget",
        "from triton.compiler import ASTSource",
        "from runtime.parallel import merging",
        f"kernel = merging.{kernel}",
        f"fixed = dict(GROUPS=4, HEAD={head_dim}, HEADS=8, SIZE=2, LSE=4, ALIGNED=True)",
        "kinds = dict(rows_ptr='*i64', places_ptr='*i32', shares_ptr='*i32')",
        "kinds |= dict.fromkeys(('entries', 'shared', 'heads'), 'i32')",
        "kinds |= dict.fromkeys(('lse_ptr', 'sent_lse_ptr', 'received_lse_ptr'), '*fp32')",
        "names = kernel.arg_names",
        "types = {n: 'constexpr' if n in fixed else kinds.get(n, '*bf16') for n in names}",
        "values = {(names.index(n),): v for n, v in fixed.items() if n in names}",
        "sixteen = [['tt.divisibility', 16]]",
        "even = {(at,): sixteen for at, n in enumerate(names) if n.endswith('_ptr')}",
        "source = ASTSource(kernel, types, values, even)",
        "made = triton.compile(source, target=GPUTarget('cuda', 90, 32))",
        "sass = made.asm['sass']",
        "print('spills', 'STL' in sass, 'wide', bool(re.search(r'LDG\\.E\\.(\\w+\\.)?128', sass)))",
    ]
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == f"spills False wide {head_dim == 128}", done.stderr[-2000:]

"""The merge of shards, and what a group runs and exchanges, against plain attention in float64."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from builders import make_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bundles import write_bundle

from codegen.emit import emit_program
from plans.mesh import Parallelism
from plans.plan import Plan
from runtime.executor.base import Chunk, Step
from runtime.parallel.inputs import pack, rows_of_group, sampled_rows
from runtime.parallel.kvp import (
    Exchange,
    exchange_of,
    merge_shards,
    pack_partial,
    unpack_partial,
)
from runtime.parallel.table import Row, State, newest_shard, row_groups, step_groups
from runtime.program import Exchanger, load_bundle
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


@pytest.fixture(scope="module")
def exchanger(tmp_path_factory) -> Exchanger:
    """The kernels as a bundle hands them on."""
    plan = kvp_plan(2)
    files = {
        name: content.decode()
        for name, content in emit_program(plan, target="triton").files.items()
    }
    bundle = load_bundle(write_bundle(tmp_path_factory.mktemp("bundle"), plan, files))
    found = bundle.load_stage(0).exchange
    assert found is not None
    return found


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, where the kernels of a program are used."""

    @property
    def is_cuda(self) -> bool:
        return True


@settings(max_examples=4)
@given(case=kvp_rows(most=20), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_the_kernels_of_a_program_exchange_and_merge_the_same_rows(exchanger, case, dtype):
    """Every group's merged rows equal merge_shards of all that groups hold, and the others stay."""
    plan, rows = case
    heads, head_dim = 6, 16
    groups = range(plan.parallelism.kvp)
    mine = {group: rows_of_group(plan, rows, group) for group in groups}
    exchanges = {
        group: exchange
        for group in groups
        if (
            exchange := exchange_of(
                plan, mine[group], group, list(groups), DEVICE, kernels=exchanger
            )
        )
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
        group: exchanger[0](outs[group], lses[group], each.rows_E, each.places_3E)
        for group, each in exchanges.items()
    }
    size = heads * (head_dim * outs[0].element_size() + 4)
    for group, received in _swapped(sent, exchanges, size).items():
        each = exchanges[group]
        arriving = received.split([len(peer.shared_S) * size for peer in each.peers])

        def swap(_, mine, theirs, __, arriving=arriving, packed=sent[group]) -> None:
            assert torch.equal(torch.cat(mine), packed)
            for into, part in zip(theirs, arriving, strict=True):
                into.copy_(part)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Exchange, "_swap", swap)
            merged = each.merge(outs[group].as_subclass(OnGpu), lses[group], None)
        assert merged.data_ptr() == outs[group].data_ptr()
        for at, owner in enumerate(owners[group]):
            parts = [held[*owner, g] for g in groups if (*owner, g) in held]
            expected = merge_shards(
                torch.stack([out for out, _ in parts])[:, None],
                torch.stack([lse for _, lse in parts])[:, None],
            )[0]
            # the same arithmetic in fp32, but for how exp rounds; then one rounding to dtype
            atol = 2**-20 if dtype == torch.float32 else 2**-9
            torch.testing.assert_close(outs[group][at], expected, rtol=0, atol=atol)

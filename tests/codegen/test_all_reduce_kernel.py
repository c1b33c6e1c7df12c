"""The kernel that sums over ranks: equal on all of them to its definition, in its order of writes.

Ranks are emulated: their memory lies in this process, flags and shares of the peers are there
already. In the last test they are processes that really wait for each other. A CPU orders
memory more strictly than a GPU does: what the GPU has to be told, is looked for in the PTX.
"""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from all_reduce_ranks import EPS, SLOTS, WIDTH, run_rank, summed
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_codegen import DTYPES, rounding_interpreter
from torch import Tensor

from codegen.kernels import load_spec
from codegen.kernels.all_reduce_add_rms_norm import triton as ours
from codegen.kernels.all_reduce_add_rms_norm.reference import all_reduce_add_rms_norm as reference
from runtime.parallel.peers import SharedMemory, addressed, shared_bytes

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="ranks are emulated on a CPU")

SPEC = load_spec("all_reduce_add_rms_norm")
POISON = 0x7F
"""A byte of memory that nothing wrote; as flags a number that no launch waits for."""


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    rounding_interpreter(monkeypatch)


def normal(*shape: int, dtype: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DTYPES[dtype])


class World:
    """Memory of some ranks in one process."""

    def __init__(self, ranks: int, slot_bytes: int, epoch: int) -> None:
        self.slot_bytes = slot_bytes
        size = shared_bytes(ranks, SLOTS, slot_bytes)
        self.memory = [torch.full((size,), POISON, dtype=torch.uint8) for _ in range(ranks)]
        self.peers = [self._peers(rank) for rank in range(ranks)]
        for each in self.peers:
            each.epochs.fill_(epoch)

    def _peers(self, rank: int) -> SharedMemory:
        return addressed(
            [memory.data_ptr() for memory in self.memory],
            rank=rank,
            slots=SLOTS,
            slot_bytes=self.slot_bytes,
            device=torch.device("cpu"),
        )

    def share(self, rank: int, half: int, dtype: torch.dtype) -> Tensor:
        """A view [SLOTS, slot elements] of a half of a rank's memory."""
        size = SLOTS * self.slot_bytes
        return self.memory[rank][half * size :][:size].view(dtype).view(SLOTS, -1)

    def flags(self, rank: int) -> Tensor:
        """A view [SLOTS, ranks] of a rank's flags."""
        return self.memory[rank][2 * SLOTS * self.slot_bytes :].view(torch.int32).view(SLOTS, -1)


def assert_normed(normed: Tensor, total: Tensor, weight: Tensor, dtype: str) -> None:
    exact = total.double() / (total.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    exact *= weight.double()
    share = (normed.double() - exact).abs() / exact.abs().clamp_min(1)
    assert share.max() <= SPEC.tolerance[dtype]


@settings(max_examples=25)
@given(
    ranks=st.sampled_from([2, 3, 4, 8]),
    tokens=st.integers(1, SLOTS),
    width=st.sampled_from([1, 8, 65, 96, 1000]),
    dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
    epoch=st.sampled_from([0, 1, 6, 2**31 - 2, 2**31 - 1, -1]),
    wide=st.booleans(),
    seed=st.integers(0, 99),
)
def test_all_ranks_get_the_sum_of_the_definition(*, ranks, tokens, width, dtype, epoch, wide, seed):
    slot_bytes = -(-width * DTYPES[dtype].itemsize // 16) * 16
    world = World(ranks, slot_bytes, epoch)
    now = (epoch + 1 + 2**31) % 2**32 - 2**31
    columns = width + 3 if wide else width  # rows of x and residual that are further apart
    shares = [
        normal(tokens, columns, dtype=dtype, seed=seed + 7 * r)[:, :width] for r in range(ranks)
    ]
    residual = normal(tokens, columns, dtype=dtype, seed=seed + 1)[:, :width]
    weight = normal(width, dtype=dtype, seed=seed + 2)
    expected = summed(shares, residual)
    half = now & 1
    for rank in range(ranks):
        for memory in world.memory:
            memory.fill_(POISON)
        for peer in range(ranks):
            if peer != rank:
                world.share(peer, half, DTYPES[dtype])[:tokens, :width] = shares[peer]
                # a peer may be one launch ahead
                world.flags(rank)[:tokens, peer] = (
                    now if peer % 2 else (now + 1 + 2**31) % 2**32 - 2**31
                )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                torch, "empty", lambda *size, **kind: torch.full(*size, torch.nan, **kind)
            )
            normed, total = ours.one_shot(shares[rank], residual, weight, EPS, world.peers[rank])
        assert torch.equal(total, expected)
        assert_normed(normed, total, weight, dtype)
        own = world.share(rank, half, DTYPES[dtype])
        assert torch.equal(own[:tokens, :width], shares[rank])
        assert bool((world.share(rank, 1 - half, torch.uint8) == POISON).all())
        assert bool((own[tokens:].view(torch.uint8) == POISON).all())
        assert world.peers[rank].epochs.tolist() == [now] * tokens + [epoch] * (SLOTS - tokens)
        untouched = torch.full((4,), POISON, dtype=torch.uint8).view(torch.int32)
        for peer in range(ranks):
            if peer != rank:
                assert world.flags(peer)[:tokens, rank].tolist() == [now] * tokens
                assert bool((world.flags(peer)[tokens:] == untouched).all())
            assert bool((world.flags(rank)[:, rank] == untouched).all())


class Group:
    """Comm of a rank whose peers' shares are known."""

    def __init__(self, others: Tensor, peers: SharedMemory | None) -> None:
        self.others = others
        self.found = peers
        self.asked: list[tuple[int, int]] = []
        self.reduced = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        self.reduced += 1
        return x.add_(self.others)

    def peers(self, slots: int, slot_bytes: int) -> SharedMemory | None:
        self.asked.append((slots, slot_bytes))
        return self.found


@pytest.mark.parametrize(
    ("limits", "there", "fused"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"TOKENS_MAX": 2}, True, False),
        ({"WIDTH_MAX": 32}, True, False),
        ({"PAIR_READ_KIB_MAX": 0}, True, False),
        ({"READ_KIB_MAX": 0}, True, True),
    ],
    ids=["one-launch", "no-peers", "many-tokens", "wide-rows", "many-bytes", "of-two-ranks"],
)
def test_other_steps_take_the_collective_and_the_norm(limits, there, fused, monkeypatch):
    for name, value in limits.items():
        monkeypatch.setattr(ours, name, value)
    world = World(2, 144, 0)
    shares = [normal(3, 65, dtype="bf16", seed=seed) for seed in (0, 1)]
    residual, weight = normal(3, 65, dtype="bf16", seed=2), normal(65, dtype="bf16", seed=3)
    world.share(1, 1, torch.bfloat16)[:3, :65] = shares[1]
    world.flags(0)[:, 1] = 1
    comm = Group(shares[1], world.peers[0] if there else None)
    expected = summed(shares, residual)
    apart = reference(shares[0].clone(), residual, weight, EPS, Group(shares[1], None))
    normed, total = ours.all_reduce_add_rms_norm(shares[0], residual, weight, EPS, comm)
    assert comm.reduced == int(not fused)
    assert set(comm.asked) <= {(ours.TOKENS_MAX, 144)}
    assert torch.equal(total, expected)
    assert torch.equal(total, apart[1])
    assert_normed(normed, total, weight, "bf16")


def test_steps_of_no_token_ask_nobody():
    comm = SimpleNamespace(all_reduce=lambda x: x)
    empty = torch.zeros(0, 8)
    normed, total = ours.all_reduce_add_rms_norm(empty, empty, torch.ones(8), EPS, comm)
    assert normed.shape == total.shape == (0, 8)


@pytest.mark.parametrize(
    ("cores", "threads", "hopper", "width", "ranks", "rows"),
    [
        (132, 2048, True, 8192, 2, 256),  # two programs of 1024 threads, 32 registers each
        (132, 2048, True, 16384, 2, 124),  # one
        (132, 2048, True, 8192, 8, 124),
        (108, 2048, False, 8192, 2, 100),  # registers of another architecture are not known
        (142, 1536, False, 8192, 2, 134),
        (108, 2048, True, 8192, 2, 208),
    ],
)
def test_a_launch_has_no_more_rows_than_a_gpu_holds(*, cores, threads, hopper, width, ranks, rows):
    found = ours.rows_at_once(width, 2, ranks, cores=cores, threads=threads, hopper=hopper)
    assert found == rows


def test_more_rows_than_a_gpu_holds_take_the_collective(monkeypatch):
    monkeypatch.setattr(ours, "_rows_of", lambda *sizes: 2)
    shares = [normal(3, 65, dtype="bf16", seed=seed) for seed in (0, 1)]
    residual, weight = normal(3, 65, dtype="bf16", seed=2), normal(65, dtype="bf16", seed=3)
    comm = Group(shares[1], World(2, 144, 0).peers[0])
    ours.all_reduce_add_rms_norm(shares[0], residual, weight, EPS, comm)
    assert comm.reduced == 1


COMPILE = """
import json, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from codegen.gate_child import _number, _ptxas_log
from codegen.kernels import load_spec
from codegen.kernels.all_reduce_add_rms_norm.triton import all_reduce_add_rms_norm_kernel as kernel
types, constants = json.load(sys.stdin)
names = kernel.arg_names
signature = {n: "constexpr" if n in constants else types[n] for n in names}
fixed = {(names.index(n),): v for n, v in constants.items()}
aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants
           and (signature[n].startswith("*") or n in ("x_stride", "residual_stride", "slot"))}
made = compile(ASTSource(kernel, signature, fixed, aligned), target=GPUTarget("cuda", 90, 32),
               options={"num_warps": 32, "num_stages": 1})
ptx = made.asm["ptx"]
print(json.dumps([ptx, _number(r"Used (\\d+) registers", _ptxas_log(ptx))]))
"""
"""In a process of its own: here, an interpreter stands for the compiler."""


def test_the_compiled_kernel_orders_memory_for_the_whole_system():
    """Flags are set and seen with the order they need, and the launch before is waited for."""
    known = SPEC.compilations[0]
    constants = {**known.constants, "RANK": 0, "RANKS": 2, "LANES": 2, "OVERLAP": 1}
    constants |= {"WIDTH": ours.WIDTH_LEAN, "BLOCK": ours.WIDTH_LEAN}
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        input=json.dumps([known.types, constants]),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    ptx, registers = json.loads(done.stdout)
    release = re.search(r"atom\.global\.sys\.release\.exch", ptx)
    acquire = re.search(r"atom\.global\.sys\.acquire\.add", ptx)
    wait = ptx.find("griddepcontrol.wait")
    assert release is not None
    assert acquire is not None
    assert 0 < wait < release.start() < acquire.start()
    assert registers <= ours.REGISTERS_LEAN, "two programs of 1024 threads have no room"


# --- ranks that wait for each other ---------------------------------------------------------------


def test_ranks_with_delays_of_their_own_never_read_what_is_being_written():
    """Fresh data every launch, some slots left out of some: a share too early or late shows."""
    ranks = 2
    size = shared_bytes(ranks, SLOTS, 4 * WIDTH)
    memory = [torch.zeros(size, dtype=torch.uint8).share_memory_() for _ in range(ranks)]
    context = mp.get_context("spawn")
    wrong = context.Queue()
    started = [
        context.Process(target=run_rank, args=(rank, memory, wrong), daemon=True)
        for rank in range(ranks)
    ]
    for each in started:
        each.start()
    said = []
    try:
        while said.count(None) < ranks:
            said.append(wrong.get(timeout=120))
    finally:
        for each in started:
            each.kill() if said.count(None) < ranks else each.join(60)
    assert [each for each in said if each] == []
    assert all(each.exitcode == 0 for each in started)

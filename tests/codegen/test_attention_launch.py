"""Attention's launches: bound to what was compiled, and all of it compiled before steps need it.

On a CPU a kernel of our own stands in for Triton's; on a GPU bound launches are held to plain ones.
"""

import ast
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels.paged_attention import gluon, launch
from codegen.kernels.paged_attention import triton as attention
from codegen.kernels.paged_attention.launch import Launch, described
from plans.ops import HostInputs

NAMES = ["out_ptr", "x_ptr", "rows", "scale", "WIDTH"]


class Compiled:
    """What Triton returns: called with all arguments in their order."""

    def __init__(self, kernel: "Kernel") -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.kernel.bound.append((grid, arguments))


class Kernel:
    """Notes its launches, by how they were made."""

    arg_names = NAMES
    do_not_specialize: tuple[str, ...] = ("rows",)

    def __init__(self) -> None:
        self.plain: list[tuple[tuple[int, ...], dict[str, Any]]] = []
        self.bound: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(**arguments: Any) -> Compiled:
            self.plain.append((grid, arguments))
            return Compiled(self)

        return run


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """Kernels of a test are compiled for it alone."""
    monkeypatch.setattr(launch, "_COMPILED", {})


def test_launches_behind_the_first_of_a_form_pass_addresses_in_the_kernels_order():
    kernel, x = Kernel(), torch.zeros(64)
    constants = {"WIDTH": 8, "num_warps": 4}
    outs = [torch.zeros(16) for _ in range(3)]
    for rows in (5, 1):  # another step: other numbers, the same form
        one = Launch(kernel, (rows, 2), {"x_ptr": x, "rows": rows, "scale": 0.5}, constants)
        for out in outs:
            one({"out_ptr": out})
    assert kernel.plain == [
        ((5, 2, 1), {"x_ptr": x, "rows": 5, "scale": 0.5, "out_ptr": outs[0], **constants})
    ]
    address = x.data_ptr()
    assert kernel.bound == [
        ((rows, 2, 1), (out.data_ptr(), address, rows, 0.5, 8))
        for rows, some in ((5, outs[1:]), (1, outs))
        for out in some
    ]


@pytest.mark.parametrize(
    ("arguments", "constants"),
    [
        ({"x_ptr": torch.zeros(8).half(), "rows": 1, "scale": 1.0}, {"WIDTH": 8}),
        ({"x_ptr": torch.zeros(8), "rows": 1, "scale": 1.0}, {"WIDTH": 16}),
        ({"x_ptr": torch.zeros(8), "rows": 1, "scale": 1}, {"WIDTH": 8}),
    ],
)
def test_another_type_or_constant_is_another_form(arguments, constants):
    kernel, out = Kernel(), torch.zeros(8)
    Launch(kernel, (1,), {"x_ptr": torch.zeros(8), "rows": 1, "scale": 1.0}, {"WIDTH": 8})(
        {"out_ptr": out}
    )
    Launch(kernel, (1,), arguments, constants)({"out_ptr": out})
    assert len(kernel.plain) == 2
    assert not kernel.bound


def test_pointers_that_16_does_not_divide_are_left_to_triton():
    kernel, x = Kernel(), torch.zeros(64)
    odd, even = x[1:9], x[4:12]
    one = Launch(kernel, (1,), {"x_ptr": x, "rows": 1, "scale": 1.0}, {"WIDTH": 8})
    for out in (odd, even, odd, even):
        one({"out_ptr": out})
    # the first compiles for odd ones, which is of no use to others
    assert [each["out_ptr"] is odd for _, each in kernel.plain] == [True, False, True]
    assert len(kernel.bound) == 1
    stays = Launch(kernel, (1,), {"x_ptr": odd, "rows": 1, "scale": 1.0}, {"WIDTH": 8})
    stays({"out_ptr": even})
    assert len(kernel.bound) == 1


def test_where_nothing_is_compiled_every_launch_is_plain():
    calls = []

    class Interpreted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **arguments: calls.append(arguments)

    one = Launch(Interpreted(), (1,), {"x_ptr": torch.zeros(8)}, {"WIDTH": 8})
    for _ in range(3):
        one({"out_ptr": torch.zeros(8)})
    assert len(calls) == 3


def decorated(module: Any, kernel: str) -> tuple[list[str], list[str]]:
    """Whole numbers among a kernel's arguments, and those that its decorator leaves general.

    Read from the text: the interpreter keeps nothing of the decorator.
    """
    (found,) = (
        each
        for each in ast.parse(Path(module.__file__).read_text()).body
        if isinstance(each, ast.FunctionDef) and each.name == kernel
    )
    (decorator,) = found.decorator_list
    assert isinstance(decorator, ast.Call)
    (given,) = (each.value for each in decorator.keywords if each.arg == "do_not_specialize")
    names = module.UNSPECIALISED if isinstance(given, ast.Name) else ast.literal_eval(given)
    numbers = [
        each.arg
        for each in found.args.args
        if each.annotation is None
        and not each.arg.endswith(("_ptr", "_desc"))
        and each.arg != "scale2"
    ]
    return numbers, list(names)


@pytest.mark.parametrize(
    "kernel", ["tiles:attention_kernel", "tiles:merge_kernel", "gluon:attention_kernel"]
)
def test_no_number_of_a_step_is_specialised(kernel):
    """So that a bound launch is right for all numbers, and no step compiles because one is 1."""
    module, name = kernel.split(":")
    numbers, free = decorated(
        importlib.import_module(f"codegen.kernels.paged_attention.{module}"), name
    )
    assert numbers
    assert set(numbers) <= set(free)


def test_a_kernel_that_is_compiled_for_a_number_is_never_bound():
    kernel, out = Kernel(), torch.zeros(8)
    kernel.do_not_specialize = ()
    one = Launch(kernel, (1,), {"x_ptr": torch.zeros(8), "rows": 1, "scale": 1.0}, {"WIDTH": 8})
    for _ in range(3):
        one({"out_ptr": out})
    assert len(kernel.plain) == 3
    assert not kernel.bound


def test_another_device_or_box_is_another_form():
    box = SimpleNamespace(base=torch.zeros(8), block_shape=[8, 8])
    other = SimpleNamespace(base=torch.zeros(8), block_shape=[8, 16])
    on_meta = torch.zeros(8, device="meta")
    forms = [
        Launch(Kernel(), (1,), {"x_ptr": x, "rows": 1}, {}).key({"x_desc": each})[1:]
        for x in (torch.zeros(8), on_meta)
        for each in (box, other)
    ]
    assert len(set(forms)) == 4


# --- forms ----------------------------------------------------------------------------------------


def keys_of(monkeypatch: pytest.MonkeyPatch, run: Any) -> set[Any]:
    """Forms of all launches that it makes."""
    found = set()
    with monkeypatch.context() as patch:
        patch.setattr(Launch, "__call__", lambda one, given: found.add(one.key(given)))
        run()
    return found


@st.composite
def steps(draw: st.DrawFn) -> HostInputs:
    """Any chunks and decodes, keys of another shard, and padding."""
    few = st.integers(1, 20)
    queries = draw(st.lists(few | st.integers(1, 3000) | st.just(1), min_size=1, max_size=8))
    starts, lens, causal = [0], [], []
    for count in queries:
        starts.append(starts[-1] + count)
        causal.append(draw(st.booleans()))
        prefix = draw(st.integers(0, 300) | st.integers(0, 200_000))
        lens.append(prefix + (count if causal[-1] else 0))
    return HostInputs(query_starts=tuple(starts), kv_lens=tuple(lens), causal=tuple(causal))


@settings(max_examples=150, deadline=None)
@given(
    host=steps(),
    padding=st.integers(0, 3),
    shape=st.tuples(st.sampled_from([1, 4, 7, 8, 64]), st.sampled_from([16, 64, 128])),
    kernel=st.sampled_from(["fp8", "gluon", "triton"]),
    merging=st.tuples(st.booleans(), st.integers(0, 2)),
)
def test_no_step_takes_a_form_that_is_not_compiled_beforehand(
    host, padding, shape, kernel, merging
):
    (group, page), (overlap, fuse) = shape, merging
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "processors", lambda _: 132)
        patch.setattr(attention, "may_overlap", lambda _: overlap)
        patch.setattr(attention, "FUSE_MERGE", fuse)
        prepared = gluon.prepared if kernel == "gluon" else None
        patch.setattr(attention, "_hopper", lambda *_: prepared)
        page_dtype = torch.float8_e4m3fn if kernel == "fp8" else torch.bfloat16
        heads = attention.Heads(
            kv_heads=2,
            group=group,
            head_dim=64,
            page_tokens=page,
            dtype=torch.bfloat16,
            page_dtype=page_dtype,
        )
        pages = torch.zeros((1, page, 2, 64), dtype=page_dtype)
        scales = torch.zeros(1, 2)
        q = torch.zeros((host.query_starts[-1] + padding, 2 * group, 64), dtype=torch.bfloat16)
        recorded = q.shape[0] == len(host.kv_lens)
        inputs = SimpleNamespace(
            host=host,
            page_table_BP=torch.zeros((len(host.kv_lens), 1), dtype=torch.int32),
            memo={},
            recorded=recorded,
            query_starts_B1=torch.tensor(host.query_starts),
            kv_lens_B=torch.tensor(host.kv_lens),
        )
        taken = keys_of(
            patch,
            lambda: attention.paged_attention(
                q, pages, pages, pages, inputs, 0.125, scales, scales
            ),
        )

        def beforehand() -> None:
            q1, lse1 = q[:1], torch.zeros(1, 2 * group)
            for call in attention.every_call(torch.device("cpu"), heads):
                call(q1, q1, lse1, pages, pages, scales, scales)

        assert taken
        assert taken <= keys_of(patch, beforehand)


def decode_call(tokens: int, keys: int, *, recorded: bool) -> attention.Call:
    """The call of a step of so many decodes."""
    heads = attention.Heads(
        kv_heads=2,
        group=4,
        head_dim=128,
        page_tokens=128,
        dtype=torch.bfloat16,
        page_dtype=torch.bfloat16,
    )
    inputs = SimpleNamespace(
        host=HostInputs(
            query_starts=tuple(range(tokens + 1)),
            kv_lens=(keys,) * tokens,
            causal=(True,) * tokens,
        ),
        recorded=recorded,
        query_starts_B1=torch.arange(tokens + 1),
        kv_lens_B=torch.full((tokens,), keys),
        page_table_BP=torch.zeros((tokens, 1), dtype=torch.int32),
        memo={},
    )
    q = torch.zeros((tokens, 8, 128), dtype=torch.bfloat16)
    (call,) = attention._step(heads, q, inputs, 0.125)  # noqa: SLF001
    return call


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    ("tokens", "rows", "slots"), [(1, 1, 32), (12, 1, 8), (15, 1, 8), (16, 4, 8)]
)
def test_few_tokens_are_merged_a_row_a_program(tokens, rows, slots, recorded, monkeypatch):
    monkeypatch.setattr(attention, "processors", lambda _: 132)
    monkeypatch.setattr(attention, "may_overlap", lambda _: True)
    merge = decode_call(tokens, 4096, recorded=recorded).merge
    assert merge is not None
    assert merge._grid == (tokens, 2 * 4 // rows, 1)  # noqa: SLF001
    assert merge._constants["ROWS"] == rows  # noqa: SLF001
    assert merge._constants["SLOTS"] == slots  # noqa: SLF001


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    ("overlap", "fuse", "fused"),
    [(True, 0, False), (True, 1, False), (True, 2, True), (False, 0, False), (False, 1, True)],
)
def test_decodes_and_their_merge_overlap_where_the_device_can(
    overlap, fuse, fused, recorded, monkeypatch
):
    monkeypatch.setattr(attention, "processors", lambda _: 132)
    monkeypatch.setattr(attention, "may_overlap", lambda _: overlap)
    monkeypatch.setattr(attention, "FUSE_MERGE", fuse)
    call = decode_call(1, 40_000, recorded=recorded)
    assert (call.merge is None) == fused
    for one in (call.attention, call.merge):
        if one is not None:
            constants = one._constants  # noqa: SLF001
            assert (constants["OVERLAP"], constants["launch_pdl"]) == (int(overlap), overlap)


# --- on the device --------------------------------------------------------------------------------


def device_step(
    rows: list[tuple[int, int]], page: int, *, recorded: bool = False
) -> tuple[int, SimpleNamespace]:
    """Pages, and inputs of sequences of (queries, keys)."""
    starts = [sum(queries for queries, _ in rows[:at]) for at in range(len(rows) + 1)]
    lens = [keys for _, keys in rows]
    used = [-(-keys // page) for keys in lens]
    pages = sum(used)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(pages)).tolist()
    table = [[order.pop() for _ in range(count)] + [0] * (max(used) - count) for count in used]
    return pages, SimpleNamespace(
        host=None
        if recorded
        else HostInputs(
            query_starts=tuple(starts), kv_lens=tuple(lens), causal=(True,) * len(lens)
        ),
        recorded=recorded,
        query_starts_B1=torch.tensor(starts, dtype=torch.int32, device="cuda"),
        kv_lens_B=torch.tensor(lens, dtype=torch.int32, device="cuda"),
        page_table_BP=torch.tensor(table, dtype=torch.int32, device="cuda"),
        memo={},
    )


DECODES = [(1, 100 + 331 * each) for each in range(40)]
STEPS = {
    "few decodes": ([(1, 900)] * 9, {}),
    "recorded, long": ([(1, 40_000)], {"recorded": True}),
    "decodes": (DECODES, {}),
    "short decodes": ([(1, 90)] * 12, {}),
    "long decode": ([(1, 40_000)], {}),
    "recorded": (DECODES, {"recorded": True}),
    "chunk": ([(700, 700)], {}),
    "chunks": ([(300, 3000), (129, 129), (1000, 1001)], {}),
    "chunk in pieces": ([(40, 30_000)], {}),
    "short chunk": ([(13, 900)], {}),
    "mixed": ([*DECODES, (900, 900)], {}),
    "mixed, short": ([*DECODES[:25], (13, 1013)], {}),
    "mixed, long": ([*DECODES, (512, 65_536)], {}),
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("fp8", "group", "page", "gluon_kernel"),
    [(False, 4, 128, 1), (False, 7, 64, 1), (False, 8, 64, 0), (True, 4, 128, 0)],
)
def test_bound_launches_give_what_plain_ones_give(fp8, group, page, gluon_kernel, monkeypatch):
    """Three layers a step, each with its own pages; some queries start where 16 does not divide."""
    monkeypatch.setattr(attention, "GLUON", gluon_kernel)
    for cached in (attention._hopper, attention._compile_all):  # noqa: SLF001
        cached.cache_clear()
    plain: list[str] = []
    launched = Launch._launch  # noqa: SLF001

    def noted(one: Launch, tensors: Any) -> None:
        plain.append("launch")
        launched(one, tensors)

    monkeypatch.setattr(Launch, "_launch", noted)
    kv_heads, head = 2, 128
    random = torch.Generator("cuda").manual_seed(0)
    normal = {"generator": random, "device": "cuda", "dtype": torch.float32}
    for mixed in (0, 1, 2):
        monkeypatch.setattr(attention, "MIXED", mixed)
        for name, (rows, options) in STEPS.items():
            pages, inputs = device_step(rows, page, **options)
            tokens = sum(queries for queries, _ in rows)
            layers = []
            for layer in range(3):
                shape = (pages, page, kv_heads, head)
                k, v = (torch.randn(shape, **normal) for _ in "kv")
                scales = ()
                if fp8:
                    k, v = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
                    # powers of two that are near each other, as kv_write leaves them
                    drawn = (torch.rand((pages, kv_heads), **normal) for _ in "kv")
                    scales = tuple(torch.where(each < 0.5, 0.5, 1.0) for each in drawn)
                else:
                    k, v = k.bfloat16(), v.bfloat16()
                flat = torch.randn(tokens * kv_heads * group * head + 8, **normal).bfloat16()
                # an address that 16 divides, and in the last layer one that it does not
                start = 4 if layer == 2 else 0
                q = flat[start : start + flat.numel() - 8].view(tokens, kv_heads * group, head)
                layers.append((q, k, v, scales))

            def run(layers: Any = layers, inputs: Any = inputs) -> list[torch.Tensor]:
                inputs.memo.clear()
                return [
                    result
                    for q, k, v, scales in layers
                    for result in attention.paged_attention(q, k, v, k, inputs, 0.1, *scales)
                ]

            run()
            plain.clear()
            bound = run()
            assert len(plain) <= 4, f"{name}: only the layer of odd addresses is Triton's own"
            with monkeypatch.context() as patch:
                patch.setattr(launch, "_aligned", lambda _: False)
                own = run()
            for one, other in zip(bound, own, strict=True):
                assert torch.equal(one, other), name
    for cached in (attention._hopper, attention._compile_all):  # noqa: SLF001
        cached.cache_clear()


@pytest.mark.gpu
def test_a_descriptor_of_an_address_is_that_of_its_tensor():
    pages = torch.zeros((4, 128, 2, 128), dtype=torch.bfloat16, device="cuda")
    one = described(pages, (128, 128), attention.TensorDescriptor)
    assert one.base.data_ptr() == pages.data_ptr()
    flat = pages.view(-1, 256)
    other = attention.TensorDescriptor.from_tensor(flat, [128, 128])
    assert list(one.shape) == list(other.shape)
    assert list(one.strides) == list(other.strides)

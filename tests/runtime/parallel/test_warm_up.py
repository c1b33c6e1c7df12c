"""The steps of a warm-up take every form of the kernels that any step may take.

A form is what Triton compiles anew: the constants, the warps, and of each number whether it is 1
and whether 16 divides it. What attention takes is in tests/codegen/test_attention_launch.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels.linear.triton import TOKENS_MAX, choice
from codegen.rowwise_library import LIBRARY
from codegen.rowwise_op import load_source
from codegen.rowwise_source import triton_source
from runtime.parallel.rank import WARM_UP_TOKENS_GPU, warm_up_sizes

Key = tuple[Any, ...]
MODULES = {op: load_source(op, triton_source(op, region)) for op, region in LIBRARY.items()}


class Kernel:
    """Stands for a kernel and keeps the forms that it would have been compiled for."""

    def __init__(self) -> None:
        self.keys: set[Key] = set()

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def run(*given: Any, **constants: Any) -> None:
            numbers = [
                (each == 1, each % 16 == 0) if isinstance(each, int) else type(each)
                for each in given
            ]
            self.keys.add((*numbers, *sorted(constants.items())))

        return run


def row_wise_keys(op: str, tokens: int, shape: tuple[int, ...]) -> set[Key]:
    """Forms of a row-wise kernel in a step; shape is what a token has."""
    module, kernel = MODULES[op], Kernel()
    arguments: list[Any] = []
    for each in LIBRARY[op].inputs:
        if each.kind == "scalar":
            arguments.append(1e-5)
            continue
        width = shape[-1] * len(each.classes)
        rows = (tokens, *shape[:-1]) if each.kind == "row" else ()
        arguments.append(torch.empty((*rows, width), device="meta"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, f"{op}_kernel", kernel)
        getattr(module, op)(*arguments)
    assert kernel.keys
    return kernel.keys


@settings(max_examples=150, deadline=None)
@given(
    most=st.integers(1, 300) | st.sampled_from([512, 1000, 2048, 8192, 16_384, 32_768]),
    part=st.floats(0, 1),
    op=st.sampled_from(sorted(LIBRARY)),
    width=st.sampled_from([64, 128, 1536, 4096, 5120, 8192]),
    heads=st.sampled_from([1, 2, 4, 7, 8, 10, 20, 28, 32, 40, 64]),
)
def test_no_step_takes_a_form_of_a_row_wise_kernel_that_is_not_compiled_beforehand(
    most, part, op, width, heads
):
    shape = (heads, width) if width <= 128 and op == "rms_norm" else (width,)
    tokens = max(round(part * most), 1)
    warmed = {key for size in warm_up_sizes(most) for key in row_wise_keys(op, size, shape)}
    assert row_wise_keys(op, tokens, shape) <= warmed


@pytest.mark.parametrize("rows", [1024, 4096, 6144, 14_336, 28_672, 128_256])
@pytest.mark.parametrize("most", [1, 17, 33, 48, 64, 2048])
def test_no_step_takes_a_form_of_a_product_that_is_not_compiled_beforehand(rows, most):
    forms = choice().form
    some = range(1, min(TOKENS_MAX, most) + 1)
    warmed = {forms(rows, size) for size in warm_up_sizes(most) if size in some}
    assert {forms(rows, tokens) for tokens in some} <= warmed


@pytest.mark.parametrize("most", [1, 2, 15, 16, 17, 500, 8192, 100_000])
def test_sizes_are_few_and_within_the_limit(most):
    sizes = warm_up_sizes(most)
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[0] == min(most, WARM_UP_TOKENS_GPU)
    assert sizes[-1] == 1
    assert len(sizes) <= 3 * WARM_UP_TOKENS_GPU.bit_length()

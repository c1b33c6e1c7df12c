"""Launches that differ in few arguments from layer to layer, bound to what Triton compiled for one.

Triton binds, specialises and looks up each launch anew: a quarter of a millisecond of Python, which
a step with chunks cannot hide. What it compiled can be called with the arguments in their order and
pointers as numbers, in a tenth of that. So the first launch of a form is Triton's own; those of the
same form behind it are bound to its result. In Triton's interpreter nothing is compiled, and every
launch is its own.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNED = 16
"""Bytes: kernels are compiled for pointers that it divides."""

Describe = Callable[[Any, Sequence[int], Sequence[int], Sequence[int]], Any]
"""(base, shape, strides, box) to a tensor descriptor, of Triton or of Gluon."""

_COMPILED: dict[tuple[Any, ...], Any] = {}
"""By all that a compilation depends on: kernel, device, types and constants."""


class Launch:
    """A launch of a kernel whose numbers are either floating or not specialised.

    What it holds lives as long as it does; what is passed to a call, until the call.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        arguments: Mapping[str, Any],
        constants: Mapping[str, Any],
    ) -> None:
        """Launches nothing.

        arguments  those that stay: tensors and numbers
        constants  constexprs, and Triton's options
        """
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._arguments = dict(arguments)
        self._constants = constants
        self._free = _unspecialised(kernel, self._arguments)
        self._bound: Callable[..., None] | None = None
        self._listed: list[Any] = []
        self._places: dict[str, int] = {}

    def __call__(self, given: Mapping[str, Any]) -> None:
        """Launches, with the rest of the arguments: tensors and descriptors."""
        if self._bound is None:
            compiled = _COMPILED.get(self.key(given))
            if compiled is not None and self._free and _aligned(self._arguments):
                self._bind(compiled)
        if self._bound is None or not _aligned(given):
            self._launch(given)
            return
        listed = self._listed
        for name, value in given.items():
            listed[self._places[name]] = _passed(value)
        self._bound(*listed)

    def key(self, given: Mapping[str, Any]) -> tuple[Any, ...]:
        """What the compilation of a launch with these arguments, all aligned, depends on."""
        every = {**self._arguments, **given}
        device = next(each.device for each in every.values() if isinstance(each, Tensor))
        types = tuple(sorted((name, _type(value)) for name, value in every.items()))
        return (self._kernel, device, types, tuple(sorted(self._constants.items())))

    def _launch(self, given: Mapping[str, Any]) -> None:
        """As Triton does it."""
        compiled = self._kernel[self._grid](**self._arguments, **given, **self._constants)
        if compiled is not None and _aligned(self._arguments) and _aligned(given):
            _COMPILED[self.key(given)] = compiled

    def _bind(self, compiled: Any) -> None:
        values = {**self._constants, **self._arguments}
        names = self._kernel.arg_names
        self._places = {name: place for place, name in enumerate(names)}
        self._listed = [_passed(values.get(name)) for name in names]
        self._bound = compiled[self._grid]


def _unspecialised(kernel: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether no whole number among them is one that Triton compiles for."""
    free = getattr(kernel, "do_not_specialize", ())
    return all(name in free for name, value in arguments.items() if isinstance(value, int))


def _aligned(arguments: Mapping[str, Any]) -> bool:
    """Whether all tensors among them are."""
    return not any(
        each.data_ptr() % ALIGNED for each in arguments.values() if isinstance(each, Tensor)
    )


def _passed(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) else value


def _type(value: Any) -> str:
    """What a compilation knows of an argument."""
    if isinstance(value, Tensor):
        return str(value.dtype)
    if isinstance(value, int | float):
        return type(value).__name__
    return f"{value.base.dtype} {list(value.block_shape)}"  # a descriptor


def described(pages: Tensor, box: tuple[int, int], describe: Describe) -> Any:
    """Descriptor of pages [pages, page tokens, K, H] as rows of all heads."""
    if pages.device.type == "cpu":  # the interpreter reads the tensor
        flat = pages.view(-1, pages.shape[2] * pages.shape[3])
        return describe(flat, flat.shape, flat.stride(), list(box))
    assert pages.is_contiguous(), "pages lie one behind the other"
    return _described(pages.data_ptr(), pages.shape, pages.dtype, box, describe)


class _Base:
    """Where pages lie: all that a launch asks of a descriptor's tensor.

    Descriptors are kept from step to step, and must not keep a pool of pages that nobody else does.
    """

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._address = address

    def data_ptr(self) -> int:
        return self._address


@functools.lru_cache(maxsize=4096)
def _described(
    address: int,
    shape: torch.Size,
    dtype: torch.dtype,
    box: tuple[int, int],
    describe: Describe,
) -> Any:
    pages, page_tokens, kv_heads, head_dim = shape
    width = kv_heads * head_dim
    base = _Base(address, dtype)
    return describe(base, [pages * page_tokens, width], [width, 1], list(box))


def may_overlap(device: torch.device) -> bool:
    """From Hopper on, a kernel can wait for the one before by itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; a CPU, where the interpreter runs, counts as few."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count

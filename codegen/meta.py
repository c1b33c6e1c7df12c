"""What torch operations allocate, found by running them on tensors that have no numbers.

A reference is plain torch, so the bytes that it holds at once follow from its code: each operation
is done on the meta device, where tensors are shapes alone, and the storages that are alive are
counted. What a library takes for itself inside one operation is not seen.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from codegen import collectives
from codegen.kernels.base import Value

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
    "int32": torch.int32,
    "int64": torch.int64,
}


def scratch_bytes(function: Callable[..., Any], args: Any, sizes: Mapping[str, int]) -> int:
    """Most bytes that a call allocates besides its results.

    args  as Spec.infer has them: tensors as Value
    """
    given = [_tensor(each, sizes) if isinstance(each, Value) else each for each in args]
    with _Alive() as alive:
        result = function(*given)
    made = {_key(each): each.untyped_storage() for each in _tensors(result)}
    before = {_key(each) for each in _tensors(given)}
    kept = sum(each.nbytes() for key, each in made.items() if key not in before)
    return int(alive.most - kept)


def _tensor(value: Value, sizes: Mapping[str, int]) -> Any:
    if value.dtype == "int":
        return 0
    if value.dtype == "comm":
        return collectives  # of a group of one, which sums in place
    # pages count nothing, but references look into them
    shape = [max(sizes[dim], 1) if isinstance(dim, str) else dim for dim in value.shape]
    return torch.empty(shape, dtype=DTYPES[value.dtype], device="meta")


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (each for each in tree_leaves(values) if isinstance(each, torch.Tensor))


def _key(tensor: torch.Tensor) -> int:
    """The same for tensors that share a storage."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - meta tensors have no address


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operations made and something still holds."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {_key(each) for each in _tensors((args, kwargs))}
        self._made = {key: each for key, each in self._made.items() if not each[0].expired()}  # type: ignore[no-untyped-call]
        for each in _tensors(result):
            key, storage = _key(each), each.untyped_storage()
            if key not in given and key not in self._made:
                self._made[key] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        self.most = max(self.most, sum(size for _, size in self._made.values()))
        return result

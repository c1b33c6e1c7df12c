"""Copies between host and device that nobody waits for.

Memory that the system may move (pageable) is copied while the host waits for the stream, so that
whatever a step needs would first wait for the step before it. Pinned memory is not, and torch keeps
it until the copy has been made.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNED_BYTES = 256
"""Where each array begins: kernels are compiled for pointers that 16 divides."""

Array = np.ndarray[Any, np.dtype[Any]]


def to_device(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """The arrays as tensors of the device, sent in one copy; do not change them afterwards."""
    arrays = [np.ascontiguousarray(each) for each in arrays]
    tensors = [torch.from_numpy(each) for each in arrays]
    if device.type == "cpu":
        return tensors
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += -(-array.nbytes // ALIGNED_BYTES) * ALIGNED_BYTES
    host = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    numbers = host.numpy()
    for start, array in zip(starts, arrays, strict=True):
        numbers[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    sent = host.to(device, non_blocking=True)
    return [
        sent[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, tensors, strict=True)
    ]


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, whole once the stream is beyond this call."""
    if tensor.device.type == "cpu":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def overwrite(tensor: Tensor, values: Array) -> None:
    """Fills the first elements of a tensor, of the values' dtype, behind what the stream does."""
    host = torch.from_numpy(values)
    if tensor.device.type == "cuda":
        host = host.pin_memory()
    tensor[: len(host)].copy_(host, non_blocking=True)

"""Memory in which everything that a kernel forgets to write shows, and seeds that a run prints."""

import random

import pytest
import torch


def poison(patch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold NaN, in every floating type, or -1: all bits are set."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        patch.setattr(owner, name, _filled(getattr(owner, name)))


def _filled(plain):
    def filled(*args, **options):
        tensor = plain(*args, **options)
        if not tensor.is_meta:
            tensor.untyped_storage().fill_(0xFF)
        return tensor

    return filled


def fresh_seed(option: int | None) -> int:
    """The seed that --seed names; else a new one where there is a GPU, and 0 elsewhere."""
    if option is not None:
        return option
    return random.SystemRandom().randrange(1 << 30) if torch.cuda.is_available() else 0

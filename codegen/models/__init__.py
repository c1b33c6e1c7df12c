"""The model families, each one file of plain PyTorch: what a program has to compute."""

import pkgutil
from collections.abc import Callable

import torch

from plans.errors import UnknownName
from plans.model import Model

MODELS = {"llama": "codegen.models.llama:Llama"}


def load_model(family: str) -> Callable[[Model], torch.nn.Module]:
    """The family's class; called with a Model it makes the module, weights uninitialised."""
    if family not in MODELS:
        raise UnknownName("model family", family, MODELS)
    model: Callable[[Model], torch.nn.Module] = pkgutil.resolve_name(MODELS[family])
    return model

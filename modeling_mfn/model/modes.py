"""Contexts that run a model in another mode for a moment: as its base, at another alpha, frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from .steering import without_active_preset


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Puts a model into evaluation mode without its active preset, and everything back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with unsteered(model):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def unsteered(model: Any) -> Iterator[None]:
    """Switches the preset off that is active by default, in this task, until the block is left."""
    with ExitStack() as readers:
        for part in model.modules():
            if hasattr(part, "active_context"):  # an MFN model, also inside an adapter or a wrapper
                readers.enter_context(without_active_preset(part))
        yield


@contextmanager
def at_alpha(model: Any, alpha: float) -> Iterator[None]:
    """Sets a model's alpha, in [0, 1], and sets it back afterwards."""
    before = next(iter(model.mfn_layers.values())).alpha
    model.set_blend(alpha)
    try:
        yield
    finally:
        model.set_blend(before)


@contextmanager
def as_base(model: Any) -> Iterator[None]:
    """Makes a model its base for a moment: alpha 0, without dropout."""
    with evaluating(model), at_alpha(model, 0.0):
        yield


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Puts a model into evaluation mode with gradients for codes and inputs alone, not for its parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


__all__ = ["as_base", "at_alpha", "evaluating", "frozen", "unsteered"]

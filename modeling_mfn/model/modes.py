"""Contexts that run a model in another mode for a moment: as its base, at another alpha, frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode while it is entered."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """The model in evaluation mode, its parameters without gradients: those of codes and inputs are all that is
    wanted, and those of weights cost more than all the rest."""
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@contextmanager
def as_base(model: Any) -> Iterator[None]:
    """The model as its base: alpha 0 and without dropout, and as it was afterwards."""
    alpha, training = model.config.alpha, model.training
    model.set_blend(0.0)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        model.set_blend(alpha)


@contextmanager
def at_alpha(model: Any, alpha: float) -> Iterator[None]:
    """The model at an alpha, 1 for reading features alone, and as it was afterwards."""
    before = model.config.alpha
    model.set_blend(alpha)
    try:
        yield
    finally:
        model.set_blend(before)


__all__ = ["as_base", "at_alpha", "evaluating", "frozen"]

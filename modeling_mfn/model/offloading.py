"""Weights that accelerate keeps on another device or on the disk until a module is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn


def in_memory(*modules: nn.Module) -> AbstractContextManager[None]:
    """Brings offloaded weights of modules into memory for a moment.

    accelerate does this around a module's forward. A caller that reads a module's weights itself needs this context.
    Contexts can be nested.
    """
    offloaded: list[Any] = [
        module
        for module in modules
        if hasattr(module, "_hf_hook") and any(parameter.is_meta for parameter in module.parameters())
    ]
    return _loaded(offloaded) if offloaded else nullcontext()


@contextmanager
def _loaded(modules: list[Any]) -> Iterator[None]:
    for module in modules:
        module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        for module in modules:
            module._hf_hook.post_forward(module, None)


def check_in_memory(model: nn.Module, what: str) -> None:
    """Checks that a model can be read outside of its forward; `ValueError` that names `what` if it is offloaded."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{what} needs all weights in memory; load the model without offloading")


__all__ = ["check_in_memory", "in_memory"]

"""Weights that accelerate keeps on another device or on the disk until a module is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn


def in_memory(*modules: nn.Module) -> AbstractContextManager[None]:
    """Brings offloaded weights of modules into memory for a moment.

    accelerate does this around a module's forward. A caller that reads a module's weights itself needs this context.
    """
    offloaded = {module: hook for module in modules if (hook := getattr(module, "_hf_hook", None)) is not None}
    return _loaded(offloaded) if offloaded else nullcontext()


@contextmanager
def _loaded(hooks: dict[nn.Module, Any]) -> Iterator[None]:
    for module, hook in hooks.items():
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooks.items():
            hook.post_forward(module, None)


__all__ = ["in_memory"]

"""Distillation: the base model's distribution of the next token as the target of the utility loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..model.modes import as_base


@torch.no_grad()
def base_logits(model: nn.Module, inner: Any, base_model: nn.Module | None, inputs: Mapping[str, Any]) -> Tensor:
    """Computes the base model's logits (B, T, V).

    Args:
        model: the model in training, as FSDP and DDP wrapped it.
        inner: the same model without their wrapping.
        base_model: the base model; `None` if the model at alpha = 0 and without adapters is its base.
        inputs: of the model's forward.
    """
    if base_model is not None:
        return base_model(**inputs).logits
    with _without_training(inner):
        return model(**inputs).logits


@contextmanager
def _without_training(model: Any) -> Iterator[None]:
    adapters: AbstractContextManager = model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
    with adapters, as_base(model):
        yield


__all__ = ["base_logits"]

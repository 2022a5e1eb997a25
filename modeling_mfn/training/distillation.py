"""Distillation: the base model's distribution of the next token, and its residual streams, as targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..model.modes import as_base
from .losses import reconstruction_loss


@torch.no_grad()
def base_outputs(model: nn.Module, inner: Any, base_model: nn.Module | None, inputs: Mapping[str, Any]) -> Any:
    """Runs the base model: its outputs, with logits (B, T, V).

    Args:
        model: the model in training, as FSDP and DDP wrapped it.
        inner: the same model without their wrapping.
        base_model: the base model; `None` if the model at alpha = 0 and without adapters is its base.
        inputs: of the model's forward.
    """
    if base_model is not None:
        return base_model(**inputs)
    with _without_training(inner):
        return model(**inputs)


def streams_loss(streams: Sequence[Tensor], targets: Sequence[Tensor], mask: Tensor, normalize: bool = True) -> Tensor:
    """Distance of residual streams to the base model's, summed over blocks: eq. 5 with the base's stream as h.

    Args:
        streams: hidden states of a model (B, T, d): the embeddings, then one for each block.
        targets: hidden states of its base.
        mask: (B, T), nonzero where a token counts.
        normalize: divide each token's distance by the variance of the target's entries.
    """
    pairs = zip(targets[1:], streams[1:], strict=True)
    losses = [reconstruction_loss(h, ours, mask.to(h.device), normalize) for h, ours in pairs]
    return torch.stack([loss.to(mask.device) for loss in losses]).sum()


@contextmanager
def _without_training(model: Any) -> Iterator[None]:
    adapters: AbstractContextManager = model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
    with adapters, as_base(model):
        yield


__all__ = ["base_outputs", "streams_loss"]

"""Signs of a training that knows nothing of MFN layers, told once: nothing is learnt, or directions change length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

NORM_TOLERANCE = 0.02
"""Deviation of a direction's norm that no rounding explains: a cast to bfloat16 changes it by at most 0.4 %."""
TRAINERS = "MFNTrainer and MFNTrainerMixin do"


def tell_if_nothing_is_learnt(model: Any) -> None:
    """Warns of a forward in training at alpha 0 without inputs of feature losses, where MFN layers learn nothing."""
    layers = model.mfn_layers.values()
    if not any(layer.alpha for layer in layers) and any(each.encoder.weight.requires_grad for each in layers):
        logger.warning_once(
            "MFN layers are trained at alpha 0 without a loss of features, and learn nothing. Train with a Trainer "
            f"that raises alpha and has these losses: {TRAINERS}"
        )


def tell_of_norms(model: Any) -> None:
    """Warns if a training has left directions at other norms than 1, or than those that `model.bake` gave them."""
    wrong = {number: norm for number, layer in model.mfn_layers.items() if (norm := _worst_norm(layer)) is not None}
    if wrong and model._was_trained():
        number, norm = next(iter(wrong.items()))
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        logger.warning(
            f"training has left a direction of layer {number}{more} at {norm:.2f} of its norm. Train with a Trainer "
            f"that keeps norms: {TRAINERS}. In a loop of your own, call layer.normalise_directions() after each step"
        )


@torch.no_grad()
def _worst_norm(layer: Any) -> float | None:
    """Norm of the direction that is farthest from its own, as a share of that; `None` if all are kept, or unknown."""
    weight: nn.Parameter = layer.decoder.weight
    if type(weight.detach()) is not Tensor or weight.is_meta or not weight.is_floating_point():
        return None
    found, expected = weight.float().norm(dim=-1), layer.expected_directions().norm(dim=-1)
    shares = torch.where(expected > 0, found / expected, 1)
    worst = shares[(shares - 1).abs().argmax()]
    return float(worst) if abs(float(worst) - 1) > NORM_TOLERANCE else None


__all__ = ["tell_if_nothing_is_learnt", "tell_of_norms"]

"""Facts about features that follow from weights alone: next tokens that a direction promotes, and its neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...model.families import family_of
from ...model.mfn_for_causal_lm import MFNForCausalLM
from ...model.mfn_layer import MFNLayer
from ...model.mfn_pass import MFNPass

LOGITS_AT_ONCE = 2**24
FEATURES_AT_ONCE = 1024
"""Rows of the table of cosines that are held in memory."""


class Ranked(NamedTuple):
    """The n first tokens or features for each of m features."""

    indices: np.ndarray
    """(m, n) int64."""
    scores: np.ndarray
    """(m, n) float32, in the order of rank."""


@contextmanager
def recording_scales(model: MFNForCausalLM) -> Iterator[dict[int, Tensor]]:
    """Records how much of an activation reaches the LM head, on each forward inside the context.

    The scale of a token is what an activation of 1 becomes after the final norm's division. It is the standard
    deviation that the MFN layer multiplies by, divided by the final norm's denominator. A layer without `input_norm`
    multiplies by 1.

    Yields:
        Dictionary layer -> scales (B, T); every forward fills it anew.
    """
    stds: dict[int, Tensor] = {}
    scales: dict[int, Tensor] = {}
    norm, form = final_norm(model), family_of(model.config.text_config).norm

    def at_layer(module: MFNLayer, arguments: tuple[Tensor, MFNPass]) -> None:
        h = arguments[0]
        std = module.standardise(module.coded_part(*arguments)).std
        stds[module.layer_index] = torch.ones_like(h[..., 0]) if std is None else std.squeeze(-1)

    def at_norm(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        h = arguments[0].float()
        h = h - h.mean(-1, keepdim=True) if form.centred else h
        denominator = (h.square().mean(-1) + form.epsilon_of(module)).sqrt()
        scales.update({layer: std / denominator for layer, std in stds.items()})

    hooks = [layer.register_forward_pre_hook(at_layer) for layer in model.mfn_layers.values()]
    hooks.append(norm.register_forward_pre_hook(at_norm))
    try:
        yield scales
    finally:
        for hook in hooks:
            hook.remove()


def final_norm(model: MFNForCausalLM) -> nn.Module:
    """Norm between the last block and the LM head."""
    norm: nn.Module = getattr(model.model.backbone, family_of(model.config.text_config).final_norm)
    return norm


def through_final_norm(model: MFNForCausalLM, directions: Tensor) -> Tensor:
    """Directions (..., d) as the LM head reads them, float32, with the final norm's denominator taken as 1.

    The result is s g * D_f, with the norm's gain g and the factor s from the LM head's outputs to the logits. LayerNorm
    takes the mean out of D_f first. A cap of the logits is not in it.
    """
    config, directions = model.config.text_config, directions.float()
    family = family_of(config)
    if family.norm.centred:
        directions = directions - directions.mean(-1, keepdim=True)
    gain = family.norm.gain_of(final_norm(model))
    return directions * family.logits.scale(config) * (1.0 if gain is None else gain.float())


@torch.no_grad()
def logit_effects(
    model: MFNForCausalLM, layer: int, scale: float, count: int, vocabulary: int
) -> tuple[Ranked, Ranked]:
    """Ranks the tokens whose logits a feature's direction raises and lowers most, on its direct path to the LM head.

    With the final norm's denominator held fixed, an activation of 1 adds `scale` U (g * D_f) to the logits. U is the LM
    head, g the norm's gain, and D_f the direction (without its mean for LayerNorm). The factor of a family whose logits
    are scaled is in it, and a cap of its logits is not. What later blocks make of the feature comes on top. Effects are
    those at alpha = 1. With `blend_into="mlp"` there is no direct path, and the ranking only shows the tokens that a
    direction points to.

    Args:
        model: MFN model.
        layer: Block with an MFN layer.
        scale: Mean over tokens of what `recording_scales` records.
        count: n, tokens on each side.
        vocabulary: Number of tokens to choose from, the first ones of the LM head.

    Returns:
        The most promoted and the most suppressed tokens, with effects in logits.
    """
    directions = through_final_norm(model, model.mfn_layers[layer].directions()) * scale
    head = model.lm_head.weight[:vocabulary].float()
    up, down = [], []
    for chunk in directions.split(max(1, LOGITS_AT_ONCE // len(head))):
        effects = chunk @ head.T
        up.append(effects.topk(min(count, len(head))))
        down.append(effects.topk(min(count, len(head)), largest=False))
    return _ranked(up), _ranked(down)


@torch.no_grad()
def nearest_features(model: MFNForCausalLM, layer: int, count: int) -> Ranked:
    """Ranks the other features of a layer by the cosine of their direction with a feature's."""
    directions = nn.functional.normalize(model.mfn_layers[layer].directions().float(), dim=-1)
    found = []
    for start in range(0, len(directions), FEATURES_AT_ONCE):
        cosines = directions[start : start + FEATURES_AT_ONCE] @ directions.T
        cosines.diagonal(start).fill_(-torch.inf)
        found.append(cosines.topk(min(count, len(directions) - 1)))
    return _ranked(found)


def _ranked(parts: list[torch.return_types.topk]) -> Ranked:
    indices, values = torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])
    return Ranked(indices.cpu().numpy(), values.cpu().numpy())


__all__ = ["Ranked", "final_norm", "logit_effects", "nearest_features", "recording_scales", "through_final_norm"]

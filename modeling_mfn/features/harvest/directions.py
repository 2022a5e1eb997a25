"""What the weights alone say about features: the next tokens that a direction speaks for, and its neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...model.families import family_of
from ...model.modeling_mfn import MFNForCausalLM

LOGITS_AT_ONCE = 2**24


class Ranked(NamedTuple):
    """For each of m features, the n first of something."""

    indices: np.ndarray
    """(m, n) int64."""
    scores: np.ndarray
    """(m, n) float32, the first first."""


def final_norm(model: MFNForCausalLM) -> nn.Module:
    """The norm between the last block and the LM head."""
    norm: nn.Module = getattr(model.model.backbone, family_of(model.config.text_config).final_norm)
    return norm


@contextmanager
def recording_scales(model: MFNForCausalLM) -> Iterator[dict[int, Tensor]]:
    """While it is entered, each forward fills what it yields: layer -> (B, T), what an activation of 1 becomes where
    the final norm has divided: std of the layer's input, if it standardises, by the final norm's denominator."""
    stds: dict[int, Tensor] = {}
    scales: dict[int, Tensor] = {}
    norm = final_norm(model)

    def at_layer(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        h = arguments[0].float()
        layer = int(module.layer_index)  # type: ignore[arg-type]
        if model.config.input_norm == "layer":  # torch.std gives the same in five times as long
            stds[layer] = torch.linalg.vector_norm(h - h.mean(-1, keepdim=True), dim=-1) / (h.shape[-1] - 1) ** 0.5
        else:
            stds[layer] = torch.ones_like(h[..., 0])

    def at_norm(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        h = arguments[0].float()
        h = h - h.mean(-1, keepdim=True) if isinstance(module, nn.LayerNorm) else h
        epsilon = getattr(module, "eps", getattr(module, "variance_epsilon", 0.0))
        denominator = (h.square().mean(-1) + epsilon).sqrt()
        scales.update({layer: std / denominator for layer, std in stds.items()})

    hooks = [layer.register_forward_pre_hook(at_layer) for layer in model.mfn_layers.values()]
    hooks.append(norm.register_forward_pre_hook(at_norm))
    try:
        yield scales
    finally:
        for hook in hooks:
            hook.remove()


def through_final_norm(model: MFNForCausalLM, directions: Tensor) -> Tensor:
    """Directions (..., d) as the LM head reads them, with the final norm's denominator taken as 1: g * D_f, D_f without
    its mean where the norm is a LayerNorm; float32."""
    norm, directions = final_norm(model), directions.float()
    if isinstance(norm, nn.LayerNorm):
        directions = directions - directions.mean(-1, keepdim=True)
    return directions * norm.get_parameter("weight").float()


@torch.no_grad()
def logit_effects(
    model: MFNForCausalLM, layer: int, scale: float, count: int, vocabulary: int
) -> tuple[Ranked, Ranked]:
    """The tokens whose logits a feature's direction raises and lowers most, on its direct path to the LM head.

    With the final norm's denominator held fixed, an activation of 1 adds `scale` U (g * D_f) to the logits, U the LM
    head and g the norm's weight; where the norm is a LayerNorm, D_f without its mean. `scale` is the mean over tokens
    of what `recording_scales` yields. What blocks above make of the feature comes on top. The effect is that at
    alpha = 1; with `blend_into="mlp"`, where there is no such path, it says which tokens the direction points to.

    Args:
        model: an MFN model.
        layer: one of its MFN layers.
        scale: see above.
        count: n, tokens on each side.
        vocabulary: tokens to choose from, the first of the LM head.

    Returns:
        The most promoted and the most suppressed tokens, effects in logits.
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
    """The features whose directions have the largest cosine with a feature's, itself left out."""
    directions = nn.functional.normalize(model.mfn_layers[layer].directions().float(), dim=-1)
    found = []
    for start in range(0, len(directions), 1024):
        cosines = directions[start : start + 1024] @ directions.T
        cosines.diagonal(start).fill_(-torch.inf)
        found.append(cosines.topk(min(count, len(directions) - 1)))
    return _ranked(found)


def _ranked(parts: list[torch.return_types.topk]) -> Ranked:
    indices, values = torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])
    return Ranked(indices.cpu().numpy(), values.cpu().numpy())

"""Baking: interventions written into the weights, so that a steered model is an ordinary checkpoint."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .interventions import CheckedInterventions
from .mfn_layer import MFNLayer


class _Baked(NamedTuple):
    """New values for one layer."""

    layer: MFNLayer
    at: Tensor
    """Rows of the decoder."""
    rows: Tensor
    bias: Tensor | None
    """None where it stays."""


@torch.no_grad()
def bake(layers: dict[int, MFNLayer], interventions: CheckedInterventions) -> None:
    """With z_f <- s z_f + c, h_hat = D z + b becomes the same of D_f <- s D_f and b <- b + c D_f.

    Raises:
        ValueError: if the weights cannot hold an intervention; then none has changed.
    """
    for (layer, index), intervention in interventions.items():
        if intervention.when is not None:
            raise ValueError(f"{intervention!r} on L{layer}/{index} has a condition; weights act on every token alike")
    new = []
    for layer in sorted({layer for layer, _ in interventions}):
        new.append(
            _rewritten(layers[layer], {f: each.coefficients for (at, f), each in interventions.items() if at == layer})
        )
    for baked in new:
        baked.layer.decoder.weight[baked.at] = baked.rows
        if baked.bias is not None and baked.layer.decoder.bias is not None:
            baked.layer.decoder.bias.copy_(baked.bias)


def _rewritten(layer: MFNLayer, coefficients: dict[int, tuple[float, float]]) -> _Baked:
    """What the layer's decoder shall hold, `coefficients` being (s, c) by feature."""
    weight, bias, name = layer.decoder.weight, layer.decoder.bias, f"block {layer.layer_index}"
    if layer.config.shared_decoder:
        raise ValueError(f"the decoder of {name} is shared with other blocks, where the change would count, too")
    if type(weight.data) is not Tensor or weight.device.type == "meta":
        raise ValueError(
            f"the weights of {name} are not in memory as a whole; bake before they are spread or offloaded"
        )
    at = layer.rows_of(torch.tensor(list(coefficients)))[2][1]
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale, shift = torch.tensor(list(coefficients.values()), device=weight.device, dtype=wide).unbind(-1)
    old = weight[at].to(wide)
    rows = (scale.unsqueeze(-1) * old).to(weight.dtype)
    moved = None
    if shift.any():
        if bias is None:
            raise ValueError(f"{name} has no decoder bias, which a Clamp or Add needs; Scale and Ablate go without")
        moved = (bias.to(wide) + shift @ old).to(bias.dtype)
    if not torch.isfinite(rows).all() or not (moved is None or torch.isfinite(moved).all()):
        raise ValueError(f"the changed weights of {name} are too large for {weight.dtype}")
    return _Baked(layer, at, rows, moved)


__all__ = ["bake"]

"""Sums over tokens of what MFN layers read, fire and miss: the raw material of firing rates and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor

from ..model.configuration_mfn import MFNConfig
from ..model.mfn_layer import MFNLayer
from ..model.mfn_pass import Reconstruction

LEAST_VARIATION = 0.01
"""Floor of the varying share. A residual stream that is one vector in every token would otherwise be divided by 0."""


@dataclass(frozen=True)
class FeatureSums:
    """Sums over the tokens that count, for L MFN layers in the config's order. x is the encoder's input."""

    tokens: Tensor
    """(), number of tokens."""
    fired: Tensor
    """(L, m), tokens on which each feature is active."""
    standardised: Tensor
    """(L, d), sum of the standardised residual stream."""
    inputs: Tensor
    """(L, d), sum of x."""
    squares: Tensor
    """(L,), sum of |x|^2."""
    errors: Tensor
    """(L,), sum of |x - x_hat|^2."""

    @classmethod
    def zero(cls, config: MFNConfig, device: torch.device | str) -> FeatureSums:
        """Sums over no tokens."""
        layers, m, d = len(config.layers), config.num_features, config.hidden_size
        shapes = ((), (layers, m), (layers, d), (layers, d), (layers,), (layers,))
        return cls(*(torch.zeros(shape, device=device) for shape in shapes))

    @classmethod
    @torch.no_grad()
    def of(cls, layers: Mapping[int, MFNLayer], items: Mapping[int, Reconstruction], mask: Tensor) -> FeatureSums:
        """Sums over one batch in this process, on the device of `mask` (B, T), nonzero where a token counts."""
        found = [_sums_of_layer(layers[number], items[number], mask) for number in layers]
        parts = [torch.stack([part.float().to(mask.device) for part in column]) for column in zip(*found, strict=True)]
        return cls(mask.bool().sum().float(), *parts)

    def __add__(self, other: FeatureSums) -> FeatureSums:
        return FeatureSums(**{name: part + getattr(other, name) for name, part in vars(self).items()})

    def over_processes(self) -> FeatureSums:
        """Sums over all processes, in every process."""
        return FeatureSums(**reduce(vars(self), "sum"))

    def variation(self) -> list[float]:
        """Varying share of the residual stream per layer, without the bias of a mean over few tokens."""
        count = float(self.tokens)
        if count < 2:
            return [1.0] * len(self.fired)
        return varying_share(self.standardised / count, count / (count - 1))


def _sums_of_layer(layer: MFNLayer, item: Reconstruction, mask: Tensor) -> tuple[Tensor, ...]:
    counted = mask.bool().to(item.residual.device)
    active = item.code.indices[counted][item.code.values[counted] > 0]
    x, error = (part[counted].float() for part in layer.input_and_error(item))
    return (
        torch.bincount(active, minlength=item.code.num_features),
        standardised(item.residual[counted]).sum(0),
        x.sum(0),
        x.square().sum(),
        error.square().sum(),
    )


def standardised(residual: Tensor) -> Tensor:
    """Standardises residual streams (..., d): each token minus its mean over entries, scaled to a mean square of 1."""
    centred = residual.float() - residual.float().mean(-1, keepdim=True)
    return F.normalize(centred, dim=-1) * math.sqrt(residual.shape[-1])


def varying_share(common: Tensor, correction: float = 1.0) -> list[float]:
    """Share of the standardised residual stream's square that differs between tokens, per layer.

    Args:
        common: (L, d) mean of the standardised residual stream over tokens.
        correction: N / (N - 1) for a mean over N tokens, which is larger than that over all tokens.
    """
    return ((1 - common.square().mean(-1)) * correction).clamp_min(LEAST_VARIATION).tolist()


def kept_features(config: MFNConfig) -> Tensor:
    """Mask (L, m) of the features that are not pruned."""
    kept = torch.ones(len(config.layers), config.num_features, dtype=torch.bool)
    for place, layer in enumerate(config.layers):
        kept[place, config.pruned_features.get(str(layer), [])] = False
    return kept


__all__ = ["FeatureSums", "kept_features", "standardised", "varying_share"]

"""Figures that a training or an evaluation reports: parts of the loss, and what the features do."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate.utils import reduce
from torch import Tensor

from ..model.configuration_mfn import MFNConfig
from .feature_sums import FeatureSums, kept_features

LEAST_DIVISOR = 1e-30
"""Floor of variances and rates in a ratio: far below any of them, and no ratio overflows."""


class Averages:
    """Weighted averages of named scalars over processes. Each name is averaged over the batches that have it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        """Name -> (2,): sum of the scalars, sum of their weights."""

    def add(self, parts: Mapping[str, Tensor], factor: float, weight: float) -> None:
        """Adds `factor` times each scalar to its sum, and `weight` to its weights."""
        for name, part in parts.items():
            part = part.detach().float()
            self._sums[name] = self._sums.get(name, 0.0) + torch.stack([part * factor, torch.full_like(part, weight)])

    def take(self) -> dict[str, float]:
        """Returns the averages and starts again."""
        if not self._sums:
            return {}
        device = next(iter(self._sums.values())).device
        sums = reduce(torch.stack([both.to(device) for both in self._sums.values()]), "sum")
        averages = dict(zip(self._sums, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
        self._sums = {}
        return averages


class Measurements:
    """Parts of the loss, and figures of the features, over the batches since they were last taken."""

    def __init__(self, config: MFNConfig, device: torch.device | str) -> None:
        self.config = config
        self._parts = Averages()
        self._nothing = self._sums = FeatureSums.zero(config, device)

    def add(self, parts: Mapping[str, Tensor], factor: float, weight: float) -> None:
        """Adds parts of the loss, as [`Averages.add`] does."""
        self._parts.add(parts, factor, weight)

    def count(self, sums: FeatureSums) -> None:
        """Adds the tokens of a batch in this process."""
        self._sums = self._sums + sums

    def take(self, by_layer: bool, dead: Tensor | None = None) -> dict[str, float]:
        """Returns all figures by name, as means over layers, and starts again.

        Args:
            by_layer: add each layer's own figures as `layer_6/<name>`.
            dead: (L, m) mask of dead features; by default features that no token of these batches activated.
        """
        found = self._parts.take()
        sums, self._sums = self._sums.over_processes(), self._nothing
        figures = layer_figures(sums, kept_features(self.config).to(sums.fired.device), dead)
        for name in figures[0]:
            found[name] = sum(of_layer[name] for of_layer in figures) / len(figures)
        if by_layer:
            for layer, of_layer in zip(self.config.layers, figures, strict=True):
                found |= {f"layer_{layer}/{name}": value for name, value in of_layer.items()}
        return found


def layer_figures(sums: FeatureSums, kept: Tensor, dead: Tensor | None = None) -> list[dict[str, float]]:
    """Figures of each MFN layer, over the tokens of `sums` and the features in `kept` (L, m).

    - `explained_variance`: 1 - sum |x - x_hat|^2 / sum |x - mean x|^2 over tokens, x the encoder's input;
    - `active_features`: mean number per token;
    - `firing_rate_std`, `firing_rate_cv`: standard deviation over features, and its ratio to their mean;
    - `dead_share`: share of features in `dead` (L, m), by default of features that no token activated.
    """
    tokens = sums.tokens.clamp_min(1)
    rates, dead = sums.fired / tokens, sums.fired == 0 if dead is None else dead
    unexplained = sums.errors / (sums.squares - sums.inputs.square().sum(-1) / tokens).clamp_min(LEAST_DIVISOR)
    figures = []
    for place, of_layer in enumerate(kept):
        of_kept = rates[place, of_layer]
        figures.append(
            {
                "explained_variance": 1 - float(unexplained[place]),
                "active_features": float(rates[place].sum()),
                "firing_rate_std": float(of_kept.std()),
                "firing_rate_cv": float(of_kept.std() / of_kept.mean().clamp_min(LEAST_DIVISOR)),
                "dead_share": float(dead[place, of_layer].float().mean()),
            }
        )
    return figures


__all__ = ["Averages", "Measurements", "layer_figures"]

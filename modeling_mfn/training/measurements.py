"""Figures that a training or an evaluation reports: parts of the loss, and what the features do."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate.utils import reduce
from torch import Tensor

from ..model.configuration_mfn import MFNConfig
from .arguments import LAMBDAS, OF_THE_MODEL
from .feature_sums import FeatureSums, kept_features
from .losses import rate_divergence
from .objective import FeatureObjective

LEAST_DIVISOR = 1e-30
"""Floor of variances and rates in a ratio: far below any of them, and no ratio overflows."""


class Averages:
    """Weighted averages of named scalars over processes. Each name is averaged over the batches that have it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        """Name -> (2,): sum of the scalars, sum of their weights."""

    def add(self, parts: Mapping[str, Tensor], factor: float | Tensor, weight: float | Tensor) -> None:
        """Adds `factor` times each scalar to its sum, and `weight` to its weights. A weight of 0 adds nothing."""
        for name, part in parts.items():
            part = part.detach().float()
            weights = weight.to(part) if isinstance(weight, Tensor) else torch.full_like(part, weight)
            # where() instead of a product: a mean over nothing is nan
            both = torch.stack([torch.where(weights > 0, part * factor, 0), weights])
            self._sums[name] = self._sums.get(name, 0.0) + both

    def take(self) -> dict[str, float]:
        """Returns the averages and starts again. What has no weight has no average."""
        if not self._sums:
            return {}
        device = next(iter(self._sums.values())).device
        sums = reduce(torch.stack([both.to(device) for both in self._sums.values()]), "sum").tolist()
        averages = {name: total / weight for name, (total, weight) in zip(self._sums, sums, strict=True) if weight}
        self._sums = {}
        return averages

    def copy(self) -> Averages:
        """Returns averages of the same scalars, to go on from."""
        copied = Averages()
        copied._sums = dict(self._sums)
        return copied


class Measurements:
    """Parts of the loss, and figures of the features, over the batches since they were last taken."""

    def __init__(self, config: MFNConfig, device: torch.device | str) -> None:
        self.config = config
        self._parts = Averages()
        self._nothing = self._sums = FeatureSums.zero(config, device)
        self._before = self._parts, self._sums

    def add(self, parts: Mapping[str, Tensor], factor: float | Tensor, weight: float | Tensor) -> None:
        """Adds parts of the loss, as [`Averages.add`] does."""
        self._parts.add(parts, factor, weight)

    def begin_step(self) -> None:
        """Remembers the figures before an optimizer step."""
        self._before = self._parts.copy(), self._sums

    def drop_step(self) -> None:
        """Forgets the batches since `begin_step`."""
        self._parts, self._sums = self._before

    def count(self, sums: FeatureSums) -> None:
        """Adds the tokens of a batch in this process."""
        self._sums = self._sums + sums

    def take(self, by_layer: bool, dead: Tensor | None = None) -> dict[str, float]:
        """Returns all figures by name, as means over layers, and starts again.

        Without any token there are no figures of features.

        Args:
            by_layer: add each layer's own figures as `layer_6/<name>`.
            dead: (L, m) mask of dead features; by default features that no token of these batches activated.
        """
        sums, self._sums = self._sums.over_processes(), self._nothing
        found = self._losses(sums, by_layer)
        if not sums.tokens:
            return found
        figures = layer_figures(sums, kept_features(self.config).to(sums.fired.device), dead)
        for name in figures[0]:
            found[name] = sum(of_layer[name] for of_layer in figures) / len(figures)
        if by_layer:
            for layer, of_layer in zip(self.config.layers, figures, strict=True):
                found |= {f"layer_{layer}/{name}": value for name, value in of_layer.items()}
        return found

    def _losses(self, sums: FeatureSums, by_layer: bool) -> dict[str, float]:
        """Returns the parts of the loss; `sums` are those of all processes."""
        return self._parts.take()


class Evaluation(Measurements):
    """Figures of an evaluation, which are those of all its tokens, however they are divided into batches.

    Only the competition loss is a mean over batches, as its covariances are those of one batch.

    Args:
        config: of the model.
        objective: its feature losses.
        device: of the figures.
    """

    def __init__(self, config: MFNConfig, objective: FeatureObjective, device: torch.device | str) -> None:
        super().__init__(config, device)
        self._objective = objective
        self.batches = 0
        """Number of batches in this process."""

    def add_batch(
        self,
        parts: Mapping[str, Tensor],
        layers: Mapping[int, Mapping[str, Tensor]],
        sums: FeatureSums,
        predicted: Tensor,
    ) -> None:
        """Adds a batch in this process.

        Args:
            parts: losses of the model; those of layers are left out.
            layers: layer -> feature losses. Reconstruction losses are not yet divided by the varying share.
            sums: sums over the batch's tokens.
            predicted: tokens that the utility loss is a mean over.
        """
        self.batches += 1
        for name in OF_THE_MODEL:
            if name in parts:
                weight = predicted if name == "util" else sums.tokens
                self.add({f"{name}_loss": parts[name]}, weight, weight)
        for layer, losses in layers.items():
            self.add({name_of_loss(layer, name): loss for name, loss in losses.items()}, sums.tokens, sums.tokens)
        self.count(sums)

    def _losses(self, sums: FeatureSums, by_layer: bool) -> dict[str, float]:
        found = self._parts.take()
        args, layers = self._objective.args, self.config.layers
        for layer, share, fired in zip(layers, sums.variation(), sums.fired, strict=True):
            if args.normalize_losses and (recon := name_of_loss(layer, "recon")) in found:
                found[recon] /= share
            if (rate := name_of_loss(layer, "rate")) in found:
                found[rate] = float(rate_divergence(fired / sums.tokens, self._objective.rho))
        for name in LAMBDAS:
            of_layers = [found[each] for layer in layers if (each := name_of_loss(layer, name)) in found]
            if of_layers:
                found[f"{name}_loss"] = sum(of_layers) / len(of_layers)
        if parts := [name for name in LAMBDAS if f"{name}_loss" in found]:
            found["loss"] = sum(self._objective.weight(name) * found[f"{name}_loss"] for name in parts)
        return {name: value for name, value in found.items() if by_layer or not name.startswith("layer_")}


def name_of_loss(layer: int, name: str) -> str:
    """Returns the name of a layer's own loss in logs."""
    return f"layer_{layer}/{name}_loss"


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
        deviation = float(of_kept.std()) if len(of_kept) > 1 else 0.0
        count = max(len(of_kept), 1)
        figures.append(
            {
                "explained_variance": 1 - float(unexplained[place]),
                "active_features": float(rates[place].sum()),
                "firing_rate_std": deviation,
                "firing_rate_cv": deviation / max(float(of_kept.sum()) / count, LEAST_DIVISOR),
                "dead_share": float(dead[place, of_layer].sum()) / count,
            }
        )
    return figures


__all__ = ["Averages", "Evaluation", "Measurements", "layer_figures", "name_of_loss"]

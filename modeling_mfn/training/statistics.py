"""Running statistics that a training acts on: firing rates, silent features, the varying share of residual streams."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..model.configuration_mfn import MFNConfig
from ..utils.readers import readable
from .feature_sums import FeatureSums, kept_features, varying_share

STATE_FILE = "feature_statistics.safetensors"


class FeatureStatistics:
    """Statistics of L MFN layers over recent tokens, equal in every process.

    Means are over about `window` tokens, with exponentially falling weights. As long as fewer tokens were seen, means
    are over all of them. Pruned features are never dead and never below a rate.

    Args:
        config: of the model in training.
        window: tokens that means are over. A feature is dead if it is silent for as many tokens.
        device: of the statistics.
    """

    rates: Tensor
    """(L, m), mean firing rates."""
    common: Tensor
    """(L, d), mean of the standardised residual stream."""
    silent_for: Tensor
    """(L, m), tokens since a feature was last active."""
    kept: Tensor
    """(L, m), False for pruned features."""

    def __init__(self, config: MFNConfig, window: int, device: torch.device | str = "cpu") -> None:
        self.layers = list(config.layers)
        self.window = window
        self.kept = kept_features(config).to(device)
        self.rates = torch.zeros(self.kept.shape, device=device)
        self.common = torch.zeros(len(self.layers), config.hidden_size, device=device)
        self.silent_for = torch.zeros_like(self.rates)
        self._weight = torch.zeros(1, device=device)  # of the tokens in both means: at most `window`
        self._nothing = self._step = FeatureSums.zero(config, device)

    def add(self, sums: FeatureSums) -> None:
        """Adds a batch of this process to the optimizer step."""
        self._step = self._step + sums

    def step(self) -> None:
        """Ends an optimizer step: the batches of all processes since the last step become part of the means."""
        sums, self._step = self._step.over_processes(), self._nothing
        tokens = float(sums.tokens)
        if tokens == 0:
            return
        decay = math.exp(-tokens / self.window)
        self._weight = self._weight * decay + self.window * (1 - decay)
        newest = self.window * (1 - decay) / self._weight
        self.rates = torch.lerp(self.rates, sums.fired / tokens, newest)
        self.common = torch.lerp(self.common, sums.standardised / tokens, newest)
        self.silent_for = torch.where(sums.fired > 0, 0, self.silent_for + tokens)

    def drop_step(self) -> None:
        """Forgets the batches since the last step."""
        self._step = self._nothing

    def variation(self) -> list[float]:
        """Varying share of the residual stream per layer; 1 before any token was seen."""
        return varying_share(self.common)

    def below(self, rate: float) -> dict[int, Tensor]:
        """Layer -> features (R,) that fire at less than `rate`; layers without such features are left out.

        Returns {} until enough tokens were seen for a feature at this rate to fire once.
        """
        tokens_per_firing = 1 / rate if rate > 0 else math.inf
        if float(self._weight) < min(tokens_per_firing, self.window / 2):
            return {}
        low = (self.rates < rate) & self.kept
        found = {layer: low[place].nonzero().flatten() for place, layer in enumerate(self.layers)}
        return {layer: features for layer, features in found.items() if len(features)}

    def silent(self) -> Tensor:
        """Mask (L, m) of the features that were silent for `window` tokens."""
        return self.silent_for >= self.window

    def dead(self, layers: Sequence[int]) -> Tensor:
        """Features (R,) that are dead in each of `layers` in which they are not pruned."""
        places = [self.layers.index(layer) for layer in layers]
        silent, kept = self.silent()[places], self.kept[places]
        return (kept.any(0) & (silent | ~kept).all(0)).nonzero().flatten()

    def restart(self, layer: int, features: Tensor) -> None:
        """Counts features (R,) as new: the auxiliary loss trains them until they fire on their own."""
        place = self.layers.index(layer)
        self.rates[place, features] = 0
        self.silent_for[place, features] = 0

    def save(self, folder: str | Path) -> None:
        """Writes the statistics into a checkpoint."""
        save_file({name: tensor.cpu() for name, tensor in self._state().items()}, Path(folder) / STATE_FILE)

    def load(self, folder: str | Path) -> None:
        """Reads the statistics of a checkpoint. A checkpoint of weights alone has none, and changes nothing."""
        file = Path(folder) / STATE_FILE
        if file.exists():
            with readable(file):
                saved = load_file(file)
                for name, tensor in self._state().items():
                    if saved[name].shape != tensor.shape:
                        found, expected = tuple(saved[name].shape), tuple(tensor.shape)
                        raise ValueError(f"{name} has the shape {found}; this model needs {expected}")
                    tensor.copy_(saved[name])

    def _state(self) -> dict[str, Tensor]:
        return {
            "rates": self.rates, "common": self.common, "silent_for": self.silent_for, "weight": self._weight,
        }  # fmt: skip


__all__ = ["FeatureStatistics"]

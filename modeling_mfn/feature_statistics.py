"""What the features of a model do while it trains: firing rates, dead features, explained variance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .distributed import all_reduce_sum
from .mfn_layer import MFNLayer, Reconstruction

STATE_FILE = "feature_statistics.safetensors"


class FeatureStatistics:
    """Running figures of all MFN layers, the same in every process.

    `rates` (L, m) are firing rates, averaged over about `window` tokens with exponentially falling weights, or over all
    as long as there were fewer; `silent_for` (L, m) counts the tokens since a feature was last active. The figures of
    `take` are those of the tokens since it was last called. Pruned features, given by layer as in the config, are
    neither dead nor alive: they are left out of all but `rates` and `silent_for`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_features: int,
        hidden_size: int,
        window: int,
        device: torch.device | str = "cpu",
        pruned: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.layers = list(layers)
        self.window = window
        shape = (len(self.layers), num_features)
        self.rates = torch.zeros(shape, device=device)
        self._weight = torch.zeros(1, device=device)  # of the tokens in `rates`: at most `window`
        self.silent_for = torch.zeros(shape, device=device)
        self._kept = torch.ones(shape, dtype=torch.bool, device=device)
        for layer, features in (pruned or {}).items():
            self._kept[self.layers.index(int(layer)), list(features)] = False
        self._fired, self._tokens = torch.zeros(shape, device=device), torch.zeros(1, device=device)
        # per layer: sums over tokens of x (d), of |x|^2 and of the squared error, in the encoder's standardised space
        self._sums = torch.zeros(len(self.layers), hidden_size + 2, device=device)
        self._start_window()

    def _start_window(self) -> None:
        self._sums.zero_()
        self._window_fired, self._window_tokens = torch.zeros_like(self._fired), 0.0

    @torch.no_grad()
    def count(self, layers: Mapping[int, MFNLayer], items: Mapping[int, Reconstruction], mask: Tensor | None) -> None:
        """Takes in one batch of this process."""
        for place, layer in enumerate(self.layers):
            item = items[layer]
            counted = torch.ones(item.residual.shape[:-1]) if mask is None else mask
            counted = counted.bool().to(item.residual.device)
            active = item.code.indices[counted][item.code.values[counted] > 0]
            self._fired[place] += torch.bincount(active, minlength=self._fired.shape[1]).to(self._fired)
            x = layers[layer].standardise(item.residual)[0][counted].float()
            error = layers[layer].error(item)[counted].float()
            sums = torch.cat([x.sum(0), x.square().sum()[None], error.square().sum()[None]])
            self._sums[place] += sums.to(self._sums)
        self._tokens += int(counted.sum())

    def step(self) -> None:
        """Ends an optimizer step: the batches counted since the last one become part of the rates."""
        fired, tokens = all_reduce_sum(self._fired), float(all_reduce_sum(self._tokens))
        if tokens == 0:
            return
        kept = math.exp(-tokens / self.window)
        self._weight = self._weight * kept + self.window * (1 - kept)
        self.rates = torch.lerp(self.rates, fired / tokens, self.window * (1 - kept) / self._weight)
        self.silent_for = torch.where(fired > 0, 0, self.silent_for + tokens)
        self._window_fired += fired
        self._window_tokens += tokens
        self._fired.zero_()
        self._tokens.zero_()

    def below(self, rate: float) -> dict[int, Tensor]:
        """Layer -> features (R,) whose firing rate is below `rate`; layers without any are left out. None at all before
        rates are of so many tokens that a feature of this rate is active on one of them: of fewer, all rates are 0 that
        are not far above it."""
        if float(self._weight) < min(1 / max(rate, 1e-30), self.window / 2):
            return {}
        low = (self.rates < rate) & self._kept
        found = {layer: low[place].nonzero().flatten() for place, layer in enumerate(self.layers)}
        return {layer: features for layer, features in found.items() if len(features)}

    def dead(self, layers: Sequence[int]) -> Tensor:
        """Features (R,) that were silent for `window` tokens in each of some layers."""
        places = [self.layers.index(layer) for layer in layers]
        silent, kept = self.silent_for[places] >= self.window, self._kept[places]
        return (kept.any(0) & (silent | ~kept).all(0)).nonzero().flatten()

    def restart(self, layer: int, features: Tensor) -> None:
        """Counts features as new ones, which the auxiliary loss trains until they are active by themselves."""
        place = self.layers.index(layer)
        self.rates[place, features] = 0
        self.silent_for[place, features] = 0

    def take(self) -> dict[int, dict[str, float]]:
        """Layer -> figures, and starts a new window:

        - `explained_variance`: 1 - sum |x - x_hat|^2 / sum |x - mean x|^2 over tokens, x the encoder's input;
        - `active_features`: mean number a token;
        - `firing_rate_std`, `firing_rate_cv`: over features, and divided by their mean;
        - `dead_share`: of features that were silent for `window` tokens.
        """
        sums = all_reduce_sum(self._sums)
        rates = self._window_fired / max(self._window_tokens, 1)
        figures = {}
        for place, layer in enumerate(self.layers):
            x, square, error = sums[place, :-2], sums[place, -2], sums[place, -1]
            of_kept = rates[place, self._kept[place]]
            variance = square - x.square().sum() / max(self._window_tokens, 1)
            figures[layer] = {
                "explained_variance": 1 - float(error / variance.clamp_min(1e-30)),
                "active_features": float(rates[place].sum()),
                "firing_rate_std": float(of_kept.std()),
                "firing_rate_cv": float(of_kept.std() / of_kept.mean().clamp_min(1e-30)),
                "dead_share": float((self.silent_for[place, self._kept[place]] >= self.window).float().mean()),
            }
        self._start_window()
        return figures

    def save(self, folder: str | Path) -> None:
        """Writes what a resumed run needs."""
        save_file({name: tensor.cpu() for name, tensor in self._state().items()}, Path(folder) / STATE_FILE)

    def load(self, folder: str | Path) -> None:
        """Reads what `save` wrote; a folder without it leaves the figures as they are."""
        file = Path(folder) / STATE_FILE
        if file.exists():
            saved = load_file(file)
            for name, tensor in self._state().items():
                tensor.copy_(saved[name])

    def _state(self) -> dict[str, Tensor]:
        return {"rates": self.rates, "silent_for": self.silent_for, "weight": self._weight}

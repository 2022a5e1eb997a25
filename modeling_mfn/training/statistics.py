"""What the features of a model do while it trains: firing rates, dead features, explained variance; and how much of
what they read varies at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..model.configuration_mfn import MFNConfig
from ..model.mfn_layer import MFNLayer
from ..model.mfn_pass import Reconstruction
from ..utils.processes import all_reduce_sum


class Averages:
    """Weighted averages over processes, each over what brought it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        """Name -> the sum of the parts and that of their weights, (2,)."""

    def add(self, parts: Mapping[str, Tensor], factor: float, weight: float) -> None:
        """Adds scalars times `factor` to the sums, and `weight` to what these are divided by."""
        for name, part in parts.items():
            part = part.detach().float()
            self._sums[name] = self._sums.get(name, 0.0) + torch.stack([part * factor, torch.full_like(part, weight)])

    def take(self) -> dict[str, float]:
        """The averages; sums start again from 0."""
        if not self._sums:
            return {}
        device = next(iter(self._sums.values())).device
        sums = all_reduce_sum(torch.stack([both.to(device) for both in self._sums.values()]))
        averages = dict(zip(self._sums, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
        self._sums = {}
        return averages


STATE_FILE = "feature_statistics.safetensors"
LEAST_VARIATION = 0.01


def standardised(residual: Tensor) -> Tensor:
    """Each token's residual stream (..., d) without its mean over entries, and of mean square 1."""
    return F.layer_norm(residual.float(), residual.shape[-1:])


def variation_of(residual: Tensor, mask: Tensor) -> float:
    """As [`FeatureStatistics.variation`], of these tokens alone, without the bias that there are few of them."""
    tokens = standardised(residual[mask.bool().to(residual.device)])
    count = len(tokens)
    if count < 2:
        return 1.0
    return max(LEAST_VARIATION, (1 - float(tokens.mean(0).square().mean())) * count / (count - 1))


class FeatureStatistics:
    """Running figures of all MFN layers, the same in every process.

    `rates` (L, m) are firing rates, averaged over about `window` tokens with exponentially falling weights, or over all
    as long as there were fewer; so is `common` (L, d), the mean over tokens of the standardised residual stream.
    `silent_for` (L, m) counts the tokens since a feature was last active. The figures of `take` are those of the tokens
    since it was last called. Pruned features are neither dead nor alive: they are left out of all but `rates` and
    `silent_for`.
    """

    def __init__(self, config: MFNConfig, window: int, device: torch.device | str = "cpu") -> None:
        self.layers = list(config.layers)
        self.window = window
        shape = (len(self.layers), config.num_features)
        self.rates = torch.zeros(shape, device=device)
        self.common = torch.zeros(len(self.layers), config.hidden_size, device=device)
        self._weight = torch.zeros(1, device=device)  # of the tokens in both: at most `window`
        self.silent_for = torch.zeros(shape, device=device)
        self._kept = torch.ones(shape, dtype=torch.bool, device=device)
        for layer, features in config.pruned_features.items():
            self._kept[self.layers.index(int(layer)), list(features)] = False
        self._fired, self._tokens = torch.zeros(shape, device=device), torch.zeros(1, device=device)
        self._summed = torch.zeros_like(self.common)
        # per layer: sums over tokens of x (d), of |x|^2 and of the squared error, in the encoder's standardised space
        self._sums = torch.zeros(len(self.layers), config.hidden_size + 2, device=device)
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
            self._summed[place] += standardised(item.residual[counted]).sum(0).to(self._summed)
            self._fired[place] += torch.bincount(active, minlength=self._fired.shape[1]).to(self._fired)
            x, error = (part[counted].float() for part in layers[layer].input_and_error(item))
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
        newest = self.window * (1 - kept) / self._weight
        self.rates = torch.lerp(self.rates, fired / tokens, newest)
        self.common = torch.lerp(self.common, all_reduce_sum(self._summed) / tokens, newest)
        self.silent_for = torch.where(fired > 0, 0, self.silent_for + tokens)
        self._window_fired += fired
        self._window_tokens += tokens
        self._fired.zero_()
        self._summed.zero_()
        self._tokens.zero_()

    def variation(self) -> dict[int, float]:
        """Layer -> share of the standardised residual stream's square that is not the same in every token; 1 before
        anything was counted."""
        shares = (1 - self.common.square().mean(-1)).clamp_min(LEAST_VARIATION)
        return dict(zip(self.layers, shares.tolist(), strict=True))

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

    def figures(self, by_layer: bool) -> dict[str, float]:
        """Means over layers of what `take` gives, and with `by_layer` those of each layer as `layer_6/...`, too."""
        layers = self.take()
        names = next(iter(layers.values()))
        found = {name: sum(layer[name] for layer in layers.values()) / len(layers) for name in names}
        if by_layer:
            found |= {f"layer_{layer}/{name}": value for layer in layers for name, value in layers[layer].items()}
        return found

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
        return {
            "rates": self.rates, "common": self.common, "silent_for": self.silent_for, "weight": self._weight,
        }  # fmt: skip

"""Training of chosen features alone: everything else of the model stays bit for bit as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..model.configuration_mfn import MFNConfig
from ..model.feature_weights import WeightRows
from .arguments import parse_trainable_features


class TrainableFeatures(TrainerCallback):
    """Trains the encoder rows, biases and directions of chosen features.

    An optimizer works on whole parameters: weight decay, momentum and the unit norm of directions move rows without a
    gradient, too. So the gradients of other rows are zeroed before gradients are clipped. After each step other rows
    get back the values that they had before the training.

    Args:
        chosen: features, as [`parse_trainable_features`] reads them.
        config: of the model.

    Raises:
        ValueError: if a feature does not exist or is pruned, or layers share a decoder.
    """

    def __init__(self, chosen: Any, config: MFNConfig) -> None:
        if config.shared_decoder:
            raise ValueError(
                "trainable_features is set; it must not be with shared_decoder=True, where a direction is of all layers"
            )
        given = parse_trainable_features(chosen) or {}
        self.chosen = {int(layer): torch.tensor(indices) for layer, indices in given.items()}
        """Layer -> features (R,)."""
        for layer, features in self.chosen.items():
            for index in features.tolist():
                config.check_feature((layer, index))
        self._before: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        """Parameter, its rows that are trained, and its values before the training."""

    def freeze_the_rest(self, model: Any) -> None:
        """Turns off the gradients of every parameter that holds no row of a chosen feature."""
        model.requires_grad_(False)
        for parameter, _ in self._rows(model):
            parameter.requires_grad_(True)

    def among(self, features: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Keeps the chosen ones of some features, layer -> (R,); layers without any are left out."""
        found = {layer: features[layer] for layer in self.chosen if layer in features}
        found = {layer: some[torch.isin(some, self.chosen[layer].to(some.device))] for layer, some in found.items()}
        return {layer: some for layer, some in found.items() if len(some)}

    @torch.no_grad()
    def mask_gradients(self, model: Any) -> None:
        """Zeroes the gradients of all rows but those of the chosen features."""
        for parameter, rows in self._rows(model):
            if parameter.grad is not None:
                kept = parameter.grad[rows]
                parameter.grad.zero_()
                parameter.grad[rows] = kept

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remembers all values, before the first step of a fresh or resumed run."""
        self._before = [(p, rows, p.detach().clone()) for p, rows in self._rows(kwargs["model"])]

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restores all other rows, after directions are back at unit norm."""
        for parameter, rows, before in self._before:
            trained = parameter[rows]
            parameter.copy_(before)
            parameter[rows] = trained

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Frees the memory of the values."""
        self._before = []

    def _rows(self, model: Any) -> list[WeightRows]:
        return [rows for layer, features in self.chosen.items() for rows in model.mfn_layers[layer].rows_of(features)]


__all__ = ["TrainableFeatures"]

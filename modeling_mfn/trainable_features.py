"""Training of chosen features alone, while everything else of the model stays as it is, to the bit."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .configuration_mfn import MFNConfig
from .feature_editing import check_feature
from .feature_names import parse_feature


def parse_trainable_features(given: Any) -> dict[str, list[int]] | None:
    """Layer -> features, in JSON's form, of `{6: [7, 9]}`, of `["L6/7", "L6/9"]`, or of either as JSON or as
    `"L6/7,L6/9"`; `None` of `None`. `ValueError` for anything else."""
    if given is None:
        return None
    try:
        features = sorted({(int(layer), operator.index(index)) for layer, index in _names(given)})
    except (TypeError, ValueError):
        features = []
    if not features:
        raise ValueError(f'trainable_features is {given!r}; it must name features, {{"6": [7, 9]}} or ["L6/7", "L6/9"]')
    chosen: dict[str, list[int]] = {}
    for layer, index in features:
        chosen.setdefault(str(layer), []).append(index)
    return chosen


def _names(given: Any) -> list[tuple[Any, Any]]:
    if isinstance(given, str):
        given = json.loads(given) if given.lstrip().startswith(("{", "[")) else given.split(",")
    if isinstance(given, Mapping):
        return [(layer, index) for layer, indices in given.items() for index in indices]
    # a pair that was JSON for a while is a list
    return [parse_feature(name.strip() if isinstance(name, str) else tuple(name)) for name in given]


class TrainableFeatures(TrainerCallback):
    """Trains the encoder rows, biases and directions of chosen features.

    An optimizer works on whole parameters: weight decay, momentum and the unit norm of directions move rows without
    a gradient, too. So gradients of other rows are taken out before they are clipped, and after each step other rows
    get back the values that they had before the training.
    """

    def __init__(self, chosen: Any, config: MFNConfig) -> None:
        if config.shared_decoder:
            raise ValueError("trainable_features is set, but with shared_decoder=True directions are of all layers")
        given = parse_trainable_features(chosen) or {}
        self.chosen = {int(layer): torch.tensor(indices) for layer, indices in given.items()}
        for layer, features in self.chosen.items():
            for index in features.tolist():
                check_feature(config, layer, index)
        self._frozen: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def freeze_the_rest(self, model: Any) -> None:
        """Leaves gradients to the parameters that chosen features have rows of."""
        model.requires_grad_(False)
        for parameter, _ in self._rows(model):
            parameter.requires_grad_(True)

    def among(self, features: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Those of some features, (R,) by layer, that are chosen; layers without any are left out."""
        found = {layer: features[layer] for layer in self.chosen if layer in features}
        found = {layer: some[torch.isin(some, self.chosen[layer].to(some.device))] for layer, some in found.items()}
        return {layer: some for layer, some in found.items() if len(some)}

    @torch.no_grad()
    def mask_gradients(self, model: Any) -> None:
        """Leaves gradients to the chosen features' rows."""
        for parameter, rows in self._rows(model):
            if parameter.grad is not None:
                kept = parameter.grad[rows]
                parameter.grad.zero_()
                parameter.grad[rows] = kept

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first step, of a resumed run too."""
        self._frozen = [(p, rows, p.detach().clone()) for p, rows in self._rows(kwargs["model"])]

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the step, and after directions were brought back to unit norm."""
        for parameter, rows, before in self._frozen:
            trained = parameter[rows]
            parameter.copy_(before)
            parameter[rows] = trained

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Frees the copies."""
        self._frozen = []

    def _rows(self, model: Any) -> list[tuple[nn.Parameter, Tensor]]:
        return [pair for layer, features in self.chosen.items() for pair in model.mfn_layers[layer].rows_of(features)]


__all__ = ["TrainableFeatures", "parse_trainable_features"]

"""Training of chosen features alone, while everything else of the model stays as it is, to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..model.configuration_mfn import MFNConfig
from ..model.mfn_layer import mfn_parameters
from .activation_cache import CachedResiduals
from .arguments import LAMBDAS, MFNTrainingArguments, parse_trainable_features


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
                config.check_feature((layer, index))
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


def freeze_backbone(model: Any) -> None:
    """Leaves gradients to the MFN layers alone."""
    model.requires_grad_(False)
    for parameter in mfn_parameters(model).values():
        parameter.requires_grad_(True)


def trains_backbone(model: Any) -> bool:
    """Whether weights of the backbone itself are trained, adapters aside."""
    features = set(mfn_parameters(model).values())
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad and each not in features}
    return any("lora_" not in name for name in trained)


def check_shared_decoder(model: Any, sharded: bool) -> None:
    """`ValueError` where layers would get decoders of their own, or their one could not be saved."""
    copies = len({layer.decoder.weight for layer in model.mfn_layers.values()}) > 1
    for found, what in (
        (sharded, "FSDP"),
        (isinstance(model, CachedResiduals), "CachedResiduals"),
        (copies, 'modules_to_save=["mfn"] of PEFT'),
    ):
        if found:
            raise ValueError(f"the model has shared_decoder=True, which is not available with {what}")


def check_peft(model: Any, args: MFNTrainingArguments) -> None:
    """`ValueError` where MFN layers of a PEFT model would not learn what alpha or the losses ask of them, or would
    learn what no adapter keeps."""
    trained = [name for name, parameter in mfn_parameters(model).items() if parameter.requires_grad]
    if any(".modules_to_save." not in name for name in trained):
        problem = "the adapter would not keep the MFN layers, which are trained"
    elif not trained and (args.alpha_start != args.alpha_end or any(map(args.weight, set(LAMBDAS) - {"util"}))):
        problem = "no MFN layer is trained, though alpha moves or a loss of the features is on"
    else:
        return
    raise ValueError(f'{problem}; give the config of PEFT modules_to_save=["mfn"]')


__all__ = [
    "TrainableFeatures",
]

"""Trained parts of a model: all of it, the MFN layers alone, or MFN layers with adapters; and checks that they fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..model.mfn_layer import mfn_parameters
from .activation_cache import CachedResiduals
from .arguments import LAMBDAS, MFNTrainingArguments

logger = logging.get_logger(__name__)

FLOAT32_BYTES = 4


def freeze_backbone(model: nn.Module) -> None:
    """Turns gradients on for the MFN layers and off for everything else."""
    model.requires_grad_(False)
    for parameter in mfn_parameters(model).values():
        parameter.requires_grad_(True)


def backbone_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with gradients outside the MFN layers, by name."""
    features = set(mfn_parameters(model).values())
    return {name: each for name, each in model.named_parameters() if each.requires_grad and each not in features}


def set_learning_rate(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], rate: float) -> None:
    """Moves some parameters of an optimizer into groups of their own, with another learning rate."""
    chosen = set(parameters)
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if parameter in chosen]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if parameter not in chosen]
            optimizer.add_param_group(group | {"params": moved, "lr": rate})
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]


def check_trained_parts(model: Any, args: MFNTrainingArguments, sharded: bool, has_base: bool) -> None:
    """Checks that what is trained of a model fits its arguments, and warns of MFN layers in low precision.

    Args:
        model: with gradients turned on for what is trained.
        args: of the training.
        sharded: True under FSDP.
        has_base: True if the base model was given.

    Raises:
        ValueError: if the training would not learn, or not keep, what the arguments ask for.
    """
    if isinstance(model, CachedResiduals):
        args.check_cached()
    if model.config.shared_decoder:
        _check_shared_decoder(model, sharded)
    if hasattr(model, "peft_config"):
        _check_peft(model, args)
    trains_backbone = any("lora_" not in name for name in backbone_parameters(model))
    if args.util_target == "kl" and trains_backbone and not has_base:
        raise ValueError(
            'util_target is "kl", but training moves the logits of the backbone: give the base model as base_model'
        )
    if any(p.requires_grad and p.dtype.itemsize < FLOAT32_BYTES for p in mfn_parameters(model).values()):
        # the steps are smaller than the last digit of a weight
        logger.warning("MFN layers below float32 stop learning at small rates; load float32, train with bf16=True")


def _check_shared_decoder(model: Any, sharded: bool) -> None:
    """Raises `ValueError` if layers would get decoders of their own, or their one decoder could not be saved."""
    copies = len({layer.decoder.weight for layer in model.mfn_layers.values()}) > 1
    for found, what in (
        (sharded, "FSDP"),
        (isinstance(model, CachedResiduals), "CachedResiduals"),
        (copies, 'modules_to_save=["mfn"] of PEFT'),
    ):
        if found:
            raise ValueError(f"the model has shared_decoder=True, which is not available with {what}")


def _check_peft(model: Any, args: MFNTrainingArguments) -> None:
    """Raises `ValueError` if the MFN layers of a PEFT model would not learn, or no adapter would keep them."""
    trained = [name for name, parameter in mfn_parameters(model).items() if parameter.requires_grad]
    if any(".modules_to_save." not in name for name in trained):
        problem = "the adapter would not keep the MFN layers, which are trained"
    elif not trained and (args.alpha_start != args.alpha_end or any(map(args.weight, set(LAMBDAS) - {"util"}))):
        problem = "no MFN layer is trained, though alpha moves or a loss of the features is on"
    else:
        return
    raise ValueError(f'{problem}; give the config of PEFT modules_to_save=["mfn"]')


__all__ = ["backbone_parameters", "check_trained_parts", "freeze_backbone", "set_learning_rate"]

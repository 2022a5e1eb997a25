"""Which weights of a model are trained, and trainings that could not give what they seem to."""

from __future__ import annotations

from typing import Any

from .activation_cache import CachedResiduals
from .training_arguments import LAMBDAS, MFNTrainingArguments


def freeze_backbone(model: Any) -> None:
    """Leaves gradients to the MFN layers alone."""
    for name, parameter in model.named_parameters():
        # PEFT keeps the layers that it copied
        parameter.requires_grad_(".mfn." in name and ".original_module." not in name)


def trains_backbone(model: Any) -> bool:
    """Whether weights of the backbone itself are trained, adapters aside."""
    own = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return any(".mfn." not in name and "lora_" not in name for name in own)


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
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad and ".mfn." in name]
    if any(".mfn.modules_to_save." not in name for name in trained):
        problem = "the adapter would not keep the MFN layers, which are trained"
    elif not trained and (args.alpha_start != args.alpha_end or any(map(args.weight, set(LAMBDAS) - {"util"}))):
        problem = "no MFN layer is trained, though alpha moves or a loss of the features is on"
    else:
        return
    raise ValueError(f'{problem}; give the config of PEFT modules_to_save=["mfn"]')

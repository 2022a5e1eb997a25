"""Conversion of a base model to an MFN model with the same weights, and back."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import find_adapter_config_file

from .configuration_mfn import MFNConfig
from .finite import is_packed, is_sharded, non_finite_weight
from .masks import tokens_that_count
from .mfn_layer import MFNLayer, mfn_parameters
from .modes import as_base
from .setting_checks import EDITS
from .twins import is_a
from .whole_files import readable_source

ModelT = TypeVar("ModelT", bound=PreTrainedModel)
BACKBONE = "model.backbone."
"""Beginning of the names that the base's weights have in an MFN model."""
MODEL_OWNED_FIELDS = {
    "text_config", "mfn_version", "steering_presets", "active_preset", "direction_norms", "other_sites",
    "weights_digest", "features_digest", *EDITS,
}  # fmt: skip
CONVERSION_DEFAULTS = {"codes": "update"}
"""Settings of a conversion whose default differs from the config's, which saved models keep to."""
OWN_FIELDS = {field.name for field in fields(MFNConfig)} & set(MFNConfig.__annotations__)
CONVERSION_SETTINGS = (OWN_FIELDS | {"expansion_factor"}) - MODEL_OWNED_FIELDS


def convert(
    model_class: type[ModelT],
    base: PreTrainedModel | str | os.PathLike[str],
    *,
    calibration: Mapping[str, Tensor] | None = None,
    base_kwargs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> ModelT:
    """Converts a base model; `MFNForCausalLM.from_base` documents the arguments."""
    settings = CONVERSION_DEFAULTS | settings
    if unknown := sorted(set(settings) - CONVERSION_SETTINGS):
        raise ValueError(f"unknown setting {unknown[0]!r}; settings are {', '.join(sorted(CONVERSION_SETTINGS))}")
    check_kind(base, "base")
    if isinstance(base, PreTrainedModel):
        if base_kwargs:
            raise ValueError(f"base_kwargs {sorted(base_kwargs)} are for a folder or id, but the base is a model")
        model = _with_weights_of(base, model_class, settings, clone=True)
    else:
        load = dict(base_kwargs or {})
        # find bad settings before reading the weights
        _make_config(check_base(base, load), model_class, settings)
        with readable_source(base):
            base = AutoModelForCausalLM.from_pretrained(base, **load)
        model = _with_weights_of(base, model_class, settings, clone=False)
    _check_parity(model, base)
    if calibration is not None:
        _calibrate(model, calibration)
    return model


def unwrap(model: Any, clone: bool) -> PreTrainedModel:
    """Makes the base model that an MFN model is at alpha 0; `MFNForCausalLM.to_base` documents it.

    Args:
        model: the MFN model.
        clone: copy the weights. Otherwise both models have the same ones.
    """
    check_kind(model, "MFN model")
    _check_weights(model, "MFN model")
    config = copy.deepcopy(model.config.text_config)
    with torch.device("meta"):
        base = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config, dtype=model.dtype)
    layers = tuple(f"{path}." for path, module in model.named_modules() if is_a(module, MFNLayer))
    prefix = f"{base.base_model_prefix}."

    def name_in_base(name: str) -> str | None:
        if name.startswith(layers):
            return None
        return prefix + name.removeprefix(BACKBONE) if name.startswith(BACKBONE) else name

    missing, unexpected = _give_weights(base, model, name_in_base, clone)
    if missing or unexpected:
        raise ValueError(f"weights of the MFN model do not fit its text_config: {[*unexpected, *missing][:3]}")
    _finish(base, model)
    _check_parity(model, base)
    return base


def check_base(base: str | os.PathLike[str], load: Mapping[str, Any] | None = None) -> Any:
    """Reads the config of a base model, given as a folder or id, before its weights are read.

    Raises:
        ValueError: if it is neither, or an adapter.
        OSError: if it is not there. The message names it.
    """
    with readable_source(base):
        if find_adapter_config_file(os.fspath(base), **_of_files(load or {})):
            raise ValueError(
                f"{base} is a PEFT adapter; load it by PEFT, and give the model that its merge_and_unload returns"
            )
        return _read_config(base, load or {})


def check_kind(base: Any, role: str = "base") -> None:
    """Says what to give for a model that is not one of transformers, as it is, nor a name of one.

    Args:
        base: whatever was given.
        role: word for it in errors.
    """
    kind = type(base).__name__
    if hasattr(base, "merge_and_unload") or getattr(base, "peft_config", None):
        raise ValueError(
            f"the {role} is a {kind} with PEFT adapters; merge them into its weights first (PEFT's merge_and_unload)"
        )
    if hasattr(base, "_orig_mod") or getattr(base, "_compiled_call_impl", None):
        raise ValueError(f"the {role} is a compiled {kind}; give the model as it was, and compile the result")
    if isinstance(base, PreTrainedModel | str | os.PathLike):
        return
    if isinstance(getattr(base, "module", None), PreTrainedModel):
        raise ValueError(f"the base is wrapped in {kind}; give the model inside, its .module")
    if isinstance(base, PreTrainedConfig):
        raise ValueError(
            f"the base is a {kind}, which has no weights; give its model, or make one with random weights by "
            "MFNForCausalLM(MFNConfig(text_config=...))"
        )
    raise ValueError(f"the base is a {kind}; it must be a causal LM of transformers, its folder, or its id on the Hub")


def _of_files(load: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that say which files to read."""
    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")
    return {name: load[name] for name in names if name in load}


def _read_config(base: str | os.PathLike[str], load: Mapping[str, Any]) -> Any:
    gguf = {name: load[name] for name in ("gguf_file",) if name in load}
    try:
        return AutoConfig.from_pretrained(base, **_of_files(load), **gguf)
    except TypeError as error:
        raise ValueError(f"the config of {base} is damaged: {error}") from error


def _make_config(text_config: Any, model_class: type[ModelT], settings: Mapping[str, Any]) -> MFNConfig:
    model_class.check_base(text_config)
    config = MFNConfig(text_config=text_config, **settings)
    # transformers dequantises a GGUF file on loading, but its config still names a quantisation
    vars(config.text_config).pop("quantization_config", None)
    if os.path.isdir(config.text_config._name_or_path):
        config.text_config._name_or_path = ""  # a local path is useless elsewhere, and private
    return config


def _with_weights_of(
    base: PreTrainedModel, model_class: type[ModelT], settings: Mapping[str, Any], clone: bool
) -> ModelT:
    """Builds the model on the meta device, gives it the base's weights, and allocates only its MFN layers."""
    config = _make_config(base.config, model_class, settings)
    _check_weights(base, "base model")
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=base.dtype)
    inside = f"{base.base_model_prefix}."

    def name_in_model(name: str) -> str:
        return BACKBONE + name.removeprefix(inside) if name.startswith(inside) else name

    missing, unexpected = _give_weights(model, base, name_in_model, clone)
    if unexpected or set(missing) - set(mfn_parameters(model)):
        raise ValueError(f"weights of the base model do not fit its config: {[*unexpected, *missing][:3]}")
    for layer in model.mfn_layers.values():
        layer.to_empty(device=base.device)
    model.initialise_mfn_layers()
    _finish(model, base)
    return model


def _give_weights(
    model: Any, source: PreTrainedModel, rename: Callable[[str], str | None], clone: bool
) -> tuple[list[str], list[str]]:
    """Gives a model on the meta device the weights and buffers of another one.

    Args:
        model: the new model.
        source: the model that has them.
        rename: makes a name in `model` of one in `source`; `None` for what `model` has no place for.
        clone: copy them.

    Returns:
        Names of weights that `model` lacks, and of those that it has no place for.
    """

    def place(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        targets = ((rename(name), tensor) for name, tensor in tensors.items())
        return {name: tensor.clone() if clone else tensor for name, tensor in targets if name is not None}

    state = source.state_dict()
    missing, unexpected = model.load_state_dict(place(state), assign=True, strict=False)
    for name, buffer in place({n: b for n, b in source.named_buffers() if n not in state}).items():
        module, _, attribute = name.rpartition(".")
        model.get_submodule(module).register_buffer(attribute, buffer, persistent=False)
    return missing, unexpected


def _finish(model: Any, source: PreTrainedModel) -> None:
    """Ties the weights of a model that has those of `source`, and gives it the settings of its generation."""
    model.tie_weights()
    if source.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)
    model.eval()


def _check_weights(base: PreTrainedModel, role: str) -> None:
    """Checks that a model has a head, and whole weights on one device. `role` is the word for it in errors."""
    if base.get_output_embeddings() is None:
        raise ValueError(
            f"{type(base).__name__} has no language-modelling head; give the causal LM, such as its ForCausalLM"
        )
    if any(map(is_packed, base.parameters())):
        raise ValueError(f"the {role} is quantised; give it in float32, bfloat16 or float16")
    if any(map(is_sharded, base.parameters())):
        raise ValueError(f"the {role} is sharded over processes; save it, load it on one device, and convert that")
    devices = {str(parameter.device) for parameter in base.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(
            f"the {role} lies on {', '.join(sorted(devices))}; convert it on one device, save the result, and load "
            "that with device_map"
        )
    if (name := non_finite_weight(base)) is not None:
        raise ValueError(
            f"weight {name} of the {role} is not finite, or its norm is not; the file is damaged, or it diverged"
        )


@torch.no_grad()
def _check_parity(model: Any, base: PreTrainedModel) -> None:
    """Compares both models' logits on a few tokens, bit for bit."""
    tokens = torch.arange(min(8, model.config.vocab_size), device=base.device)[None]
    was_training = base.training
    base.eval()
    with as_base(model):
        equal = torch.equal(model(tokens).logits, base(tokens).logits)
    base.train(was_training)
    if not equal:
        raise RuntimeError(
            f"the MFN model at alpha = 0 does not give the logits of its base, a {base.config.model_type}; its "
            "forward differs from what this package knows of the family"
        )


@torch.no_grad()
def _calibrate(model: Any, batch: Mapping[str, Tensor]) -> None:
    counted = tokens_that_count(batch).bool()
    if not counted.any():
        raise ValueError("calibration has no token that counts: its attention_mask is 0 everywhere")
    with as_base(model):
        # without a cache, positions that start again keep packed texts apart
        outputs = model(**batch, logits_to_keep=1, use_cache=False, output_reconstructions=True)
    for layer, reconstruction in outputs.reconstructions.items():
        h = reconstruction.residual[counted.to(reconstruction.residual.device)]
        if not h.isfinite().all():
            raise ValueError(f"residual streams of block {layer} are not finite on the tokens of calibration")
        model.mfn_layers[layer].calibrate(h)

"""MFN models made of a base model and SAEs that were trained on it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..model.checks import is_whole, shown
from ..model.conversion import CONVERSION_SETTINGS, check_base, check_kind, convert
from ..model.families import family_of
from ..model.feature_names import format_feature
from ..model.finite import non_finite_weight
from ..model.mfn_layer import MFNLayer
from ..model.setting_checks import check_layers
from .autoencoder import StoredSAE, Weights
from .hooks import hook_point, is_at
from .sources import opened

logger = logging.get_logger(__name__)

ModelT = TypeVar("ModelT", bound=PreTrainedModel)
UNIT = 1e-3
"""Largest difference from 1 of a norm that counts as 1."""


def from_saes(
    model_class: type[ModelT],
    base: PreTrainedModel | str | os.PathLike[str],
    saes: Mapping[int, str | Path],
    *,
    allow_other_site: bool = False,
    base_kwargs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> ModelT:
    """Makes an MFN model of SAEs; `MFNForCausalLM.from_saes` documents the arguments."""
    places = isinstance(saes, Mapping) and all(isinstance(place, str | os.PathLike) for place in saes.values())
    if not places or not saes or not all(map(is_whole, saes)):
        raise ValueError(f"saes are {shown(saes)}; give a mapping of block indices to folders, files or releases")
    if unknown := sorted(set(settings) - CONVERSION_SETTINGS):
        raise ValueError(f"unknown setting {unknown[0]!r}; with SAEs, give alpha, blend_into, and k for ReLU SAEs")
    check_kind(base)
    text_config = base.config if isinstance(base, PreTrainedModel) else check_base(base, base_kwargs)
    family_of(text_config)
    check_layers(list(saes), text_config.num_hidden_layers)
    with opened(dict(sorted(saes.items()))) as found:
        others = {str(layer): sae.hook for layer, sae in found.items() if not is_at(sae.hook, text_config, layer)}
        if others and not allow_other_site:
            raise ValueError(_refusal(found, text_config))
        fixed = _settings_of(found, text_config.hidden_size, settings)
        _compare_names(found, text_config.name_or_path)
        model: Any = convert(model_class, base, base_kwargs=base_kwargs, **(settings | fixed))
        norms: dict[str, float] = {}
        for layer, sae in found.items():
            weights = sae.read()
            _write(model.mfn_layers[layer], weights)
            _check_finite(model.mfn_layers[layer], sae.source)
            norms |= _norms_of(layer, weights)
    model.config.direction_norms = norms
    model.config.other_sites = {layer: hook or "unknown" for layer, hook in others.items()}
    return model


def _refusal(found: Mapping[int, StoredSAE], text_config: Any) -> str:
    layer, sae = next((layer, sae) for layer, sae in found.items() if not is_at(sae.hook, text_config, layer))
    point = hook_point(text_config, layer)
    was = "names no hook point" if sae.hook is None else f"was trained at {shown(sae.hook)}"
    return (
        f"the SAE in {sae.source} {was}, and the MFN layer of block {layer} stands at {point.transformer_lens}; "
        "allow_other_site=True (--allow-other-site) takes it all the same, and the model card then warns"
    )


def _compare_names(found: Mapping[int, StoredSAE], base: str) -> None:
    """Warns where SAEs name another model than the base. Packages have names of their own for one model."""
    for name in sorted({sae.model_name for sae in found.values() if sae.model_name}):
        if base and Path(name).name.casefold() != Path(base).name.casefold():
            logger.warning(
                f"the SAEs were trained on {shown(name)}, and the base model is {shown(base)}; features mean something "
                "only if both are one model"
            )


def _settings_of(found: Mapping[int, StoredSAE], hidden_size: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the MFN layers that follow from the SAEs.

    Raises:
        ValueError: If the SAEs differ, do not fit the model, or other settings were given.
    """
    for name in ("d_in", "num_features", "k", "input_norm"):
        values = {layer: getattr(sae, name) for layer, sae in found.items()}
        if len(set(values.values())) > 1:
            raise ValueError(f"{name} differs between the SAEs: {values}; all MFN layers of a model share it")
    sae = next(iter(found.values()))
    if sae.d_in != hidden_size:
        raise ValueError(f"the SAEs have d_in {sae.d_in}, and the hidden size of the base model is {hidden_size}")
    fixed = {
        "layers": list(found),
        "num_features": sae.num_features,
        "input_norm": sae.input_norm,
        "codes": "stream",
        "coding_rounds": 1,
        "refine_steps": 0,
        "decoder_bias": True,
        "shared_decoder": False,
    } | ({} if sae.k is None else {"k": sae.k})
    for name, value in given.items():
        if name in fixed and value != fixed[name]:
            raise ValueError(f"{name} is {shown(value)}, and with these SAEs it is {shown(fixed[name])}; leave it out")
    if sae.k is None:
        _check_k_of_relu(given.get("k"), sae.num_features)
    return fixed


def _check_k_of_relu(k: int | None, num_features: int) -> None:
    if k is None:
        raise ValueError(
            f"the SAEs have a ReLU and no k; give k: {num_features}, all features, is exact, and a smaller k keeps the "
            "largest activations alone"
        )
    if k != num_features:
        logger.warning(
            f"the SAEs have a ReLU; with k {k} of {num_features} features the model is not exactly them: a token keeps "
            "its largest activations alone"
        )


@torch.no_grad()
def _write(layer: MFNLayer, weights: Weights) -> None:
    layer.encoder.weight.copy_(weights.encoder)
    layer.encoder.bias.copy_(weights.encoder_bias)
    layer.decoder.weight.copy_(weights.directions)
    if layer.decoder.bias is not None:
        layer.decoder.bias.copy_(weights.bias)


def _check_finite(layer: MFNLayer, source: str) -> None:
    """Raises `ValueError` if weights of an SAE are not finite, or not in the precision of the base model."""
    if (name := non_finite_weight(layer)) is not None:
        dtype = str(layer.encoder.weight.dtype).removeprefix("torch.")
        raise ValueError(
            f"{source}: {name} is not finite in {dtype}, the base model's precision; the SAE is damaged, or the base "
            "model must be loaded in one with a larger range"
        )


def _norms_of(layer: int, weights: Weights) -> dict[str, float]:
    """Norms that training must keep, as TopK chooses by raw activations: those other than 1."""
    norms = weights.directions.float().norm(dim=-1)
    others = ((norms - 1).abs() > UNIT).nonzero().flatten().tolist()
    return {format_feature(layer, index): float(norms[index]) for index in others}


__all__ = ["from_saes"]

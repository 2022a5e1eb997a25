"""MFN layers as SAEs of other packages: one folder per layer, or an SAE of SAELens in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from ..model.checks import shown
from ..model.features_digest import name_features_of
from ..model.offloading import check_in_memory
from ..model.setting_checks import check_layers
from ..model.twins import check_has_features
from ..model.version import __version__
from ..utils.extras import MissingExtra
from . import saelens, sparsify
from .autoencoder import CONFIG, Weights
from .hooks import hook_name, hook_point

logger = logging.get_logger(__name__)

Format = Literal["saelens", "sparsify"]


@dataclass(frozen=True)
class LayerSAE:
    """The SAE that one MFN layer is."""

    weights: Weights
    k: int
    input_norm: str
    names: dict[Format, str]
    """Format -> name of its folder."""
    metadata: dict[str, Any]

    @property
    def in_saelens(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Content of SAELens' two files."""
        config = saelens.saelens_config(self.weights, self.k, self.input_norm, self.metadata)
        return config, saelens.saelens_tensors(self.weights)

    @property
    def in_sparsify(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Content of sparsify's two files."""
        return sparsify.sparsify_config(self.weights, self.k, self.metadata), sparsify.sparsify_tensors(self.weights)


def export_saes(
    model: Any, folder: str | Path, format: Format = "saelens", layers: str | list[int] = "all"
) -> dict[int, Path]:
    """Writes MFN layers as SAEs: a folder per layer, which the package of the format loads with `load_from_disk`.

    Args:
        model: MFN model.
        folder: folder for the folders. Others in it stay.
        format: `"saelens"` or `"sparsify"`.
        layers: block indices; `"all"` for every MFN layer.

    Returns:
        Layer -> its folder.

    Raises:
        ValueError: on a layer that is not there, or an MFN layer that the format cannot state. Nothing is written then.
    """
    if format not in ("saelens", "sparsify"):
        raise ValueError(f"format is {shown(format)}; it must be saelens or sparsify")
    check_has_features(model)
    config = model.config
    chosen = config.layers if layers == "all" else check_layers(layers, config.text_config.num_hidden_layers)
    _check_function(model)
    if format == "sparsify":
        sparsify.check_input_norm(config.input_norm)
    for layer in chosen:
        config.check_feature((layer, 0), pruned=True)
    written = {}
    for layer in chosen:
        sae = layer_sae(model, layer)
        written[layer] = Path(folder) / sae.names[format]
        written[layer].mkdir(parents=True, exist_ok=True)
        config, tensors = sae.in_saelens if format == "saelens" else sae.in_sparsify
        file = saelens.WEIGHTS if format == "saelens" else sparsify.WEIGHTS
        save_file(tensors, written[layer] / file)
        (written[layer] / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return written


def to_saelens(model: Any, layer: int) -> Any:
    """Makes an SAE of SAELens of an MFN layer; `MFNForCausalLM.to_saelens` documents it."""
    sae = layer_sae(model, layer)
    try:
        from sae_lens import SAE
    except ModuleNotFoundError as error:
        if error.name != "sae_lens":
            raise
        raise MissingExtra(
            "to_saelens needs SAELens, which is not installed; pip install sae-lens brings it, and mfn export writes "
            "its format without it",
            name=error.name,
        ) from error
    config, tensors = sae.in_saelens
    made = SAE.from_dict(config | {"device": str(model.device)})
    made.load_state_dict(tensors)
    return made


@torch.no_grad()
def layer_sae(model: Any, layer: int) -> LayerSAE:
    """Returns the SAE that an MFN layer is.

    Raises:
        ValueError: on a layer that is not there, or one whose codes no SAE of these formats has.
    """
    check_has_features(model)
    _check_function(model)
    check_in_memory(model, "an export")
    config = model.config
    config.check_feature((layer, 0), pruned=True)
    mfn, point = model.mfn_layers[layer], hook_point(config.text_config, layer)
    pruned = config.pruned_features.get(str(layer), [])
    if len(pruned) > len(config.removed_encoder_rows.get(str(layer), [])):
        logger.warning(
            f"{len(pruned)} pruned features of layer {layer} still compete: they have activations in the SAE, and "
            "write nothing; compact(keep_competition=False) takes them out of the competition"
        )
    facts = {
        "model_name": config.text_config._name_or_path or None,
        "hook_name": hook_name(config, layer),
        "hf_hook_name": point.transformers,
        "stream": point.short if config.codes == "stream" else None,
        "layer": layer,
        "codes": config.codes,
        "input_norm": config.input_norm,
        "alpha": mfn.alpha,
        "k": mfn.k,
        "pruned_features": pruned,
        "features_digest": name_features_of(model),
        "mfn_version": __version__,
    }
    names: dict[Format, str] = {"saelens": str(facts["hook_name"]), "sparsify": point.sparsify}
    return LayerSAE(_weights_of(mfn), mfn.k, config.input_norm, names, facts)


def _check_function(model: Any) -> None:
    if model.config.codes_by_pursuit:
        raise ValueError(
            f"coding_rounds is {model.config.coding_rounds} and refine_steps is {model.config.refine_steps}: codes "
            "follow from several steps, and an SAE has one product with its encoder; only 1 and 0 can be exported"
        )


def _weights_of(layer: Any) -> Weights:
    """Weights by feature. Rows that `compact` removed are 0, and so are the directions of pruned features."""
    encoder, encoder_bias = layer.encoder.weight.detach(), layer.encoder.bias.detach()
    directions, bias = layer.directions().detach(), layer.decoder.bias
    if layer.rows is not None:
        directions = directions.masked_fill(layer.rows.pruned.unsqueeze(-1), 0)
        if layer.rows.encoder_names is not None:
            names, m = layer.rows.encoder_names, len(directions)
            encoder = encoder.new_zeros(m, encoder.shape[-1]).index_copy(0, names, encoder)
            encoder_bias = encoder_bias.new_zeros(m).index_copy(0, names, encoder_bias)
    bias = directions.new_zeros(directions.shape[-1]) if bias is None else bias.detach()
    return Weights(encoder, encoder_bias, directions, bias)


__all__ = ["Format", "LayerSAE", "export_saes", "layer_sae", "to_saelens"]

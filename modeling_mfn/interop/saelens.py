"""The format of SAELens: a folder with `cfg.json` and `sae_weights.safetensors`.

`architecture="topk"` is an MFN layer, W_enc and W_dec being W_e and D, one transposed. SAELens' "layer_norm" is the
input norm "layer": per token, with the unbiased standard deviation plus 1e-5, undone after decoding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.checks import as_whole, check_type, naming, shown
from ..utils.readers import parse_json
from .autoencoder import CONFIG, DTYPES, StoredSAE, Weights, read_settings, read_tensors
from .hooks import stated_hook

WEIGHTS = "sae_weights.safetensors"
VERSION = "6.54.12"
"""Release of SAELens whose format is written, and with which it is tested."""
INPUT_NORMS = {"none": "none", "layer_norm": "layer"}
"""SAELens' `normalize_activations` -> `input_norm` of an MFN layer."""
NOT_STATED = {
    "expected_average_only_in": "its scaling factor is not in the file; fold it in with SAELens' "
    "fold_activation_norm_scaling_factor, and save the SAE again",
    "covariance_whitening": "its whitening is not in the file; fold it in with SAELens' fold_activation_whitening, and "
    "save the SAE again",
    "constant_norm_rescale": "an MFN layer cannot rescale a token to a constant norm",
}
"""`normalize_activations` that no MFN layer has -> reason."""
SCALE = "scaling_factor"
"""Tensor of ones that older releases wrote, and that a later fine-tuning may have changed."""
ONLY_IN_TRAINING = {
    *("device", "decoder_init_norm", "aux_loss_coefficient", "use_sparse_activations", "l1_coefficient", "lp_norm"),
    *("l1_warm_up_steps", "l0_coefficient", "l0_warm_up_steps", "jumprelu_init_threshold", "jumprelu_bandwidth"),
    *("jumprelu_sparsity_loss_mode", "pre_act_loss_coefficient", "jumprelu_tanh_scale", "jumprelu_ste_to_input"),
    *("target_l0",),
}
"""Settings that change nothing in the function of a trained SAE."""
KEPT_IN_METADATA = ("model_name", "model_from_pretrained_kwargs")
"""Settings of older releases that SAELens 6 has in its metadata, beside the hook point."""


@dataclass
class Config:
    """Settings of an SAE of SAELens 6 that make its function."""

    architecture: str
    d_in: int
    d_sae: int
    dtype: str
    apply_b_dec_to_input: bool
    normalize_activations: str
    metadata: dict[str, Any]
    reshape_activations: str = "none"
    rescale_acts_by_decoder_norm: bool = False
    k: int | float | None = None


def open_saelens(folder: Path) -> StoredSAE:
    """Reads the settings of an SAE in a folder that SAELens saved, of version 6 or older.

    Raises:
        ValueError: If a file is damaged, or the SAE does something that no MFN layer does.
    """
    written = read_settings(folder)
    with naming(folder / CONFIG):
        config = _config_of(written)
        input_norm, k, dtype = _input_norm(config), _k(config), config.dtype.removeprefix("torch.")
        centred = input_norm == "none" and _is_centred(config)
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {shown(dtype)}; it must be one of {', '.join(DTYPES)}")
        if config.reshape_activations != "none":
            raise ValueError(
                f"reshape_activations is {shown(config.reshape_activations)}: the SAE codes heads of an attention, and "
                "an MFN layer the residual stream"
            )
    stated = config.metadata.get("hook_name") or config.metadata.get("hf_hook_name")
    hook = stated_hook(stated, folder.resolve().name, config.metadata.get("codes"))
    if hook and centred:
        hook = f"{hook}, centred"
    read = partial(_read, folder / WEIGHTS, config)
    model_name = config.metadata.get("model_name")
    return StoredSAE(str(folder), config.d_in, config.d_sae, k, input_norm, hook, read, model_name and str(model_name))


def _config_of(written: dict[str, Any]) -> Config:
    """Returns the settings as SAELens 6 has them. Settings that it does not know are refused."""
    metadata = written.get("metadata")
    check_type("metadata", metadata, dict | None)
    version = str(written.get("sae_lens_version") or (metadata or {}).get("sae_lens_version") or "0")
    major = version.partition(".")[0]
    if not major.isdecimal():
        raise ValueError(f"sae_lens_version is {shown(version)}; it must be a version such as {VERSION}")
    if int(major) < 6:
        return parse_json(json.dumps(_from_before_6(written)), Config)
    known = {field.name for field in fields(Config)} | ONLY_IN_TRAINING | {"sae_lens_version"}
    if unknown := sorted(set(written) - known):
        raise ValueError(f"setting {shown(unknown[0])} is unknown, and may change the function")
    return parse_json(json.dumps(written), Config)


def _from_before_6(written: dict[str, Any]) -> dict[str, Any]:
    """Settings of SAELens 6 for those of older releases, which it reads in the same way."""
    activation = written.get("activation_fn_str", written.get("activation_fn", "relu"))
    check_type("activation_fn_kwargs", written.get("activation_fn_kwargs"), dict | None)
    further = dict(written.get("activation_fn_kwargs") or {})
    architecture, hook = written.get("architecture", "standard"), written.get("hook_name", written.get("hook_point"))
    k = further.pop("k", written.get("k"))
    if activation == "topk" and k is not None:
        architecture = "topk"
    elif activation != "relu":
        raise ValueError(f"activation_fn is {shown(activation)}; it must be relu, or topk with its k")
    if any(further.values()):
        raise ValueError(f"activation_fn_kwargs are {shown(further)}; an MFN layer has k alone")
    norm = written.get("normalize_activations")
    if isinstance(norm, bool):
        norm = "expected_average_only_in" if norm else "none"
    return {
        "architecture": architecture,
        "d_in": written.get("d_in"),
        "d_sae": written.get("d_sae"),
        "dtype": written.get("dtype", "float32"),
        "apply_b_dec_to_input": written.get("apply_b_dec_to_input", True),
        "normalize_activations": norm or "none",
        "reshape_activations": "hook_z" if "hook_z" in str(hook) else written.get("reshape_activations", "none"),
        "rescale_acts_by_decoder_norm": written.get("rescale_acts_by_decoder_norm", False),
        "k": k,
        "metadata": {"hook_name": hook, **{name: written[name] for name in KEPT_IN_METADATA if name in written}},
    }


def _input_norm(config: Config) -> str:
    norm = config.normalize_activations
    if norm not in INPUT_NORMS:
        raise ValueError(
            f"normalize_activations is {shown(norm)}: "
            + NOT_STATED.get(norm, f"an MFN layer has {' or '.join(INPUT_NORMS)}")
        )
    return INPUT_NORMS[norm]


def _is_centred(config: Config) -> bool:
    """Returns True if the SAE was trained on streams whose mean per token TransformerLens had taken off."""
    name = "model_from_pretrained_kwargs"
    check_type(name, config.metadata.get(name), dict | None)
    return bool((config.metadata.get(name) or {}).get("center_writing_weights"))


def _k(config: Config) -> int | None:
    if config.architecture == "topk":
        return as_whole("k", config.k, 1)
    if config.architecture in ("standard", "jumprelu"):
        return None
    reasons = {"batchtopk": "which features are active depends on the batch", "gated": "its gate is a second encoder"}
    reason = reasons.get(config.architecture.removeprefix("matryoshka_"), "an MFN layer has one TopK or ReLU encoder")
    raise ValueError(f"the architecture is {shown(config.architecture)}, which no MFN layer states: {reason}")


def _read(file: Path, config: Config) -> Weights:
    m, d = config.d_sae, config.d_in
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, m), "b_enc": (m,), "W_dec": (m, d), "b_dec": (d,)}
    if config.architecture == "jumprelu":
        shapes["threshold"] = (m,)
    # SAELens casts to the precision of the config, and so the function is that of the cast weights
    dtype = DTYPES[config.dtype.removeprefix("torch.")]
    found = {name: tensor.to(dtype) for name, tensor in read_tensors(file, shapes, {SCALE: (m,)}).items()}
    if SCALE in found and not torch.allclose(found[SCALE], torch.ones_like(found[SCALE])):
        raise ValueError(f"{file}: {SCALE} is not 1 everywhere, and an MFN layer scales no activation")
    if "threshold" in found and (found["threshold"] > 0).any():
        raise ValueError(
            f"{file}: the SAE is a JumpReLU with thresholds up to {float(found['threshold'].max()):.3g}, and an MFN "
            "layer has none; a ReLU or TopK SAE can be taken"
        )
    weights = Weights(found["W_enc"].T, found["b_enc"], found["W_dec"], found["b_dec"])
    if config.apply_b_dec_to_input:
        weights = weights.read_from_plain()
    # The scaled activations are those of unit directions, and TopK chooses by them.
    return weights.with_unit_directions() if config.rescale_acts_by_decoder_norm else weights


def saelens_tensors(weights: Weights) -> dict[str, Tensor]:
    """Returns the tensors of SAELens' file."""
    named = {"W_enc": weights.encoder.T, "b_enc": weights.encoder_bias, "W_dec": weights.directions}
    return {name: tensor.contiguous() for name, tensor in (named | {"b_dec": weights.bias}).items()}


def saelens_config(weights: Weights, k: int, input_norm: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of SAELens' `cfg.json`.

    Args:
        weights: weights of the SAE.
        k: active features per token.
        input_norm: `input_norm` of the MFN layer.
        metadata: facts that SAELens keeps, beside the version of its format.
    """
    m, d = weights.encoder.shape
    return {
        "architecture": "topk",
        "d_in": d,
        "d_sae": m,
        "k": k,
        "dtype": str(weights.encoder.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": {ours: theirs for theirs, ours in INPUT_NORMS.items()}[input_norm],
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {"sae_lens_version": VERSION, "sae_lens_training_version": None} | metadata,
    }


__all__ = ["VERSION", "WEIGHTS", "open_saelens", "saelens_config", "saelens_tensors"]

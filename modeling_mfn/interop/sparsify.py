"""The format of EleutherAI's sparsify: a folder with `cfg.json` and `sae.safetensors`. Its encoder reads x - b."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.checks import as_whole, naming, shown
from ..utils.readers import parse_json
from .autoencoder import CONFIG, StoredSAE, Weights, read_settings, read_tensors
from .hooks import stated_hook

WEIGHTS = "sae.safetensors"
SEED = re.compile(r"seed\d+")
"""Name of a folder below the hook's, where one training has several seeds."""
ONLY_IN_TRAINING = {"normalize_decoder", "multi_topk"}
"""Settings that change nothing in the function of a trained SAE."""


@dataclass
class Config:
    """Settings of sparsify that make the function of an SAE."""

    d_in: int
    k: int
    expansion_factor: int = 0
    num_latents: int = 0
    activation: str = "topk"
    skip_connection: bool = False
    transcode: bool = False
    signed: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)


def open_sparsify(folder: Path) -> StoredSAE:
    """Reads the settings of an SAE in a folder that sparsify saved.

    Raises:
        ValueError: If a file is damaged, or the SAE does something that no MFN layer does.
    """
    written = read_settings(folder)
    with naming(folder / CONFIG):
        if unknown := sorted(set(written) - {each.name for each in fields(Config)} - ONLY_IN_TRAINING):
            raise ValueError(f"setting {shown(unknown[0])} is unknown, and may change the function")
        config = parse_json(json.dumps(written), Config)
        if config.activation != "topk":
            raise ValueError(f"activation is {shown(config.activation)}; an MFN layer has topk alone")
        for name in ("skip_connection", "transcode", "signed"):
            if getattr(config, name):
                raise ValueError(f"{name} is True, which no MFN layer states; an SAE with topk alone can be taken")
        m = as_whole("num_latents", config.num_latents or config.d_in * config.expansion_factor, 1)
    named = folder.resolve().parent.name if SEED.fullmatch(folder.name) else folder.resolve().name
    hook = stated_hook(config.metadata.get("hf_hook_name"), named, config.metadata.get("codes"))
    read = partial(_read, folder / WEIGHTS, m, config.d_in)
    model_name, k = config.metadata.get("model_name"), as_whole("k", config.k, 1)
    return StoredSAE(str(folder), config.d_in, m, k, "none", hook, read, model_name and str(model_name))


def _read(file: Path, m: int, d: int) -> Weights:
    shapes = {"encoder.weight": (m, d), "encoder.bias": (m,), "W_dec": (m, d), "b_dec": (d,)}
    found = read_tensors(file, shapes)
    return Weights(*(found[name] for name in shapes)).read_from_plain()


def check_input_norm(input_norm: str) -> None:
    """Raises `ValueError` for an MFN layer that standardises its input, which sparsify does not."""
    if input_norm != "none":
        raise ValueError(
            f"input_norm is {shown(input_norm)}, and sparsify's SAEs read the residual stream as it is; export in "
            "SAELens' format, which has this norm"
        )


def sparsify_tensors(weights: Weights) -> dict[str, Tensor]:
    """Returns the tensors of sparsify's file, of at least float32: 16 bits cannot hold the bias for x - b."""
    dtype = torch.promote_types(weights.encoder.dtype, torch.float32)
    moved = weights.read_from_centred()
    named = {"encoder.weight": moved.encoder, "encoder.bias": moved.encoder_bias, "W_dec": moved.directions}
    return {name: tensor.to(dtype).contiguous() for name, tensor in (named | {"b_dec": moved.bias}).items()}


def sparsify_config(weights: Weights, k: int, metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of sparsify's `cfg.json`, with `metadata`, which sparsify passes over."""
    m, d = weights.encoder.shape
    return {
        "activation": "topk",
        "expansion_factor": max(m // d, 1),
        "normalize_decoder": False,
        "num_latents": m,
        "k": k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": d,
        "metadata": metadata,
    }


__all__ = ["WEIGHTS", "check_input_norm", "open_sparsify", "sparsify_config", "sparsify_tensors"]

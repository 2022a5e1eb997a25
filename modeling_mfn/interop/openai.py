"""OpenAI's format: the state dict of `sparse_autoencoder.Autoencoder`, in a `.pt` file per layer.

latents = activation(W_e (x - pre_bias) + latent_bias), x_hat = W_d latents + pre_bias. With TopK, and only then, x is
standardised per token, (x - mean) / (std + 1e-5), which is undone after decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..model.checks import as_whole, check_type, shown
from ..utils.readers import readable
from .autoencoder import StoredSAE, Weights, check_tensors

STATISTICS = {"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"}
"""Buffers of the training."""
PLACES = {
    "resid_post_attn": "hook_resid_mid",
    "resid_post_mlp": "hook_resid_post",
    "resid_delta_attn": "hook_attn_out",
    "resid_delta_mlp": "hook_mlp_out",
    "mlp_post_act": "mlp.hook_post",
}
"""OpenAI's location -> hook of TransformerLens, as in OpenAI's README."""


def open_openai(file: Path) -> StoredSAE:
    """Reads the settings of an SAE in a file of OpenAI's.

    The layer is the file's name, `6.pt`, and the location a part of its path, `resid_post_attn_v5_32k/autoencoders`.

    Raises:
        ValueError: If the file is damaged, or the SAE does something that no MFN layer does.
    """
    state = _load(file)
    with readable(file):
        m, d = _sizes(state)
        activation, further = state.get("activation", "ReLU"), state.get("activation_state_dict") or {}
        check_type("activation_state_dict", further, dict)
        if activation not in ("TopK", "ReLU"):
            raise ValueError(f"activation is {shown(activation)}; an MFN layer has TopK or ReLU")
        k = None
        if activation == "TopK":
            k = as_whole("k", further.get("k"), 1)
            if further.get("postact_fn") != "ReLU":
                raise ValueError(f"postact_fn is {shown(further.get('postact_fn'))}; an MFN layer has ReLU")
    return StoredSAE(str(file), d, m, k, "none" if k is None else "layer", _hook(file), partial(_read, file))


def _load(file: Path) -> Mapping[str, Any]:
    with readable(file):
        state = torch.load(file, map_location="cpu", weights_only=True)
        check_type("the content", state, dict)
        return state


def _sizes(state: Mapping[str, Any]) -> tuple[int, int]:
    """Checks names and shapes of the tensors, and returns m and d."""
    encoder = state.get("encoder.weight")
    m, d = encoder.shape if isinstance(encoder, torch.Tensor) and encoder.ndim == 2 else (0, 0)
    shapes = {"pre_bias": (d,), "latent_bias": (m,), "encoder.weight": (m, d), "decoder.weight": (d, m)}
    others = STATISTICS | {"activation", "activation_state_dict"}
    check_tensors({name: value for name, value in state.items() if name not in others}, shapes)
    return m, d


def _hook(file: Path) -> str | None:
    """Hook of TransformerLens that the path of a file names."""
    parts = file.resolve().parts
    places = [hook for place, hook in PLACES.items() if any(part.startswith(place) for part in parts)]
    return f"blocks.{file.stem}.{places[0]}" if len(places) == 1 and file.stem.isdigit() else None


def _read(file: Path) -> Weights:
    state = _load(file)
    weights = Weights(state["encoder.weight"], state["latent_bias"], state["decoder.weight"].T, state["pre_bias"])
    return weights.read_from_plain()


__all__ = ["PLACES", "open_openai"]

"""Content of the page about the model, from the files next to its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ...features.public_names import public_name
from ...model.configuration_mfn import MFNConfig
from ...utils.readers import readable
from .data_files import to_json
from .evaluations import fidelity, verdicts
from .training_curves import training

OWN_SETTINGS = (
    *("layers", "num_features", "k", "alpha", "codes", "coding_rounds", "refine_steps", "blend_into", "input_norm"),
    *("decoder_bias", "shared_decoder", "active_preset", "other_sites", "features_digest", "mfn_version"),
)
"""Settings of the config that the page shows. Those of the base model are its own."""


def model_page(model: Path, config: MFNConfig, evaluation: Path | None = None) -> str:
    """Makes the JSON of the page.

    Args:
        model: Folder with the model's `config.json`.
        config: The model's config.
        evaluation: Folder that `mfn evaluate` wrote. Default: `evaluation` in the model's folder, if there is one.

    Raises:
        ValueError: If a file is damaged.
    """
    page = {
        "facts": [[name, value] for name, value in _facts(config, parameters_in(model)) if value is not None],
        "config": {name: getattr(config, name) for name in OWN_SETTINGS},
        "training": training(model),
        "fidelity": fidelity(model, config),
        "verdicts": verdicts(evaluation or model / "evaluation"),
        "presets": config.steering_presets,
        "card": None,
    }
    return to_json(page)


def _facts(config: MFNConfig, parameters: int | None) -> Iterator[tuple[str, Any]]:
    base = config.text_config
    pruned = sum(map(len, config.pruned_features.values()))
    yield "base model", public_name(base._name_or_path)
    yield "family", base.model_type
    yield "blocks with an MFN layer, from 0", ", ".join(map(str, config.layers))
    yield "blocks", base.num_hidden_layers
    yield "features per layer, m", config.num_features
    yield "hidden size, d", base.hidden_size
    yield "parameters", parameters
    yield "active features per token, k, at most", config.k
    yield "blend, alpha", config.alpha
    yield "tensor that is coded, codes", config.codes
    yield "rounds that choose the features", config.coding_rounds
    yield "steps that refine their values", config.refine_steps
    yield "tensor that the blend replaces", config.blend_into
    yield "pruned features", pruned or None
    yield "preset that is active", config.active_preset
    yield "name of the features", config.features_digest


def parameters_in(model: Path) -> int | None:
    """Counts the numbers in a folder's weights, from the heads of the files; None without weights."""
    count = 0
    for file in model.glob("model*.safetensors"):
        with readable(file), safe_open(file, framework="numpy") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return count or None


__all__ = ["model_page"]

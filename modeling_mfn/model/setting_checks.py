"""Checks of the settings in an MFN config: each returns the setting in its final form, or says what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from .checks import as_number, as_whole, check_type, is_whole, shown
from .families import FAMILIES
from .feature_names import existing_feature
from .presets import read_presets

EDITS = ("pruned_features", "removed_decoder_rows", "removed_encoder_rows")
"""Fields that record edited features. Each holds a part of the one before."""
MAX_FEATURES = 2**24
"""Largest number of features per MFN layer, as many as the largest sparse autoencoders that were published."""


def check_alpha(alpha: float, name: str = "alpha") -> float:
    """Returns the blend as a float; `ValueError` unless it is finite and in [0, 1]."""
    return as_number(name, alpha, 0, 1, "a finite number from 0 (base model) to 1 (features only)")


def check_k(k: int, num_features: int, removed: int = 0) -> int:
    """Returns the number of active features; `ValueError` unless 1 <= k <= num_features - removed."""
    if not is_whole(k) or not 1 <= k <= num_features - removed:
        less = f", less {removed} that compact() removed" if removed else ""
        raise ValueError(f"k is {shown(k)}; it must be a whole number from 1 to num_features ({num_features}){less}")
    return k


def check_layers(layers: str | list[int], num_blocks: int, first: int = 0) -> list[int]:
    """Returns block indices in ascending order; "all" stands for every block from the first one that can have a layer.

    Raises:
        ValueError: on an index that is out of range, given twice, or not a whole number.
    """
    if isinstance(layers, str) and layers == "all" and first < num_blocks:
        return list(range(first, num_blocks))
    if not isinstance(layers, list | tuple | range) or not layers:
        raise ValueError(
            f'layers is {shown(layers)}; it must be "all" or a list of block indices from {first} to {num_blocks - 1}'
        )
    found = set()
    for layer in layers:
        if not is_whole(layer) or not 0 <= layer < num_blocks:
            raise ValueError(f"layers contains {shown(layer)}; the base model has blocks 0 to {num_blocks - 1}")
        if layer < first:
            raise ValueError(
                f'layers contains {layer}, and nothing is written to the stream before that layer; with codes="update" '
                f"this family's blocks {first} to {num_blocks - 1} can have one"
            )
        if layer in found:
            raise ValueError(f"layers contains {layer} twice; each block can have one MFN layer")
        found.add(layer)
    return sorted(layers)


def check_features(name: str, features: Any, layers: list[int], num_features: int) -> dict[str, list[int]]:
    """Returns feature indices by layer: each list ascending, without repetition, keys as strings, as JSON has them.

    Raises:
        ValueError: on a layer or a feature that does not exist.
    """
    if not isinstance(features, Mapping | None):
        raise ValueError(f"{name} is {shown(features)}; it must be a mapping of layers to features")
    existing = {str(layer): layer for layer in layers}
    checked = {}
    for layer, indices in (features or {}).items():
        key = str(layer) if layer in layers else layer
        if key not in existing:
            raise ValueError(f"{name} has layer {shown(layer)}; layers with features are {layers}")
        if not isinstance(indices, Collection) or isinstance(indices, str | Mapping):
            raise ValueError(f"{name} has {shown(indices)} for layer {layer}; it must be a list of features")
        for index in indices:
            if not is_whole(index) or not 0 <= index < num_features:
                raise ValueError(f"{name} has L{layer}/{shown(index)}; features are 0 to {num_features - 1}")
        if indices:
            checked[key] = sorted(set(indices))
    return checked


def _first_layer(config: Any) -> int:
    """Returns the first block that can have an MFN layer.

    A parallel block is read at its input. Before block 0 nothing has been written, so there is no update to code.
    """
    family = FAMILIES.get(config.text_config.model_type)
    return int(config.codes == "update" and family is not None and family.is_parallel(config.text_config))


def _check_edit(name: str, config: Any, given: Any) -> dict[str, list[int]]:
    """Returns edited features as `check_features` does. Each list of features must be a part of the one before."""
    checked = check_features(name, given, config.layers, config.num_features)
    outer = dict(zip(EDITS[1:], EDITS, strict=False)).get(name)
    for layer, features in checked.items() if outer else ():
        if more := set(features) - set(getattr(config, str(outer)).get(layer, [])):
            raise ValueError(f"{name} has L{layer}/{min(more)}, which is not in {outer}")
    if name == "removed_decoder_rows" and config.shared_decoder and checked:
        raise ValueError("shared_decoder is True, so removed_decoder_rows must be empty: other layers use these rows")
    return checked


def _check_norms(config: Any, norms: dict) -> dict:
    check_type("direction_norms", norms, dict)
    for feature, norm in norms.items():
        try:
            existing_feature(feature, config.layers, config.num_features)
        except ValueError as error:
            raise ValueError(f"direction_norms: {error}") from error
        as_number(f"norm of {feature} in direction_norms", norm, 0, allowed="finite and at least 0")
    return norms


def _check_presets(config: Any, presets: dict) -> dict:
    read_presets(presets, config.layers, config.num_features)
    return presets


def _check_active(config: Any, name: Any) -> str | None:
    check_type("active_preset", name, str | None)
    if name is not None and name not in config.steering_presets:
        raise ValueError(
            f"active_preset is {shown(name)}; it must be null or a preset: "
            f"{', '.join(sorted(config.steering_presets)) or 'this model has none'}"
        )
    return name


CHECKS: dict[str, Callable[[Any, Any], Any]] = {
    "num_features": lambda config, given: as_whole("num_features", given, 1, MAX_FEATURES),
    "layers": lambda config, given: check_layers(given, config.text_config.num_hidden_layers, _first_layer(config)),
    **{name: partial(_check_edit, name) for name in EDITS},
    "k": lambda config, given: check_k(given, config.num_features, config.most_removed),
    "alpha": lambda config, given: check_alpha(given),
    "coding_rounds": lambda config, given: as_whole("coding_rounds", given, 1),
    "refine_steps": lambda config, given: as_whole("refine_steps", given, 0),
    "steering_presets": _check_presets,
    "active_preset": _check_active,
    "direction_norms": _check_norms,
}
"""Setting -> function that returns its final form. Each needs only settings that stand before its own."""

__all__ = ["CHECKS", "EDITS", "check_alpha", "check_features", "check_k", "check_layers"]

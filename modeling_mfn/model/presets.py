"""Presets: named interventions, kept as plain JSON in the model's config, so that they travel with the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from .checks import shown
from .feature_names import FeatureName, format_feature, is_among
from .interventions import Intervention, check_interventions, read_intervention, write_intervention

POSITIONS = ("all", "prompt", "generated")


class Preset(NamedTuple):
    """Interventions that `model.steer` knows by a name."""

    interventions: Mapping[FeatureName, Intervention]
    """`"L6/1234"` -> intervention."""
    positions: str
    """`"all"`, `"prompt"` or `"generated"`."""


def make_preset(interventions: Any, positions: Any, layers: Collection[int], num_features: int) -> Preset:
    """Makes a preset for a model with these MFN layers; `ValueError` if the interventions cannot be one."""
    if not isinstance(positions, str) or positions not in POSITIONS:
        raise ValueError(
            f"positions of a preset are {shown(positions)}; they can be {', '.join(POSITIONS)}; a mask belongs to one "
            "batch"
        )
    if not isinstance(interventions, Mapping):
        raise ValueError(f"{shown(interventions)} is not a mapping of features to interventions, for every row alike")
    checked = check_interventions(interventions, layers, num_features)
    return Preset({format_feature(*feature): each for feature, each in checked.items()}, positions)


def depending_on(preset: Preset, features: Mapping[str, Collection[int]]) -> dict[FeatureName, Intervention]:
    """Returns a preset's interventions that act on features (layer -> indices) or wait for one of them."""
    return {
        name: each
        for name, each in preset.interventions.items()
        if is_among(name, features) or (each.when is not None and is_among(each.when, features))
    }


def without_pruned(preset: Preset, pruned: Mapping[str, Collection[int]]) -> tuple[Preset, list[FeatureName]]:
    """Returns the part of a preset that pruning left, and the features on which interventions are lost.

    A pruned feature that was to be scaled or ablated is in neither: it is 0 anyway.
    """
    gone = depending_on(preset, pruned)
    lost = [name for name, each in gone.items() if each.coefficients[1] or not is_among(name, pruned)]
    return preset._replace(interventions={n: e for n, e in preset.interventions.items() if n not in gone}), lost


def write_preset(preset: Preset) -> dict[str, Any]:
    """Writes a preset as JSON: {"positions": "all", "interventions": {"L6/1234": {"kind": "clamp", "value": 4.0}}}.

    A condition adds "when" and "above".
    """
    return {
        "positions": preset.positions,
        "interventions": {feature: write_intervention(each) for feature, each in preset.interventions.items()},
    }


def read_presets(written: Any, layers: Collection[int], num_features: int) -> dict[str, Preset]:
    """Reads the presets of a config; `ValueError` names a preset that a model with these MFN layers cannot have."""
    if not isinstance(written, Mapping):
        raise ValueError(f"steering_presets is {shown(written)}; it must map names to presets")
    return {name: _read_preset(name, each, layers, num_features) for name, each in written.items()}


def _read_preset(name: Any, written: Any, layers: Collection[int], num_features: int) -> Preset:
    try:
        check_name(name)
        if not isinstance(written, Mapping) or set(written) != {"positions", "interventions"}:
            raise ValueError(f"{shown(written)} does not hold just positions and interventions")
        interventions = written["interventions"]
        if not isinstance(interventions, Mapping):
            raise ValueError(f"interventions are {shown(interventions)}, not a mapping")
        read = {feature: read_intervention(each) for feature, each in interventions.items()}
        return make_preset(read, written["positions"], layers, num_features)
    except ValueError as error:
        raise ValueError(f"steering preset {shown(name)}: {error}") from error


def check_name(name: Any) -> str:
    """Returns the name of a preset; `ValueError` unless it is text that prints on one line."""
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise ValueError(f"{shown(name)} is not a name for a preset; it must be text on one line")
    return name


__all__ = ["Preset"]

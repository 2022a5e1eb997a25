"""Interventions by name, by label, and in units of a feature's own typical activation."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...model.feature_names import format_feature, is_among, parse_feature
from ...utils.display import visible

if TYPE_CHECKING:
    from ...model.interventions import Intervention, Interventions
    from .atlas import FeatureAtlas

UNITS = ("typical", "activation")


def steering(
    atlas: FeatureAtlas, interventions: Interventions, unit: str = "typical", model: Any = None
) -> dict[tuple[int, int], Intervention]:
    """What `model.steer` takes; `FeatureAtlas.steering` has the arguments."""
    if unit not in UNITS:
        raise ValueError(f"unit is {unit!r}; it must be {' or '.join(map(repr, UNITS))}")
    chosen: dict[tuple[int, int], Intervention] = {}
    given_as: dict[tuple[int, int], Any] = {}
    # a feature that is named by itself gets its own intervention, whatever groups it is in
    for name, given in sorted(interventions.items(), key=lambda item: not _is_feature(item[0])):
        intervention = _read(name, given)
        meant = [name] if _is_feature(name) else group(atlas, str(name), model)
        for feature in map(parse_feature, meant):
            if feature not in given_as:
                atlas[feature]  # there is one
                chosen[feature], given_as[feature] = intervention, name
            elif _is_feature(name) or not _is_feature(given_as[feature]):
                raise ValueError(f"{format_feature(*feature)} is meant by {given_as[feature]!r} and by {name!r}")
    return chosen if unit == "activation" else {at: _scaled(atlas, at, each) for at, each in chosen.items()}


def group(atlas: FeatureAtlas, label: str, model: Any = None) -> list[str]:
    """The features that a label shows; `FeatureAtlas.group` says more."""
    wanted = label.strip().casefold()
    shown = atlas.labels.shown()
    found = [feature for feature, text in shown.items() if text.strip().casefold() == wanted]
    if not found:
        near = difflib.get_close_matches(label[:80], {text[:80] for text in shown.values()}, 3, 0.5)
        hint = "; there are " + ", ".join(f"'{visible(text)}'" for text in near) if near else ""
        raise ValueError(
            f"no feature is labelled '{visible(label)}'{hint}; a feature's name is (layer, index) or 'L6/1234'"
        )
    found.sort(key=parse_feature)
    there = [feature for feature in found if not _is_pruned(atlas, feature, model)]
    if not there:
        raise ValueError(f"all features that are labelled '{visible(label)}' are pruned: {', '.join(found)}")
    return there


def _is_pruned(atlas: FeatureAtlas, feature: str, model: Any) -> bool:
    """By the model as it is; without one, when the atlas was made."""
    if model is None:
        return bool(atlas.row(feature)["status"] == "pruned")
    return is_among(feature, getattr(model, "config", model).pruned_features)


def _is_feature(name: Any) -> bool:
    try:
        parse_feature(name)
    except (ValueError, TypeError):
        return False
    return True


def _read(name: Any, given: Any) -> Intervention:
    from ...model.interventions import as_intervention

    try:
        return as_intervention(given)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _scaled(atlas: FeatureAtlas, feature: tuple[int, int], intervention: Intervention) -> Intervention:
    from ...model.interventions import Add, Clamp

    if not isinstance(intervention, Add | Clamp):
        return intervention
    typical = atlas[feature].mean_activation
    if typical is None:
        raise ValueError(
            f"{format_feature(*feature)} is never active in the atlas, so that it has no typical activation; "
            'give its strength with unit="activation"'
        )
    return replace(intervention, value=intervention.value * typical)


__all__ = ["group", "steering"]

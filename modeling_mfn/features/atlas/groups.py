"""Interventions given by label, in units of each feature's own typical activation."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from ...model.feature_names import format_feature, is_among, parse_feature
from ...model.interventions import Add, Clamp, Intervention, Interventions, as_intervention
from ...utils.display import visible
from .feature_index import FeatureIndex
from .labels import Labels

UNITS = ("typical", "activation")
SUGGESTIONS, SUGGESTION_SIMILARITY = 3, 0.5
"""Labels that an error proposes in place of an unknown one: at most this many, with at least this `difflib` ratio."""
COMPARED_CHARACTERS = 80
"""Characters of a label that are compared for a proposal; labels may be of any length."""


def steering(
    features: FeatureIndex, labels: Labels, interventions: Interventions, unit: str = "typical", model: Any = None
) -> dict[tuple[int, int], Intervention]:
    """Makes the argument of `model.steer` from interventions on features and on labels.

    See `FeatureAtlas.steering` for the arguments and errors.
    """
    if unit not in UNITS:
        raise ValueError(f"unit is {unit!r}; it must be {' or '.join(map(repr, UNITS))}")
    chosen: dict[tuple[int, int], Intervention] = {}
    given_as: dict[tuple[int, int], Any] = {}
    # features first: a feature given by name keeps its own intervention, whatever groups it is in
    for name, given in sorted(interventions.items(), key=lambda item: not _is_feature(item[0])):
        intervention = _read_intervention(name, given)
        meant = [name] if _is_feature(name) else group(features, labels, str(name), model)
        for feature in map(parse_feature, meant):
            if feature not in given_as:
                features.check(feature)
                chosen[feature], given_as[feature] = intervention, name
            elif _is_feature(name) or not _is_feature(given_as[feature]):
                raise ValueError(f"{format_feature(*feature)} is meant by {given_as[feature]!r} and by {name!r}")
    if unit == "activation":
        return chosen
    return {feature: _in_typical_units(features, feature, each) for feature, each in chosen.items()}


def group(features: FeatureIndex, labels: Labels, label: str, model: Any = None) -> list[str]:
    """Names of the features that show a label and are not pruned.

    See `FeatureAtlas.group` for the arguments and errors.
    """
    wanted = label.strip().casefold()
    shown = labels.shown()
    found = [feature for feature, text in shown.items() if text.strip().casefold() == wanted]
    if not found:
        raise ValueError(
            f"no feature is labelled '{visible(label)}'{_suggestion(label, shown.values())}; "
            "a feature's name is (layer, index) or 'L6/1234'"
        )
    found.sort(key=parse_feature)
    there = [feature for feature in found if not _is_pruned(features, feature, model)]
    if not there:
        raise ValueError(f"all features that are labelled '{visible(label)}' are pruned: {', '.join(found)}")
    return there


def _suggestion(label: str, texts: Any) -> str:
    known = {text[:COMPARED_CHARACTERS] for text in texts}
    near = difflib.get_close_matches(label[:COMPARED_CHARACTERS], known, SUGGESTIONS, SUGGESTION_SIMILARITY)
    return "; there are " + ", ".join(f"'{visible(text)}'" for text in near) if near else ""


def _is_pruned(features: FeatureIndex, feature: str, model: Any) -> bool:
    """True if the model has pruned the feature; without a model, if it was pruned when the atlas was built."""
    if model is None:
        return bool(features.row(feature)["status"] == "pruned")
    return is_among(feature, getattr(model, "config", model).pruned_features)


def _is_feature(name: Any) -> bool:
    try:
        parse_feature(name)
    except (ValueError, TypeError):
        return False
    return True


def _read_intervention(name: Any, given: Any) -> Intervention:
    try:
        return as_intervention(given)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _in_typical_units(features: FeatureIndex, feature: tuple[int, int], intervention: Intervention) -> Intervention:
    """Multiplies the value of `Add` and `Clamp` by the feature's mean activation; others have no unit."""
    if not isinstance(intervention, Add | Clamp):
        return intervention
    typical = features.row(feature)["mean_activation"]
    if typical is None:
        raise ValueError(
            f"{format_feature(*feature)} is never active in the atlas, so it has no typical activation; "
            'give its strength with unit="activation"'
        )
    return replace(intervention, value=intervention.value * typical)


__all__ = ["group", "steering"]

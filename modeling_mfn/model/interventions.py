"""Interventions on features, and what they do to a code."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from .feature_names import FeatureName, existing_feature, format_feature, parse_feature


@dataclass(frozen=True, repr=False)
class Intervention:
    """What is done to one feature's activation: z <- scale * z + shift, where z is 0 when the feature is inactive.

    With `when`, a feature too, only tokens count on which that feature's activation is larger than `above`. This is the
    activation that its encoder finds on the token: what earlier layers' interventions made of the residual stream has
    its effect on it, interventions on the `when` feature's own layer have none. Its layer must be that of the feature
    acted on, or an earlier one.

    `ValueError` if a number is not finite, `when` names no feature, or `above` is negative or has no `when`.
    """

    when: FeatureName | None = field(default=None, kw_only=True)
    """Kept as `"L6/1234"`, whichever way it is given."""
    above: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self) if each.name != "when"):
            number = getattr(self, name)
            if not hasattr(number, "__float__") or not math.isfinite(number):
                raise ValueError(f"{self}: {name} is {number!r}, not finite; an intervention needs a finite number")
            object.__setattr__(self, name, float(number))
        if self.when is not None:
            object.__setattr__(self, "when", format_feature(*parse_feature(self.when)))
        if self.above < 0 or (self.above and self.when is None):
            raise ValueError(f"above is {self.above}; it must be at least 0, and belongs to a feature given as when")

    def __repr__(self) -> str:
        given = [repr(getattr(self, each.name)) for each in fields(self) if not each.kw_only]
        if self.when is not None:
            given += [f"when={self.when!r}", f"above={self.above}"]
        return f"{type(self).__name__}({', '.join(given)})"

    @property
    def coefficients(self) -> tuple[float, float]:
        """(scale, shift)."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class Clamp(Intervention):
    """Sets the activation to `value`, active or not. In the units of the code: `out.codes[layer].values`."""

    value: float

    @property
    def coefficients(self) -> tuple[float, float]:
        return 0.0, self.value


@dataclass(frozen=True, repr=False)
class Scale(Intervention):
    """Multiplies the activation by `factor`."""

    factor: float

    @property
    def coefficients(self) -> tuple[float, float]:
        return self.factor, 0.0


@dataclass(frozen=True, repr=False)
class Add(Intervention):
    """Adds `value` to the activation, active or not."""

    value: float

    @property
    def coefficients(self) -> tuple[float, float]:
        return 1.0, self.value


@dataclass(frozen=True, repr=False)
class Ablate(Intervention):
    """Sets the activation to 0."""

    @property
    def coefficients(self) -> tuple[float, float]:
        return 0.0, 0.0


KINDS: dict[str, type[Intervention]] = {kind.__name__.lower(): kind for kind in (Ablate, Add, Clamp, Scale)}
"""By their names in JSON."""


Interventions = Mapping[FeatureName, Intervention | Mapping[str, Any]]
"""Feature -> intervention, as an object or as JSON (see `read_intervention`)."""


CheckedInterventions = dict[tuple[int, int], Intervention]


def as_intervention(given: Any) -> Intervention:
    """What was given as an intervention: one, its JSON, or one of another copy of these classes, as a model's own code
    has beside the installed package. `ValueError` if it is none."""
    if isinstance(given, Intervention):
        return given
    if is_dataclass(given) and not isinstance(given, type):
        settings = {each.name: getattr(given, each.name) for each in fields(given)}
        return _made(type(given).__name__.lower(), settings, given)
    return read_intervention(given)


def read_intervention(written: Any) -> Intervention:
    """From JSON: {"kind": "clamp", "value": 4.0}, and for a condition "when" and "above". `ValueError` if it is no
    intervention."""
    settings = dict(written) if isinstance(written, Mapping) else {}
    return _made(settings.pop("kind", None), settings, written)


def write_intervention(intervention: Intervention) -> dict[str, Any]:
    """The JSON that `read_intervention` reads."""
    written: dict[str, Any] = {"kind": type(intervention).__name__.lower()}
    for each in fields(intervention):
        if not each.kw_only or intervention.when is not None:
            written[each.name] = getattr(intervention, each.name)
    return written


def _made(kind: Any, settings: dict[str, Any], given: Any) -> Intervention:
    made = KINDS.get(str(kind))
    if made is None:
        raise ValueError(
            f"{given!r} is no intervention; use Clamp, Scale, Add or Ablate, or a mapping such as "
            f'{{"kind": "clamp", "value": 4.0}}, whose kind must be one of {", ".join(KINDS)}'
        )
    needed = {each.name for each in fields(made) if not each.kw_only}
    if not needed <= set(settings) <= needed | {"when", "above"}:
        raise ValueError(f"{given!r} is no intervention; it needs {sorted(needed)}, and may have when and above")
    return made(**settings)


def check_interventions(
    interventions: Interventions, layers: Collection[int], num_features: int
) -> CheckedInterventions:
    """The same by (layer, index); `ValueError` if one cannot be had in a model with these MFN layers."""
    if not isinstance(interventions, Mapping):
        raise ValueError(f"{interventions!r} is no mapping of features to interventions")
    checked: CheckedInterventions = {}
    for name, given in interventions.items():
        layer, index = existing_feature(name, layers, num_features)
        intervention = as_intervention(given)
        if intervention.when is not None and existing_feature(intervention.when, layers, num_features)[0] > layer:
            raise ValueError(
                f"{intervention!r} on L{layer}/{index} waits for a later layer; the condition's layer can be {layer} "
                "or an earlier one"
            )
        if (layer, index) in checked:
            raise ValueError(f"L{layer}/{index} is given twice; a mapping holds one intervention a feature")
        checked[layer, index] = intervention
    return checked


__all__ = [
    "Ablate",
    "Add",
    "Clamp",
    "Intervention",
    "Scale",
]

"""Interventions on features: `Clamp`, `Scale`, `Add`, `Ablate`, and the same as JSON."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from .checks import as_number, shown
from .feature_names import FeatureName, existing_feature, format_feature, parse_feature


@dataclass(frozen=True, repr=False)
class Intervention:
    """Change of one feature's activation: z <- scale * z + shift, where z is 0 if the feature is inactive.

    `when` names a second feature as a condition: the intervention acts only on tokens where that feature's activation
    exceeds `above`. Its activation is what the encoder finds on the token. Interventions on earlier layers change it
    through the residual stream; interventions on its own layer do not. Its layer must be the layer acted on, or an
    earlier one.

    Raises:
        ValueError: if a number is not finite, `when` names no feature, or `above` is negative or has no `when`.
    """

    when: FeatureName | None = field(default=None, kw_only=True)
    """Feature of the condition, kept as `"L6/1234"`."""
    above: float = field(default=0.0, kw_only=True)
    """Activation of `when` that must be exceeded."""

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self) if each.name != "when"):
            number = as_number(f"{name} of {type(self).__name__}", getattr(self, name))
            object.__setattr__(self, name, number)
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
        """Pair (scale, shift)."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class Clamp(Intervention):
    """Set the activation to `value`, active or not, in units of the code (`out.codes[layer].values`)."""

    value: float

    @property
    def coefficients(self) -> tuple[float, float]:
        return 0.0, self.value


@dataclass(frozen=True, repr=False)
class Scale(Intervention):
    """Multiply the activation by `factor`."""

    factor: float

    @property
    def coefficients(self) -> tuple[float, float]:
        return self.factor, 0.0


@dataclass(frozen=True, repr=False)
class Add(Intervention):
    """Add `value` to the activation, active or not."""

    value: float

    @property
    def coefficients(self) -> tuple[float, float]:
        return 1.0, self.value


@dataclass(frozen=True, repr=False)
class Ablate(Intervention):
    """Set the activation to 0."""

    @property
    def coefficients(self) -> tuple[float, float]:
        return 0.0, 0.0


KINDS: dict[str, type[Intervention]] = {kind.__name__.lower(): kind for kind in (Ablate, Add, Clamp, Scale)}
"""Interventions by their names in JSON."""


Interventions = Mapping[Any, Intervention | Mapping[str, Any]]  # Any: a mapping's key type is invariant
"""`FeatureName` -> intervention, as an object or as JSON (see `read_intervention`)."""


CheckedInterventions = dict[tuple[int, int], Intervention]


def as_intervention(given: Any) -> Intervention:
    """Returns an intervention given as an object or as JSON; `ValueError` if it is neither.

    An object may be of another copy of these classes: a model loaded with custom code has one.
    """
    if isinstance(given, Intervention):
        return given
    if is_dataclass(given) and not isinstance(given, type):
        settings = {each.name: getattr(given, each.name) for each in fields(given)}
        return _made(type(given).__name__.lower(), settings, given)
    return read_intervention(given)


def read_intervention(written: Any) -> Intervention:
    """Reads an intervention from JSON: {"kind": "clamp", "value": 4.0}, and for a condition "when" and "above".

    Raises:
        ValueError: if the JSON is not an intervention.
    """
    settings = dict(written) if isinstance(written, Mapping) else {}
    return _made(settings.pop("kind", None), settings, written)


def write_intervention(intervention: Intervention) -> dict[str, Any]:
    """Writes an intervention as the JSON that `read_intervention` reads."""
    written: dict[str, Any] = {"kind": type(intervention).__name__.lower()}
    for each in fields(intervention):
        if not each.kw_only or intervention.when is not None:
            written[each.name] = getattr(intervention, each.name)
    return written


def _made(kind: Any, settings: dict[str, Any], given: Any) -> Intervention:
    made = KINDS.get(kind) if isinstance(kind, str) else None
    if made is None:
        raise ValueError(
            f"{shown(given)} is not an intervention; use Clamp, Scale, Add or Ablate, or a mapping such as "
            f'{{"kind": "clamp", "value": 4.0}}, whose kind must be one of {", ".join(KINDS)}'
        )
    needed = {each.name for each in fields(made) if not each.kw_only}
    if not needed <= set(settings) <= needed | {"when", "above"}:
        raise ValueError(
            f"{shown(given)} is not an intervention; it needs {sorted(needed)}, and may have when and above"
        )
    return made(**settings)


def check_interventions(
    interventions: Interventions, layers: Collection[int], num_features: int
) -> CheckedInterventions:
    """Returns interventions by (layer, index); `ValueError` if a model with these MFN layers cannot have one."""
    if not isinstance(interventions, Mapping):
        raise ValueError(f"{shown(interventions)} is not a mapping of features to interventions")
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
            raise ValueError(f"L{layer}/{index} is given twice; a mapping holds one intervention per feature")
        checked[layer, index] = intervention
    return checked


__all__ = [
    "Ablate",
    "Add",
    "Clamp",
    "Intervention",
    "Scale",
]

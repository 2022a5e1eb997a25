"""Interventions on features, and the context in which a model is steered by them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sparse_code import SparseCode


@dataclass(frozen=True)
class Intervention:
    """What is done to one feature's activation on every token: z <- scale * z + shift, where z is 0 when the feature
    is inactive. `ValueError` if its value is not finite."""

    def __post_init__(self) -> None:
        if not all(math.isfinite(number) for number in self.coefficients):
            raise ValueError(f"{self} is not finite; an intervention needs a finite number")

    @property
    def coefficients(self) -> tuple[float, float]:
        """(scale, shift)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Clamp(Intervention):
    """Sets the activation to `value`, active or not. In the units of the code: `out.codes[layer].values`."""

    value: float

    @property
    def coefficients(self) -> tuple[float, float]:
        return 0.0, self.value


@dataclass(frozen=True)
class Scale(Intervention):
    """Multiplies the activation by `factor`."""

    factor: float

    @property
    def coefficients(self) -> tuple[float, float]:
        return self.factor, 0.0


@dataclass(frozen=True)
class Add(Intervention):
    """Adds `value` to the activation, active or not."""

    value: float

    @property
    def coefficients(self) -> tuple[float, float]:
        return 1.0, self.value


@dataclass(frozen=True)
class Ablate(Intervention):
    """Sets the activation to 0."""

    @property
    def coefficients(self) -> tuple[float, float]:
        return 0.0, 0.0


class CodeEdit(NamedTuple):
    """The interventions on I features of one MFN layer."""

    features: Tensor
    """(I,) int64, distinct."""
    scale: Tensor
    """(I,) float32."""
    shift: Tensor
    """(I,) float32."""

    def apply(self, code: SparseCode) -> SparseCode:
        """(..., K) -> (..., K + I): the edited features leave their old pairs (value 0) and come as extra ones."""
        features = self.features.to(code.indices.device)
        found = code.indices.unsqueeze(-1) == features
        old = (code.values.unsqueeze(-1) * found).sum(-2)
        new = old * self.scale.to(old) + self.shift.to(old)
        kept = code.values.masked_fill(found.any(-1), 0)
        return SparseCode(
            torch.cat([code.indices, features.expand(new.shape)], -1),
            torch.cat([kept, new], -1),
            code.num_features,
        )


Coefficients = dict[tuple[int, int], tuple[float, float]]
"""(layer, feature) -> (scale, shift)."""

_steering = threading.local()  # .active: ((model, coefficients, edits by layer), ...), the innermost context last


def _active(model: Any) -> tuple[Coefficients, dict[int, CodeEdit]]:
    for steered, coefficients, edits in reversed(getattr(_steering, "active", ())):
        if steered is model:
            return coefficients, edits
    return {}, {}


def active_edits(model: Any) -> dict[int, CodeEdit]:
    """The edits in force for `model` in this thread, by layer."""
    return _active(model)[1]


@contextmanager
def steering(model: Any, interventions: Mapping[tuple[int, int], Intervention]) -> Iterator[None]:
    """Puts `interventions` in force for `model`, in this thread, until the block is left, by an exception too. Within
    another such context they act on what that one makes of the activation."""
    coefficients = dict(_active(model)[0])
    for feature, intervention in interventions.items():
        scale, shift = intervention.coefficients
        outer_scale, outer_shift = coefficients.get(feature, (1.0, 0.0))
        coefficients[feature] = (scale * outer_scale, scale * outer_shift + shift)
    before = getattr(_steering, "active", ())
    _steering.active = (*before, (model, coefficients, _edits_by_layer(coefficients)))
    try:
        yield
    finally:
        _steering.active = before


def _edits_by_layer(coefficients: Coefficients) -> dict[int, CodeEdit]:
    edits = {}
    for layer in sorted({layer for layer, _ in coefficients}):
        chosen = {index: pair for (at, index), pair in coefficients.items() if at == layer}
        scale, shift = torch.tensor(list(chosen.values())).unbind(-1)
        edits[layer] = CodeEdit(torch.tensor(list(chosen)), scale, shift)
    return edits


__all__ = ["Ablate", "Add", "Clamp", "Intervention", "Scale"]

"""Names of features: `(layer, index)`, or the same written `"L6/1234"`."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Mapping

from .checks import shown

FeatureName = tuple[int, int] | str
"""A feature: `(layer, index)`, or the same written `"L6/1234"`."""


def parse_feature(name: FeatureName) -> tuple[int, int]:
    """Returns `(6, 1234)` for itself or for `"L6/1234"`; `ValueError` for anything else."""
    if isinstance(name, str):
        match = re.fullmatch(r"L([0-9]{1,18})/([0-9]{1,18})", name)
        if match is not None:
            return int(match[1]), int(match[2])
    elif isinstance(name, tuple) and len(name) == 2 and not any(isinstance(number, bool) for number in name):
        try:
            return operator.index(name[0]), operator.index(name[1])
        except TypeError:
            pass
    raise ValueError(f'{shown(name)} names no feature; write (layer, index) or "L6/1234"')


def format_feature(layer: int, index: int) -> str:
    """Writes a feature as `"L6/1234"`."""
    return f"L{layer}/{index}"


def existing_feature(name: FeatureName, layers: Collection[int], num_features: int) -> tuple[int, int]:
    """Returns (layer, index); `ValueError` if a model with these MFN layers has no such feature."""
    layer, index = parse_feature(name)
    if layer not in layers:
        raise ValueError(f"block {shown(layer)} has no MFN layer; blocks with one are {layers}")
    if not 0 <= index < num_features:
        raise ValueError(f"L{layer}/{shown(index)} does not exist; features are 0 to {num_features - 1}")
    return layer, index


def is_among(name: FeatureName, features: Mapping[str, Collection[int]]) -> bool:
    """True if a feature is in a table layer -> indices, such as a config's `pruned_features`."""
    layer, index = parse_feature(name)
    return index in features.get(str(layer), ())


__all__ = ["FeatureName", "existing_feature", "format_feature", "is_among", "parse_feature"]

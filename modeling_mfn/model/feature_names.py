"""How a feature is named: `(layer, index)`, or the same written `"L6/1234"`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

FeatureName = tuple[int, int] | str
"""A feature: `(layer, index)`, or the same written `"L6/1234"`."""


def parse_feature(name: FeatureName) -> tuple[int, int]:
    """`(6, 1234)` from itself or from `"L6/1234"`; `ValueError` otherwise."""
    if isinstance(name, str):
        match = re.fullmatch(r"L(\d+)/(\d+)", name)
        if match is not None:
            return int(match[1]), int(match[2])
    elif isinstance(name, tuple) and len(name) == 2 and all(hasattr(number, "__index__") for number in name):
        return int(name[0]), int(name[1])
    raise ValueError(f'{name!r} names no feature; write (layer, index) or "L6/1234"')


def existing_feature(name: FeatureName, layers: Collection[int], num_features: int) -> tuple[int, int]:
    """(layer, index); `ValueError` if a model with these MFN layers has no such feature."""
    layer, index = parse_feature(name)
    if layer not in layers:
        raise ValueError(f"block {layer} has no MFN layer; those of this model are {layers}")
    if not 0 <= index < num_features:
        raise ValueError(f"L{layer}/{index} does not exist; features are 0 to {num_features - 1}")
    return layer, index


def format_feature(layer: int, index: int) -> str:
    """`"L6/1234"`."""
    return f"L{layer}/{index}"


def is_among(name: FeatureName, features: Mapping[str, Collection[int]]) -> bool:
    """Whether a feature is one of those of a config's `pruned_features`, or of others kept so: layer -> indices."""
    layer, index = parse_feature(name)
    return index in features.get(str(layer), ())


__all__ = ["FeatureName", "existing_feature", "format_feature", "is_among", "parse_feature"]

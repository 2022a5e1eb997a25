"""How a feature is named: `(layer, index)`, or the same written `"L6/1234"`."""

from __future__ import annotations

import re

FeatureName = tuple[int, int] | str
"""A feature: `(layer, index)`, or the same written `"L6/1234"`."""


def parse_feature(name: FeatureName) -> tuple[int, int]:
    """`(6, 1234)` from itself or from `"L6/1234"`; `ValueError` otherwise."""
    if isinstance(name, str):
        match = re.fullmatch(r"L(\d+)/(\d+)", name)
        if match is None:
            raise ValueError(f'{name!r} names no feature; write (layer, index) or "L6/1234"')
        return int(match[1]), int(match[2])
    layer, index = name
    return layer, index


def format_feature(layer: int, index: int) -> str:
    """`"L6/1234"`."""
    return f"L{layer}/{index}"


__all__ = ["FeatureName", "format_feature", "parse_feature"]

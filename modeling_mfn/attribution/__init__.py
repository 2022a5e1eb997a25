"""A predicted token traced to features, and features to the tokens that were read."""

from .explanation import (
    AtlasEntry,
    Example,
    Explanation,
    FeatureAttribution,
    InputAttribution,
    LayerAttribution,
    Target,
)
from .tracing import explain

__all__ = [
    "AtlasEntry",
    "Example",
    "Explanation",
    "FeatureAttribution",
    "InputAttribution",
    "LayerAttribution",
    "Target",
    "explain",
]

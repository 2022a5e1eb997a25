"""A predicted token traced to features, and features to the tokens that were read."""

from .explain import explain
from .explanation import Explanation
from .records import AtlasEntry, Example, FeatureAttribution, InputAttribution, LayerAttribution, Target

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

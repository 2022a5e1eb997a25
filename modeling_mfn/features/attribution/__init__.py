"""Attribution: a predicted token traced to features, and features traced to the tokens that were read."""

from .explain import explain
from .explanation import Explanation
from .records import AtlasEntry, ExampleText, FeatureAttribution, InputAttribution, LayerAttribution, Target

__all__ = [
    "AtlasEntry",
    "ExampleText",
    "Explanation",
    "FeatureAttribution",
    "InputAttribution",
    "LayerAttribution",
    "Target",
    "explain",
]

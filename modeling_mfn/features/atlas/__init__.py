"""The atlas: metadata of all features of a model. Reading one needs neither torch nor transformers."""

from .atlas import FeatureAtlas
from .labels import Label, Labels
from .records import Example, ExampleLimits, FeatureRecord

__all__ = ["Example", "ExampleLimits", "FeatureAtlas", "FeatureRecord", "Label", "Labels"]

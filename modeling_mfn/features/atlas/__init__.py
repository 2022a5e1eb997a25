"""The atlas: metadata of all features of a model. Reading one needs neither torch nor transformers."""

from .atlas import Example, FeatureAtlas, FeatureRecord
from .labels import Label, Labels

__all__ = ["Example", "FeatureAtlas", "FeatureRecord", "Label", "Labels"]

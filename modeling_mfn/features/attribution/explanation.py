"""`Explanation`: one predicted token explained, to be read, drawn, saved and loaded again."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group

from .records import AtlasEntry, ExampleText, FeatureAttribution, InputAttribution, LayerAttribution, Target
from .views import draw, explanation_tables

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SCHEMA_VERSION = 1
JSON_NAME, FIGURE_NAME = "explanation.json", "explanation"
MIN_CORRELATED = 3
"""Smallest number of ablated features with a correlation."""


@dataclass(frozen=True)
class Explanation:
    """One predicted token, traced through features to the tokens that were read. Attributions are in logits.

    Each layer accounts for the whole value on its own. A feature's attribution includes its effect through features of
    later layers. Attributions of different layers must therefore not be added.
    """

    target: Target
    tokens: list[str]
    """Tokens read, up to and including the one after which the prediction is made."""
    token_ids: list[int]
    alpha: float
    method: str
    layers: list[LayerAttribution]
    embeddings: InputAttribution | None = None
    """With `codes="update"`: account of the value by the tokens' embeddings, which the stream has beside features."""
    schema_version: int = SCHEMA_VERSION

    @property
    def position(self) -> int:
        """Index of the last token read; the predicted token comes after it."""
        return len(self.tokens) - 1

    @property
    def features(self) -> list[FeatureAttribution]:
        """Listed features of all layers, the largest absolute attribution first."""
        listed = [feature for layer in self.layers for feature in layer.features]
        return sorted(listed, key=lambda feature: -abs(feature.attribution))

    @property
    def ablation_correlation(self) -> float | None:
        """Pearson's r between attributions and measured ablations.

        `None` for fewer than three ablated features, or if either figure has no variance. The features are those with
        the largest attributions, not a random sample.
        """
        pairs = [(f.attribution, f.ablation) for f in self.features if f.ablation is not None]
        if len(pairs) < MIN_CORRELATED:
            return None
        try:
            return statistics.correlation(*zip(*pairs, strict=True))
        except statistics.StatisticsError:
            return None

    def table(self) -> Group:
        """Tables for `rich.print`: the prediction, an account of each layer, and the strongest features."""
        parts = (self.layers, self.features, self.ablation_correlation, self.embeddings)
        return explanation_tables(self.target, self.tokens, *parts)

    def figure(self) -> Figure:
        """Figure of matplotlib: attributions by token and layer, and the strongest features with their ablations."""
        return draw(self.target, self.tokens, self.layers, self.features)

    def to_pandas(self) -> pd.DataFrame:
        """Data frame with one row per listed feature, the strongest first."""
        import pandas as pd

        rows = [
            {
                "feature": feature.name,
                "layer": feature.layer,
                "index": feature.index,
                "attribution": feature.attribution,
                "ablation": feature.ablation,
                "position": feature.position,
                "token": self.tokens[feature.position],
                "activation": feature.activation,
                "label": feature.atlas and feature.atlas.label,
                "firing_rate": feature.atlas and feature.atlas.firing_rate,
            }
            for feature in self.features
        ]
        return pd.DataFrame(rows)

    def to_json(self) -> str:
        """Everything as ASCII JSON; text is raw, with the escapes of JSON."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Explanation:
        """Reads an explanation that `to_json` wrote.

        Raises:
            ValueError: If the text is not an explanation, or has another schema version.
        """
        try:
            raw = json.loads(text)
            version = raw.get("schema_version")
            if version != SCHEMA_VERSION:
                raise ValueError(f"the explanation has schema version {version}; this release reads {SCHEMA_VERSION}")
            embeddings = raw.get("embeddings") and InputAttribution(**raw["embeddings"])
            parts = {"target": Target(**raw["target"]), "embeddings": embeddings}
            parts |= {"layers": [_read_layer(layer) for layer in raw["layers"]]}
            return cls(**raw | parts)
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is not an explanation as `to_json` writes it: {error}") from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `explanation.json`, `explanation.png` and `explanation.svg` into a folder.

        The folder is made if it is missing. Files of these names are replaced, each as a whole.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".explanation-") as scratch:
            (Path(scratch) / JSON_NAME).write_text(self.to_json(), encoding="utf-8")
            with warnings.catch_warnings():
                # a character that the font lacks is drawn as a box, which is all that is needed
                warnings.filterwarnings("ignore", message="Glyph .* missing from font")
                figure = self.figure()
                figure.savefig(Path(scratch) / f"{FIGURE_NAME}.png", dpi=150)
                figure.savefig(Path(scratch) / f"{FIGURE_NAME}.svg", metadata={"Date": None})
            for file in Path(scratch).iterdir():
                os.replace(file, folder / file.name)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Explanation:
        """Reads the explanation that `save` wrote into a folder."""
        return cls.from_json((Path(folder) / JSON_NAME).read_text(encoding="utf-8"))


def _read_layer(raw: dict[str, Any]) -> LayerAttribution:
    return LayerAttribution(**raw | {"features": [_read_feature(feature) for feature in raw["features"]]})


def _read_feature(raw: dict[str, Any]) -> FeatureAttribution:
    inputs = raw["inputs"] and InputAttribution(**raw["inputs"])
    return FeatureAttribution(**raw | {"inputs": inputs, "atlas": raw["atlas"] and _read_entry(raw["atlas"])})


def _read_entry(raw: dict[str, Any]) -> AtlasEntry:
    return AtlasEntry(**raw | {"examples": [ExampleText(**example) for example in raw["examples"]]})


__all__ = ["Explanation"]

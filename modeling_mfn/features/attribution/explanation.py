"""`Explanation`: what was found out about one predicted token, to be read, drawn, saved and loaded again."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .records import AtlasEntry, Example, FeatureAttribution, InputAttribution, LayerAttribution, Target

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from rich.console import Group


SCHEMA_VERSION = 1


JSON_NAME, FIGURE_NAME = "explanation.json", "explanation"


@dataclass(frozen=True)
class Explanation:
    """One predicted token, traced through features to the tokens that were read. Attributions are in units of logits.

    Each layer accounts for the whole value by itself. Layers come one after the other, and what a feature does through
    later layers' features is in its own attribution too, so that attributions of different layers must not be added."""

    target: Target
    tokens: list[str]
    """Those read: up to and including the token whose output is the prediction."""
    token_ids: list[int]
    alpha: float
    method: str
    layers: list[LayerAttribution]
    schema_version: int = SCHEMA_VERSION

    @property
    def position(self) -> int:
        """Index of the last token read. The predicted token is the one after it."""
        return len(self.tokens) - 1

    @property
    def features(self) -> list[FeatureAttribution]:
        """The listed features of all layers, by absolute attribution."""
        listed = [feature for layer in self.layers for feature in layer.features]
        return sorted(listed, key=lambda feature: -abs(feature.attribution))

    @property
    def ablation_correlation(self) -> float | None:
        """Pearson's r between attributions and measured ablations; `None` for fewer than three, or if either has no
        variance. The features are those with the largest attributions, not a random sample."""
        pairs = [(f.attribution, f.ablation) for f in self.features if f.ablation is not None]
        if len(pairs) < 3:
            return None
        try:
            return statistics.correlation(*zip(*pairs, strict=True))
        except statistics.StatisticsError:
            return None

    def table(self) -> Group:
        """For `rich.print`: the prediction, an account of each layer, and the strongest features."""
        from .views import explanation_tables

        return explanation_tables(self)

    def figure(self) -> Figure:
        """A matplotlib figure: attributions by token and layer, and the strongest features beside their ablations."""
        from .views import draw

        return draw(self)

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each listed feature, the strongest first."""
        import pandas

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
        return pandas.DataFrame(rows)

    def to_json(self) -> str:
        """Everything, as ASCII JSON; text is as it came, escaped as JSON has it."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Explanation:
        """The explanation that `to_json` wrote. `ValueError` if it is none, or of a later version."""
        try:
            raw = json.loads(text)
            version = raw.get("schema_version")
            if version != SCHEMA_VERSION:
                raise ValueError(f"the explanation has schema version {version}; this release reads {SCHEMA_VERSION}")
            return cls(**raw | {"target": Target(**raw["target"]), "layers": [_layer(item) for item in raw["layers"]]})
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is no explanation as `to_json` writes it: {error}") from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `explanation.json`, `explanation.png` and `explanation.svg` into a folder, which is made if need be;
        files of these names are replaced. Each appears whole or not at all."""
        import warnings

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".explanation-") as scratch:
            (Path(scratch) / JSON_NAME).write_text(self.to_json(), encoding="utf-8")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # shown as a box, as it should
                figure = self.figure()
                figure.savefig(Path(scratch) / f"{FIGURE_NAME}.png", dpi=150)
                figure.savefig(Path(scratch) / f"{FIGURE_NAME}.svg", metadata={"Date": None})
            for file in Path(scratch).iterdir():
                os.replace(file, folder / file.name)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Explanation:
        """The explanation that `save` wrote into a folder."""
        return cls.from_json((Path(folder) / JSON_NAME).read_text(encoding="utf-8"))


def _layer(raw: dict[str, Any]) -> LayerAttribution:
    return LayerAttribution(**raw | {"features": [_feature(item) for item in raw["features"]]})


def _feature(raw: dict[str, Any]) -> FeatureAttribution:
    inputs = raw["inputs"] and InputAttribution(**raw["inputs"])
    atlas = raw["atlas"] and AtlasEntry(**raw["atlas"] | {"examples": _examples(raw["atlas"]["examples"])})
    return FeatureAttribution(**raw | {"inputs": inputs, "atlas": atlas})


def _examples(raw: Sequence[dict[str, Any]]) -> list[Example]:
    return [Example(**item) for item in raw]


__all__ = [
    "Explanation",
]

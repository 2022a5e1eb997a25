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

from ...model.version import __version__
from ...utils.extras import needs
from ...utils.readers import parse_json, readable
from ..public_names import SOURCE_SET, neuronpedia_model
from .graph import attribution_graph
from .records import FeatureAttribution, InputAttribution, LayerAttribution, Target
from .views import describe_target, draw, explanation_tables

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SCHEMA_VERSION = 1
JSON_NAME, FIGURE_NAME = "explanation.json", "explanation"
GRAPH_SLUG, GRAPHS_NAME = "graph", "graph-metadata.json"
"""Name of the graph that `save` writes, and the file in which circuit-tracer's viewer finds the graphs of a folder."""
MIN_CORRELATED = 3
"""Smallest number of ablated features with a correlation."""


@dataclass(frozen=True)
class Explanation:
    """One predicted token, traced through features to the tokens that were read. Attributions are in logits.

    Each layer accounts for the whole value on its own. A feature's attribution includes its effect through features of
    later layers. Attributions of different layers must therefore not be added.
    """

    __pydantic_config__ = {"extra": "forbid"}  # a foreign document is refused

    target: Target
    tokens: list[str]
    """Tokens read, up to and including the one after which the prediction is made."""
    token_ids: list[int]
    alpha: float
    method: str
    layers: list[LayerAttribution]
    embeddings: InputAttribution | None = None
    """With `codes="update"`: account of the value by the tokens' embeddings, which the stream has beside features."""
    model: str | None = None
    """Name of the model: its id on the Hub, or the name of its folder."""
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
        with needs("evaluate"):
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

    def to_graph(self, slug: str = GRAPH_SLUG) -> dict[str, Any]:
        """Makes an attribution graph in the schema of Neuronpedia and circuit-tracer, for their viewers.

        Tokens read are embedding nodes, features one node per token on which they are active, and the prediction is the
        logit node. A link's weight is an attribution of this explanation, in logits or in units of the feature. Parts
        that no feature or token has are nodes of the type "mlp reconstruction error", and are named: features that are
        not listed, baselines and remainders.

        So the links into a traced feature add up to its pre-activation. The links of one layer's nodes into the logit
        node add up to the value. Each layer accounts for the whole value, so links of different layers must not be
        added. There are no links between features, as the explanation has none.

        Args:
            slug: Name of the graph in the viewer.
        """
        read = (self.tokens, self.token_ids)
        return attribution_graph(self.target, *read, self.layers, self.embeddings, self._graph_metadata(slug))

    def _graph_metadata(self, slug: str) -> dict[str, Any]:
        account = "Each layer accounts for the whole value on its own: do not add links of different layers."
        return {
            "slug": slug,
            "scan": neuronpedia_model(self.model),
            "transcoder_list": [],
            "prompt_tokens": self.tokens,
            "prompt": "".join(self.tokens),
            "schema_version": 1,
            "feature_details": {"neuronpedia_source_set": SOURCE_SET},
            "info": {
                "description": f"{describe_target(self.target)}. {account}",
                "generator": {"name": "modeling_mfn", "version": __version__},
            },
            "generation_settings": {"method": self.method, "alpha": self.alpha, "against": self.target.against},
        }

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
            version = parse_json(text, dict[str, Any]).get("schema_version")
            if version != SCHEMA_VERSION:
                raise ValueError(f"it has schema version {version}, and this release reads {SCHEMA_VERSION}")
            read = parse_json(text, cls)
            read._check_lengths()
        except ValueError as error:
            raise ValueError(f"this is not an explanation as `to_json` writes it: {error}") from error
        return read

    def _check_lengths(self) -> None:
        """Raises `ValueError` unless there is a layer, and lists that belong together have one length."""
        if not self.layers:
            raise ValueError("it has no layers")
        if len(self.token_ids) != len(self.tokens):
            raise ValueError(f"it has {len(self.tokens)} tokens and {len(self.token_ids)} token_ids")
        inputs = [self.embeddings, *(feature.inputs for feature in self.features)]
        for part in [*self.layers, *inputs]:
            if part is not None and len(part.by_token) != len(self.tokens):
                raise ValueError(f"it has {len(self.tokens)} tokens and an account of {len(part.by_token)}")
        for feature in self.features:
            same = len(feature.positions) == len(feature.activations) == len(feature.attributions) > 0
            if not same or not 0 <= min(feature.positions) <= max(feature.positions) < len(self.tokens):
                raise ValueError(f"positions of {feature.name} are {feature.positions[:9]} with other figures")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `explanation.json`, `explanation.png`, `explanation.svg` and the graph into a folder.

        `graph.json` is the graph of `to_graph`. With `graph-metadata.json`, circuit-tracer's viewer opens the folder.

        The folder is made if it is missing. Files of these names are replaced, each as a whole.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".explanation-") as scratch:
            (Path(scratch) / JSON_NAME).write_text(self.to_json(), encoding="utf-8")
            graph = self.to_graph()
            for name, content in ((f"{GRAPH_SLUG}.json", graph), (GRAPHS_NAME, {"graphs": [graph["metadata"]]})):
                text = json.dumps(content, indent=1, allow_nan=False)
                (Path(scratch) / name).write_text(text + "\n", encoding="utf-8")
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
        file = Path(folder) / JSON_NAME
        with readable(file):
            return cls.from_json(file.read_text(encoding="utf-8"))


__all__ = ["Explanation"]

"""Figures and labelled features of an atlas, for the model card."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..features.atlas.labels import Label, display_order
from ..features.atlas.schema import FEATURES_FILE, LABELS_FILE
from ..features.atlas.storage import (
    AtlasNotFoundError,
    check_size,
    features_of,
    find_folder,
    read_labels,
    read_metadata,
)
from ..model.feature_names import parse_feature
from ..utils.readers import readable
from .evaluation_file import is_number

COLUMNS = ["name", "firing_rate", "max_activation", "promoted"]
"""Columns of `features.parquet` that a card shows."""


class LabelledFeature(NamedTuple):
    """One row of the card's table of features."""

    name: str
    """`L6/1234`."""
    label: str
    source: str
    score: float | None
    firing_rate: float
    """Share of the atlas' tokens on which the feature is active."""
    max_activation: float | None
    """Largest activation in the atlas; None if the feature never fired."""
    promoted_tokens: list[str]


class AtlasSummary(NamedTuple):
    """Figures of a whole atlas, and its labelled features, the best score first."""

    sources: list[str]
    """Names of the texts in which features were counted, where they have names."""
    tokens: int
    """Tokens of these texts."""
    layers: dict[int, dict[str, float]]
    """Layer -> name of a figure -> value: `dead_share`, `firing_rate_cv` and others."""
    labelled: list[LabelledFeature]

    @property
    def figure_names(self) -> list[str]:
        """Names of the figures that some layer has."""
        return list(dict.fromkeys(name for figures in self.layers.values() for name in figures))


def read_atlas(folder_or_repo: str | os.PathLike[str], revision: str | None = None) -> AtlasSummary | None:
    """Reads the atlas of a model's folder or repository. Of a repository only `features/` is downloaded.

    Rows of features without a label are never held in memory, so that large atlases can be summarised.

    Returns:
        The summary; None if there is no atlas.

    Raises:
        ValueError: If the files of the atlas are damaged.
    """
    try:
        features = find_folder(folder_or_repo, revision)
    except AtlasNotFoundError:
        return None
    with readable(f"the atlas in {features}"):
        metadata = read_metadata(features)
        data = metadata["data"]
        return AtlasSummary(
            sources=[source["name"] for source in data["sources"] if source["name"] is not None],
            tokens=int(data["tokens"]),
            layers={int(layer): _numbers(figures) for layer, figures in metadata["layers"].items()},
            labelled=_labelled(features, features_of(metadata)),
        )


def _numbers(figures: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if is_number(value)}


def _labelled(features: Path, name: str | None) -> list[LabelledFeature]:
    labels = read_labels(features / LABELS_FILE, name)
    best = {label.feature: labels[label.feature][0] for label in labels}
    rows = _rows(features / FEATURES_FILE, best)
    ranked = sorted(best.values(), key=_card_order)
    return [_feature(label, rows[label.feature]) for label in ranked if label.feature in rows]


def _card_order(label: Label) -> tuple[Any, ...]:
    # labels by token sets come last: their scores are often the highest, but a concept says more
    return label.details.get("method") == "tokens", display_order(label), parse_feature(label.feature)


def _feature(label: Label, row: dict[str, Any]) -> LabelledFeature:
    promoted = [str(token["token"]) for token in row["promoted"] or []]
    return LabelledFeature(
        label.feature, label.label, label.source, label.score, row["firing_rate"], row["max_activation"], promoted
    )


def _rows(file: Path, names: Collection[str]) -> dict[str, dict[str, Any]]:
    wanted = pa.array(names, pa.string())  # an atlas without labels has none, and a list of none has no type
    check_size(file)
    table = pq.read_table(file, columns=COLUMNS, filters=pc.field("name").isin(wanted))
    return {row["name"]: row for row in table.to_pylist()}


__all__ = ["AtlasSummary", "LabelledFeature", "read_atlas"]

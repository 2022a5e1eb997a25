"""What a model card shows of an atlas, read from the files of `features/`."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from ..features.atlas.labels import Label, display_order
from ..features.atlas.schema import FEATURES_FILE, LABELS_FILE
from ..features.atlas.storage import read_labels
from ..model.feature_names import parse_feature


class LabelledFeature(NamedTuple):
    """One row of the card's table."""

    name: str
    """`L6/1234`."""
    label: str
    source: str
    score: float | None
    firing_rate: float | None
    """Share of the atlas' tokens."""
    max_activation: float | None
    """In units of the code."""
    promoted_tokens: list[str]


class AtlasSummary(NamedTuple):
    """Figures of the whole atlas, and its labelled features, those with the best scores first."""

    sources: list[str]
    """Names of the data that the features were seen on, where it has names."""
    tokens: int | None
    layers: dict[int, dict[str, float]]
    """Layer -> figure -> value: `dead_share`, `firing_rate_cv`..."""
    labelled: list[LabelledFeature]


def read_atlas(folder_or_repo: str | os.PathLike[str], revision: str | None = None) -> AtlasSummary | None:
    """The atlas of a model's folder, or of a repository on the Hub, of which nothing but `features/` is downloaded.
    `None` where there is none; `ValueError` where its files are damaged."""
    folder = Path(folder_or_repo)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(folder_or_repo), revision=revision, allow_patterns="features/*"))
    features = folder / "features"
    if not (features / "atlas.json").is_file():
        return None
    try:
        atlas = json.loads((features / "atlas.json").read_text(encoding="utf-8"))
        layers = {int(layer): _numbers(figures) for layer, figures in atlas["layers"].items()}
        sources = [source["name"] for source in atlas["data"]["sources"] if source["name"] is not None]
        return AtlasSummary(sources, atlas["data"].get("tokens"), layers, _labelled(features))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"the atlas in {features} is damaged: {error!r}") from error


def _numbers(figures: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if isinstance(value, int | float) and math.isfinite(value)}


def _labelled(features: Path) -> list[LabelledFeature]:
    labels = read_labels(features / LABELS_FILE)
    best = {parse_feature(label.feature): labels[label.feature][0] for label in labels}
    rows = _rows(features / FEATURES_FILE, set(best))
    # token sets last: their areas are often the largest, and a concept says more
    order = sorted(best, key=lambda place: (_is_token_set(best[place]), display_order(best[place]), place))
    return [_feature(best[place], rows.get(place, {})) for place in order]


def _is_token_set(label: Label) -> bool:
    return bool(label.details.get("method") == "tokens")


def _feature(label: Label, row: dict[str, Any]) -> LabelledFeature:
    return LabelledFeature(
        label.feature,
        label.label,
        label.source,
        label.score,
        row.get("firing_rate"),
        row.get("max_activation"),
        [str(token["token"]) for token in row.get("promoted") or []],
    )


def _rows(file: Path, places: set[tuple[int, int]]) -> dict[tuple[int, int], dict[str, Any]]:
    """The rows of `features.parquet` for these features, of which no others are held."""
    if not file.is_file():
        return {}
    import pyarrow.parquet as parquet

    columns = ["layer", "index", "firing_rate", "max_activation", "promoted"]
    found = {}
    with parquet.ParquetFile(file) as table:
        held = [column for column in columns if column in table.schema_arrow.names]
        for batch in table.iter_batches(columns=held):
            for row in batch.to_pylist():
                if (place := (row["layer"], row["index"])) in places:
                    found[place] = row
    return found

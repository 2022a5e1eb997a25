"""Pages of features and the list of all features, as the explorer reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ...features.atlas.feature_index import feature_key
from ...features.atlas.labels import Label, Labels
from .arrow_lists import filled, short_numbers, tuples
from .data_files import to_json
from .examples import SHOWN_CHARACTERS, SHOWN_TOKENS, FeatureExamples, cut

FEATURES_PER_CHUNK = 64
"""Features whose pages are in one file."""
ROWS_PER_PART = 20_000
"""Rows of the list of features in one file."""
COLUMNS = (
    *("layer", "index", "status", "rate", "mean", "max", "label", "label_source", "score", "auroc"),
    *("fires_on", "promotes"),
)
"""Columns of the list of features."""


class Chunk(NamedTuple):
    """Features whose pages are in one file."""

    layer: int
    number: int
    start: int
    """First row in the table of features."""
    end: int

    @property
    def name(self) -> str:
        """Name of the data."""
        return f"features/L{self.layer}/{self.number}"

    @property
    def last_key(self) -> int:
        """Key that is larger than those of all its features, and not larger than any other."""
        return int(feature_key(self.layer, (self.number + 1) * FEATURES_PER_CHUNK))


def chunks_of(features: pa.Table) -> Iterator[Chunk]:
    """Yields the chunks of a table of features, whose rows are by layer and index."""
    layers, numbers = features["layer"].to_numpy(), features["index"].to_numpy() // FEATURES_PER_CHUNK
    if not len(features):
        return
    starts = np.flatnonzero(np.diff(layers, prepend=-1) | np.diff(numbers, prepend=-1)).tolist()
    for start, end in zip(starts, [*starts[1:], len(features)], strict=True):
        yield Chunk(int(layers[start]), int(numbers[start]), start, end)


def feature_pages(rows: pa.Table, labels: list[list[Label]], examples: FeatureExamples) -> str:
    """Makes the pages of some features: a JSON list of records."""
    columns = {
        "feature": rows["name"].to_pylist(),
        "layer": rows["layer"].to_pylist(),
        "index": rows["index"].to_pylist(),
        "status": rows["status"].to_pylist(),
        "firing_count": rows["firing_count"].to_pylist(),
        "firing_rate": short_numbers(rows["firing_rate"]),
        "source_counts": rows["source_counts"].to_pylist(),
        "mean_activation": short_numbers(rows["mean_activation"]),
        "max_activation": short_numbers(rows["max_activation"]),
        "histogram": filled(rows["histogram"]),
        "promoted": _effects(rows, "promoted"),
        "suppressed": _effects(rows, "suppressed"),
        "nearest": tuples(rows["nearest"], "index", "cosine"),
        "co_active": tuples(rows["co_active"], "index", "jaccard", "count"),
        "labels": [[_label(label) for label in of] for of in labels],
    }
    pages = []
    for values in zip(*columns.values(), strict=True):
        record = dict(zip(columns, values, strict=True))
        pages.append(f'{to_json(record)[:-1]},"examples":{examples.json.get(record["index"], "[]")}}}')
    return f"[{','.join(pages)}]"


def _effects(rows: pa.Table, name: str) -> list[list[list[Any]]]:
    return [[[cut(token), effect] for token, effect in of] for of in tuples(rows[name], "token", "effect")]


def _label(label: Label) -> dict[str, Any]:
    record = label.to_record()
    del record["feature"]
    return record


class FeatureList:
    """List of all features, column by column."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self.labelled = 0
        """Features with a label."""

    def add(self, rows: pa.Table, labels: list[list[Label]], examples: FeatureExamples) -> None:
        """Adds some features."""
        best = [of[0] if of else None for of in labels]
        index = rows["index"].to_pylist()
        found = {
            "layer": rows["layer"].to_pylist(),
            "index": index,
            "status": rows["status"].to_pylist(),
            "rate": short_numbers(rows["firing_rate"]),
            "mean": short_numbers(rows["mean_activation"]),
            "max": short_numbers(rows["max_activation"]),
            "label": [label and label.label for label in best],
            "label_source": [label and label.source for label in best],
            "score": [label and label.score for label in best],
            "auroc": list(map(_auroc, labels)),
            "fires_on": [examples.fires_on.get(each, []) for each in index],
            "promotes": [
                [cut(token, SHOWN_CHARACTERS) for (token,) in of[:SHOWN_TOKENS]]
                for of in tuples(rows["promoted"], "token")
            ],
        }
        self.labelled += sum(label is not None for label in best)
        for name, values in found.items():
            self.columns[name] += values

    def parts(self) -> Iterator[str]:
        """Yields the JSON of each part."""
        for start in range(0, len(self.columns["layer"]), ROWS_PER_PART):
            yield to_json({name: values[start : start + ROWS_PER_PART] for name, values in self.columns.items()})


def number_of_parts(features: int) -> int:
    """Returns the number of files that the list of some features takes."""
    return -(-features // ROWS_PER_PART)


def _auroc(labels: list[Label]) -> float | None:
    """Area under the ROC curve that a label's details have; None if there is none."""
    found = (label.details.get("auroc") for label in labels)
    return next((value for value in found if isinstance(value, int | float)), None)


def labels_of(labels: Labels, rows: pa.Table) -> list[list[Label]]:
    """Returns the labels of some features, the one to show first."""
    return [labels[name] for name in zip(rows["layer"].to_pylist(), rows["index"].to_pylist(), strict=True)]


__all__ = ["FEATURES_PER_CHUNK", "Chunk", "FeatureList", "chunks_of", "feature_pages", "labels_of", "number_of_parts"]

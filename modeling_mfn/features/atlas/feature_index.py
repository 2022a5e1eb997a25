"""Feature names on one side, rows of a table on the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from ...model.feature_names import FeatureName, format_feature, parse_feature

INDEX_BITS = 32
"""Bits of a feature key that hold the feature's index; its layer stands above them."""


class FeatureIndex:
    """Finds the row of each feature in the table of features, `features.parquet`."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        names = zip(table["layer"].to_pylist(), table["index"].to_pylist(), strict=True)
        self._places = {name: place for place, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        """Yields the names of all features."""
        return (format_feature(*name) for name in self._places)

    def __contains__(self, feature: FeatureName) -> bool:
        return parse_feature(feature) in self._places

    def check(self, feature: FeatureName) -> None:
        """Raises `ValueError` if there is no such feature."""
        self._place(feature)

    def row(self, feature: FeatureName) -> dict[str, Any]:
        """Row of a feature, column by column; raises `ValueError` if there is no such feature."""
        (row,) = self.table.slice(self._place(feature), 1).to_pylist()
        return dict(row)

    def _place(self, feature: FeatureName) -> int:
        name = parse_feature(feature)
        if name not in self._places:
            layers = sorted({layer for layer, _ in self._places})
            last = max((index for _, index in self._places), default=-1)
            raise ValueError(f"{format_feature(*name)} does not exist; layers are {layers}, features 0 to {last}")
        return self._places[name]


def feature_keys(table: pa.Table) -> np.ndarray:
    """One int64 per row of a table with `layer` and `index`; keys sort as (layer, index) does."""
    return feature_key(table["layer"].to_numpy().astype(np.int64), table["index"].to_numpy())


def feature_key(layer: Any, index: Any) -> Any:
    """Packs a feature's layer and index into one int64; arrays give arrays."""
    return layer << INDEX_BITS | index


__all__ = ["FeatureIndex", "feature_key", "feature_keys"]

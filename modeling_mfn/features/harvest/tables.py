"""From the statistics of a harvest to the tables of an atlas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from ...model.feature_names import format_feature
from ..atlas.schema import EXAMPLES, FEATURES, NUM_STRATA, stratum_edges
from .coactivation import pair_counts
from .directions import Ranked
from .example_pool import ExampleColumns, token_number
from .statistics import UNIT, LayerStatistics

Texts = Callable[[np.ndarray], list[str]]
"""Token ids (n,) -> the text of each."""


def layer_features(
    layer: int,
    statistics: LayerStatistics,
    tokens: int,
    pruned: list[int],
    effects: tuple[Ranked, Ranked],
    nearest: Ranked,
    texts: Texts,
    co_active: int,
) -> pa.Table:
    """Rows of one layer in `features.parquet`."""
    counts = statistics.counts
    index = np.arange(len(counts))
    status = np.where(counts > 0, "alive", "dead").astype(object)
    status[pruned] = "pruned"
    there = status != "pruned"
    silent = counts == 0
    partners, numbers = _most_co_active(statistics, co_active)
    columns = {
        "layer": np.full(len(index), layer),
        "index": index,
        "name": [format_feature(layer, at) for at in index.tolist()],
        "status": status,
        "firing_count": counts,
        "source_counts": _lists(
            statistics.source_counts.T.reshape(-1), np.full(len(index), len(statistics.source_counts))
        ),
        "firing_rate": counts / max(tokens, 1),
        "mean_activation": pa.array(statistics.sums * UNIT / np.maximum(counts, 1), mask=silent),
        "max_activation": pa.array(statistics.maxima, mask=silent),
        "histogram": _rows(statistics.histogram),
        "promoted": _effects(effects[0], there, texts),
        "suppressed": _effects(effects[1], there, texts),
        "nearest": _structs({"index": nearest.indices, "cosine": nearest.scores}, _all(nearest, there)),
        "co_active": _structs(
            {"index": partners.indices, "jaccard": partners.scores, "count": numbers}, (numbers > 0) & there[:, None]
        ),
    }
    return _table(columns, FEATURES)


def layer_examples(
    layer: int, statistics: LayerStatistics, window: int, sources: list[str | None], texts: Texts
) -> pa.Table:
    """Rows of one layer in `examples.parquet`: by feature, top examples before those of the strata."""
    parts = [_example_columns(statistics.top.settle(), None), _example_columns(statistics.strata.settle(), NUM_STRATA)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((joined["rank"], joined["stratum"], joined["index"]))
    joined = {name: column[order] for name, column in joined.items()}
    inside = joined["tokens"] >= 0
    lengths = inside.sum(1)
    ids, place = np.unique(joined["tokens"][inside], return_inverse=True)
    top = joined["stratum"] < 0
    before = statistics.limits.before
    columns = {
        "layer": np.full(len(order), layer),
        "index": joined["index"],
        "kind": np.where(top, "top", "stratum").astype(object),
        "stratum": pa.array(stratum_edges()[joined["stratum"]].astype(np.float32), mask=top),
        "rank": joined["rank"],
        "activation": joined["activations"][:, before],
        "window": joined["number"] // window,
        "position": joined["number"] % window,
        "source": pa.array(sources, pa.string()).take(pa.array(joined["sources"])),
        "offset": inside[:, :before].sum(1),
        "token_ids": _lists(joined["tokens"][inside], lengths),
        "tokens": _lists(
            pa.DictionaryArray.from_arrays(pa.array(place.astype(np.int32)), pa.array(texts(ids), pa.string())), lengths
        ),
        "activations": _lists(joined["activations"][inside], lengths),
    }
    return _table(columns, EXAMPLES)


def layer_figures(statistics: LayerStatistics, tokens: int, pruned: list[int]) -> dict[str, Any]:
    """Figures of one layer in `atlas.json`, over the features that are not pruned."""
    there = np.ones(statistics.num_features, bool)
    there[pruned] = False
    rates = statistics.counts[there] / max(tokens, 1)
    mean, deviation = (float(rates.mean()), float(rates.std(ddof=1))) if len(rates) > 1 else (float(rates.sum()), 0.0)
    return {
        "features": int(there.sum()),
        "dead_share": float((rates == 0).mean()) if len(rates) else 0.0,
        "firing_rate_mean": mean,
        "firing_rate_std": deviation,
        "firing_rate_cv": deviation / mean if mean else 0.0,
        "active_features": float(rates.sum()),
        "max_activation": float(statistics.maxima.max(initial=0.0)),
        "logit_scale": mean_scale(statistics, tokens),
    }


def mean_scale(statistics: LayerStatistics, tokens: int) -> float:
    """Mean over tokens of the scale that `recording_scales` records."""
    return float(statistics.scale_sum[0]) * UNIT / max(tokens, 1)


def _most_co_active(statistics: LayerStatistics, count: int) -> tuple[Ranked, np.ndarray]:
    """Features with the largest Jaccard index |A and B| / |A or B| of the tokens on which they are active.

    Returns:
        The `count` first partners of each feature, and the numbers |A and B|, (m, n). Partners with a number of 0 are
        not partners.
    """
    counts = statistics.counts
    found, numbers = [], []
    start = 0
    for pairs in pair_counts(statistics.pairs, counts):
        union = counts[start : start + len(pairs), None] + counts - pairs
        jaccard = pairs / np.maximum(union, 1)
        order = np.argsort(-jaccard, axis=1, kind="stable")[:, :count]
        found.append((order, np.take_along_axis(jaccard, order, 1)))
        numbers.append(np.take_along_axis(pairs, order, 1))
        start += len(pairs)
    indices, scores = (np.concatenate(part) for part in zip(*found, strict=True))
    return Ranked(indices, scores.astype(np.float32)), np.concatenate(numbers)


def _example_columns(kept: ExampleColumns, strata: int | None) -> ExampleColumns:
    """Columns of a pool's examples; groups are features, or with `strata` pairs of feature and stratum."""
    groups = kept["groups"]
    return {
        "index": groups if strata is None else groups // strata,
        "stratum": np.full(len(groups), -1) if strata is None else groups % strata,
        "rank": np.arange(len(groups)) - np.searchsorted(groups, groups),
        "number": token_number(kept["keys"]),
        "sources": kept["sources"],
        "tokens": kept["tokens"],
        "activations": kept["activations"],
    }


def _all(ranked: Ranked, there: np.ndarray) -> np.ndarray:
    """Mask (m, n) of every entry of the features that are there."""
    return np.broadcast_to(there[:, None], ranked.indices.shape)


def _effects(ranked: Ranked, there: np.ndarray, texts: Texts) -> pa.Array:
    ids, place = np.unique(ranked.indices, return_inverse=True)
    tokens = np.array(texts(ids), object)[place].reshape(ranked.indices.shape)
    return _structs({"token_id": ranked.indices, "token": tokens, "effect": ranked.scores}, _all(ranked, there))


def _structs(columns: dict[str, np.ndarray], kept: np.ndarray) -> pa.Array:
    """One list of structs per row of (m, n) columns, of the entries that are kept."""
    fields = [pa.array(column[kept]) for column in columns.values()]
    return _lists(pa.StructArray.from_arrays(fields, list(columns)), kept.sum(1))


def _rows(array: np.ndarray) -> pa.Array:
    """One list per row of a table (m, n)."""
    return _lists(array.reshape(-1), np.full(len(array), array.shape[1]))


def _lists(values: Any, lengths: np.ndarray) -> pa.Array:
    """Lists of the given lengths that share out the values in their order."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values) if isinstance(values, np.ndarray) else values)


def _table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """Table of a schema, each column cast to its type."""
    arrays = [columns[field.name] for field in schema]
    arrays = [array if isinstance(array, pa.Array) else pa.array(array) for array in arrays]
    return pa.Table.from_arrays([a.cast(f.type) for a, f in zip(arrays, schema, strict=True)], schema=schema)


__all__ = ["layer_examples", "layer_features", "layer_figures", "mean_scale"]

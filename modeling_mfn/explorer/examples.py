"""Examples of an atlas as JSON, one chunk of features after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ..features.atlas.feature_index import feature_keys
from .arrow_lists import offsets_of, one_array
from .data_files import rounded, to_json

MAX_TOKEN = 1000
"""Characters of a token that a page gets. Tokens of some tokenizers are whole files."""
SHOWN_TOKENS, SHOWN_CHARACTERS = 3, 40
"""Tokens of a feature in the list of features, and characters of each."""


def cut(token: str, length: int = MAX_TOKEN) -> str:
    """Cuts a long token; `…` marks the cut."""
    return token if len(token) <= length else token[:length] + "…"


class FeatureExamples(NamedTuple):
    """Examples of a chunk of features. Features without examples are in neither table."""

    json: dict[int, str]
    """Index of a feature -> its examples, as a JSON list."""
    fires_on: dict[int, list[str]]
    """Index of a feature -> tokens of its top examples, the most frequent first."""


class ExampleReader:
    """Reader of a table of examples in its order, which holds no more than it is asked for."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self._tables = tables
        self._next: pa.Table | None = next(tables, None)

    def up_to(self, key: int) -> pa.Table | None:
        """Returns the rows, not returned before, of features with a smaller key; None if there are none."""
        parts = []
        while self._next is not None:
            end = int(np.searchsorted(feature_keys(self._next), key))
            parts.append(self._next.slice(0, end))
            if end < len(self._next):
                self._next = self._next.slice(end)
                break
            self._next = next(self._tables, None)
        parts = [part for part in parts if len(part)]
        return pa.concat_tables(parts) if parts else None


def read_examples(table: pa.Table | None) -> FeatureExamples:
    """Makes JSON of the examples of some features of one layer."""
    if table is None:
        return FeatureExamples({}, {})
    tokens = _Tokens(table)
    index = table["index"].to_numpy()
    starts = np.flatnonzero(np.diff(index, prepend=index[0] - 1))
    rows = _rows(table, tokens)
    kinds, offsets = table["kind"].to_pylist(), table["offset"].to_numpy()
    active = [tokens.texts[place] for place in tokens.places[tokens.offsets[:-1] + offsets].tolist()]
    json, fires_on = {}, {}
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(index)], strict=True):
        counts = Counter(active[row] for row in range(start, end) if kinds[row] == "top")
        json[int(index[start])] = f"[{','.join(rows[start:end])}]"
        fires_on[int(index[start])] = [cut(token, SHOWN_CHARACTERS) for token, _ in counts.most_common(SHOWN_TOKENS)]
    return FeatureExamples(json, fires_on)


class _Tokens:
    """Tokens of all examples of a table."""

    def __init__(self, table: pa.Table) -> None:
        lists = one_array(table["tokens"])
        self.offsets = offsets_of(lists)
        words = lists.flatten()
        known, self.places = np.unique(words.indices.to_numpy(), return_inverse=True)
        self.texts: list[str] = [cut(text) for text in words.dictionary.take(pa.array(known)).to_pylist()]

    def lists(self) -> list[str]:
        """Returns the tokens of each example as a JSON list."""
        written = np.array([to_json(text) for text in self.texts], object)
        return _joined(written[self.places], self.offsets)


def _rows(table: pa.Table, tokens: _Tokens) -> list[str]:
    """Returns each example as a JSON object."""
    lists = one_array(table["activations"])
    columns = {
        "kind": _few(table["kind"]),
        "stratum": _few(table["stratum"]),
        "rank": table["rank"].to_pylist(),
        "activation": _texts(table["activation"].to_numpy()).tolist(),
        "window": table["window"].to_pylist(),
        "position": table["position"].to_pylist(),
        "source": _few(table["source"]),
        "offset": table["offset"].to_pylist(),
        "tokens": tokens.lists(),
        "activations": _joined(_texts(lists.flatten().to_numpy()), offsets_of(lists)),
    }
    form = "{{" + ",".join(f'"{name}":{{}}' for name in columns) + "}}"
    return [form.format(*row) for row in zip(*columns.values(), strict=True)]


def _few(column: pa.ChunkedArray) -> list[str]:
    """Returns a column with few different values as JSON."""
    values = column.to_pylist()
    written = {value: to_json(value) for value in set(values)}
    return [written[value] for value in values]


def _texts(activations: np.ndarray) -> np.ndarray:
    """Returns numbers as JSON. Most are 0; so are those that are not finite, which only a damaged atlas has."""
    written = np.full(len(activations), "0", object)
    there = np.flatnonzero((activations != 0) & np.isfinite(activations))
    written[there] = list(map(repr, rounded(activations[there]).tolist()))
    return written


def _joined(texts: np.ndarray, offsets: np.ndarray) -> list[str]:
    """Returns JSON lists of texts that are JSON."""
    parts, ends = texts.tolist(), offsets.tolist()
    return [f"[{','.join(parts[start:end])}]" for start, end in pairwise(ends)]


__all__ = ["ExampleReader", "FeatureExamples", "cut", "read_examples"]

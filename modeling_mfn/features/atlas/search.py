"""Features found by a word: in their labels, in the tokens they fire on, in the tokens they promote."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from ...utils.display import for_terminal
from .feature_index import feature_keys
from .labels import Labels

NO_MATCH, PART_OF_WORD, WHOLE_WORDS, WHOLE_LABEL = 0, 1, 2, 3
"""Ways in which a label matches a query, the best last."""
MATCH_NAMES = ("", "in part", "a word", "wholly")
"""Ways of matching, as a terminal shows them."""


class Found(NamedTuple):
    """A feature that a search found, with the figures it was ranked by."""

    feature: str
    """Name of the feature, `L6/1234`."""
    label: str | None
    """The label that matches; without a match, the label to show."""
    label_match: int
    """3: the query is the whole label; 2: whole words of it; 1: part of a word; 0: no match."""
    fires_on: float
    """Share of the feature's top examples whose token begins with the query."""
    promotes: float
    """1 / place of the first promoted token that begins with the query; 0 if there is none."""


class SearchResult(list[Found]):
    """Features that a search found, the best first; rich prints them as a table."""

    def __rich__(self) -> Table:
        table = Table("feature", "label", "label matches", "fires on it", "promotes it")
        for found in self:
            label = for_terminal(found.label or "", 40)
            fires_on = f"{found.fires_on:.0%}" if found.fires_on else ""
            promotes = f"{found.promotes:.2f}" if found.promotes else ""
            table.add_row(found.feature, label, MATCH_NAMES[found.label_match], fires_on, promotes)
        return table


def search(features: pa.Table, examples: pa.Table, labels: Labels, query: str, limit: int = 20) -> SearchResult:
    """Finds the features that a query is about; see `FeatureAtlas.search` for the order of results."""
    wanted = " ".join(query.casefold().split())
    if not wanted:
        raise ValueError(f"query is {query!r}; it must be a text that is not empty")
    if limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    names: list[str] = features["name"].to_pylist()
    label_match, matching = _label_matches(names, labels, wanted)
    fires_on, promotes = _fires_on(features, examples, wanted), _promotes(features["promoted"], wanted)
    order = np.lexsort((-features["firing_count"].to_numpy(), -(fires_on + promotes), -label_match))
    order = order[(label_match + fires_on + promotes)[order] > 0][:limit]
    found = []
    for row in order.tolist():
        shown = labels.best(names[row])
        text = matching.get(row, shown.label if shown else None)
        found.append(
            Found(names[row], text, int(label_match[row]), float(fires_on[row]), round(float(promotes[row]), 4))
        )
    return SearchResult(found)


def match_label(label: str, wanted: str) -> int:
    """Way in which a label matches a query; the query is in lower case, with single spaces."""
    text = " ".join(label.casefold().split())
    if text == wanted:
        return WHOLE_LABEL
    if re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text):
        return WHOLE_WORDS
    return PART_OF_WORD if wanted in text else NO_MATCH


def token_matches(token: str, wanted: str) -> bool:
    """True if a token begins with the query, whatever its case: "king" finds " Kings"."""
    return token.strip().casefold().startswith(wanted)


def _label_matches(names: list[str], labels: Labels, wanted: str) -> tuple[np.ndarray, dict[int, str]]:
    """The best match of each feature's labels, (rows,), and the text of the label that has it, by row."""
    places = {name: row for row, name in enumerate(names)}
    best = np.zeros(len(names), np.int64)
    texts: dict[int, str] = {}
    for label in labels:
        match, row = match_label(label.label, wanted), places[label.feature]
        if match > best[row]:
            best[row], texts[row] = match, label.label
    return best, texts


def _fires_on(features: pa.Table, examples: pa.Table, wanted: str) -> np.ndarray:
    """Share of each feature's top examples whose token matches, (rows,)."""
    shares = np.zeros(len(features))
    examples = examples.filter(pc.equal(examples["kind"], "top"))
    if not len(examples):
        return shares
    tokens = examples["tokens"].combine_chunks()
    starts = tokens.offsets.to_numpy()[:-1] - tokens.offsets[0].as_py()
    active = tokens.flatten().take(pa.array(starts + examples["offset"].to_numpy()))
    keys, which = np.unique(feature_keys(examples), return_inverse=True)
    known = feature_keys(features)
    in_order = np.argsort(known)
    rows = in_order[np.searchsorted(known, keys, sorter=in_order)]
    shares[rows] = np.bincount(which, _matching(active, wanted)) / np.bincount(which)
    return shares


def _promotes(promoted: Any, wanted: str) -> np.ndarray:
    """1 / place of the first promoted token of each feature that matches, (rows,); 0 if there is none."""
    lists = promoted.combine_chunks()
    matching = _matching(lists.flatten().field("token").dictionary_encode(), wanted)
    offsets = lists.offsets.to_numpy() - lists.offsets[0].as_py()
    row = np.repeat(np.arange(len(lists)), np.diff(offsets))
    place = np.arange(len(matching)) - offsets[row]
    best = np.zeros(len(lists))
    np.maximum.at(best, row, matching / (place + 1))
    return best


def _matching(tokens: pa.DictionaryArray, wanted: str) -> np.ndarray:
    """1.0 where a token matches, else 0.0; each different token is looked at once."""
    known = np.array([token_matches(token, wanted) for token in tokens.dictionary.to_pylist()], np.float64)
    return known[tokens.indices.to_numpy()] if len(known) else np.zeros(len(tokens))


__all__ = ["Found", "SearchResult", "search"]

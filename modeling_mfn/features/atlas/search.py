"""Finding features by a word: in their labels, in the tokens that they fire on, in the tokens that they promote."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from ...model.feature_names import format_feature
from ...utils.display import for_terminal

if TYPE_CHECKING:
    from .atlas import FeatureAtlas

WHOLE, WORDS, PART = 3, 2, 1
"""How a label matches: it is what is looked for; it has it as words of their own; it has it."""


class Found(NamedTuple):
    """A feature that a search found, and why."""

    feature: str
    """Its name, `L6/1234`."""
    label: str | None
    """The label to show, or the one that matches."""
    label_match: int
    """3: the label is what was looked for; 2: it has it as words of their own; 1: within a word; 0: not at all."""
    fires_on: float
    """Share of its top examples in which it fires on such a token."""
    promotes: float
    """1 / place of the first such token among those it promotes; 0 if there is none."""


class SearchResult(list[Found]):
    """What a search found, the best first."""

    def __rich__(self) -> Table:
        table = Table("feature", "label", "label matches", "fires on it", "promotes it")
        for found in self:
            match = ("", "in part", "a word", "wholly")[found.label_match]
            label = for_terminal(found.label or "", 40)
            fires_on = f"{found.fires_on:.0%}" if found.fires_on else ""
            promotes = f"{found.promotes:.2f}" if found.promotes else ""
            table.add_row(found.feature, label, match, fires_on, promotes)
        return table


def search(atlas: FeatureAtlas, query: str, limit: int = 20) -> SearchResult:
    """The features that a query is about; `FeatureAtlas.search` has the arguments."""
    wanted = " ".join(query.casefold().split())
    if not wanted:
        raise ValueError(f"query is {query!r}; it must be a text that is not empty")
    if limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    names: list[str] = atlas.features["name"].to_pylist()
    place = {name: row for row, name in enumerate(names)}
    label_match = np.zeros(len(names), np.int64)
    matching: dict[int, str] = {}
    for label in atlas.labels:
        match, row = label_matches(label.label, wanted), place[label.feature]
        if match > label_match[row]:
            label_match[row], matching[row] = match, label.label
    fires_on, promotes = _fires_on(atlas.examples, place, wanted), _promotes(atlas.features["promoted"], wanted)
    order = np.lexsort((-atlas.features["firing_count"].to_numpy(), -(fires_on + promotes), -label_match))
    order = order[(label_match + fires_on + promotes)[order] > 0][:limit]
    found = []
    for row in order.tolist():
        shown = atlas.labels.best(names[row])
        text = matching.get(row, shown.label if shown else None)
        found.append(
            Found(names[row], text, int(label_match[row]), float(fires_on[row]), round(float(promotes[row]), 4))
        )
    return SearchResult(found)


def label_matches(label: str, wanted: str) -> int:
    """How a label matches a query that is in lower case, with single spaces."""
    text = " ".join(label.casefold().split())
    if text == wanted:
        return WHOLE
    if re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text):
        return WORDS
    return PART if wanted in text else 0


def token_matches(token: str, wanted: str) -> bool:
    """Whether a token is the query, or begins with it: " Kings" is found by "king"."""
    return token.strip().casefold().startswith(wanted)


def _fires_on(examples: pa.Table, place: dict[str, int], wanted: str) -> np.ndarray:
    examples = examples.filter(pc.equal(examples["kind"], "top"))
    shares = np.zeros(len(place))
    if not len(examples):
        return shares
    tokens = examples["tokens"].combine_chunks()
    starts = tokens.offsets.to_numpy()[:-1] - tokens.offsets[0].as_py()
    active = tokens.flatten().take(pa.array(starts + examples["offset"].to_numpy()))
    keys = (examples["layer"].to_numpy().astype(np.int64) << 32) | examples["index"].to_numpy()
    keys, which = np.unique(keys, return_inverse=True)
    rows = [place[format_feature(key >> 32, key & 0xFFFFFFFF)] for key in keys.tolist()]
    shares[rows] = np.bincount(which, _matching(active, wanted)) / np.bincount(which)
    return shares


def _promotes(promoted: Any, wanted: str) -> np.ndarray:
    lists = promoted.combine_chunks()
    matching = _matching(lists.flatten().field("token").dictionary_encode(), wanted)
    offsets = lists.offsets.to_numpy() - lists.offsets[0].as_py()
    row = np.repeat(np.arange(len(lists)), np.diff(offsets))
    place = np.arange(len(matching)) - offsets[row]
    best = np.zeros(len(lists))
    np.maximum.at(best, row, matching / (place + 1))
    return best


def _matching(tokens: pa.DictionaryArray, wanted: str) -> np.ndarray:
    """1.0 where a token matches: each different token is looked at once."""
    known = np.array([token_matches(token, wanted) for token in tokens.dictionary.to_pylist()], np.float64)
    return known[tokens.indices.to_numpy()] if len(known) else np.zeros(len(tokens))


__all__ = ["Found", "SearchResult", "search"]

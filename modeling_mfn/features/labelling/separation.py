"""Separation of a concept's words from all else by a feature's activations, from counts that fit in memory.

Activations are counted in `LEVELS` levels per feature. A level joins neighbouring bins of the atlas' histogram, so that
each level has about as many of the feature's firings. A feature that uses at most `LEVELS` bins has one level per bin.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...utils.roc import auroc
from ..atlas.schema import HISTOGRAM_EDGES, bin_of
from ..harvest.firings import Firings
from .concepts import HELD_IN, HELD_OUT

LEVELS = 16
FEATURES_AT_ONCE = 256


class Places(NamedTuple):
    """Words and halves at N tokens."""

    columns: np.ndarray
    """(N, J) int64: concepts of the word that ends at a token; -1 where there is none or no further one."""
    is_word: np.ndarray
    """(N,) int64: 1 where a word of some concept ends."""
    half: np.ndarray
    """(N,) int64: `HELD_IN` or `HELD_OUT`."""


class Separation(NamedTuple):
    """Concept that each of m features separates best on held-in words, with figures on held-out words.

    A feature without a concept has -1 and NaN.
    """

    concept: np.ndarray
    """(m,) int64: place of the concept."""
    auroc_held_in: np.ndarray
    """(m,): the smaller of the two areas below, on held-in words; the concept was chosen by it."""
    auroc: np.ndarray
    """(m,): area under the ROC curve, held-out words against all other tokens."""
    auroc_words: np.ndarray
    """(m,): area, held-out words against words of other concepts; NaN if there are none."""
    threshold: np.ndarray
    """(m,): smallest activation that counts as firing, with the best F1 score on held-in words; 0 for any."""
    precision: np.ndarray
    """(m,): share of firings on words of the concept, among held-out words and tokens."""
    recall: np.ndarray
    """(m,): share of held-out words on which the feature fires."""


class ActivationCounts:
    """Activations of one layer's features, counted by level on each concept's words, on all words and on all else.

    Each half is counted on its own. The counts of C concepts take 4 m (2 C + 4) `LEVELS` bytes.
    """

    def __init__(self, histogram: np.ndarray, columns: int) -> None:
        """Makes empty counts for `columns` concepts; `histogram` (m, bins) is the atlas'."""
        self.levels = level_of_bins(histogram)
        self.concepts = np.zeros((len(histogram), columns, 2, LEVELS), np.int32)
        self.kinds = np.zeros((len(histogram), 2, 2, LEVELS), np.int32)
        """(m, 2, 2, levels): counts by `is_word` and `half` of `Places`."""

    def add(self, firings: Firings, places: Places) -> None:
        """Adds the firings of a batch, whose tokens `places` describes."""
        level = self.levels[firings.features, bin_of(firings.values)]
        half = places.half[firings.places]
        kind = (firings.features * 2 + places.is_word[firings.places]) * 2 + half
        _count(self.kinds, kind * LEVELS + level)
        for columns in places.columns.T:
            column = columns[firings.places]
            there = column >= 0
            flat = ((firings.features * self.concepts.shape[1] + column) * 2 + half) * LEVELS + level
            _count(self.concepts, flat[there])

    def thresholds(self) -> np.ndarray:
        """Smallest activation of each level, (m, levels); 0 for the first."""
        lower = np.concatenate([[0.0], HISTOGRAM_EDGES])
        first = [np.argmax(self.levels >= level, axis=1) for level in range(LEVELS)]
        return lower[np.stack(first, 1)]

    def separation(
        self, columns: slice, occurrences: np.ndarray, tokens: np.ndarray, eligible: np.ndarray
    ) -> Separation:
        """Chooses a concept for each feature on the held-in half, and scores it on the held-out half.

        Args:
            columns: The C concepts among which to choose.
            occurrences: (C, 2) occurrences of each concept's words in each half.
            tokens: (2, 2) ordinary tokens, then words, in each half.
            eligible: (C,) true for concepts that have enough words.
        """
        parts = [
            self._separate(slice(start, start + FEATURES_AT_ONCE), columns, occurrences, tokens, eligible)
            for start in range(0, len(self.concepts), FEATURES_AT_ONCE)
        ]
        return Separation(*map(np.concatenate, zip(*parts, strict=True)))

    def _separate(
        self, block: slice, columns: slice, occurrences: np.ndarray, tokens: np.ndarray, eligible: np.ndarray
    ) -> Separation:
        concepts = _with_zeros(self.concepts[block, columns], occurrences)  # (m, C, 2, LEVELS + 1)
        kinds = _with_zeros(self.kinds[block], tokens)
        others = kinds.sum(1, keepdims=True) - concepts
        other_words = kinds[:, 1:] - concepts
        against_all, against_words = auroc(concepts, others), auroc(concepts, other_words)
        smaller = np.fmin(against_all, against_words)
        choice = np.where(eligible[:, None] & ~np.isnan(smaller), smaller, -1.0)[..., HELD_IN]
        rows = np.arange(len(choice))
        best = choice.argmax(1)
        found = choice[rows, best] >= 0

        # firings from each level upwards; level 0 holds the zeros and is left out
        fired = concepts[rows, best, :, :0:-1].cumsum(-1)[..., ::-1]  # (m, 2, LEVELS)
        falsely = others[rows, best, :, :0:-1].cumsum(-1)[..., ::-1]
        wanted = occurrences[best][..., None]
        f1 = 2 * fired / np.maximum(wanted + fired + falsely, 1)
        level = f1[:, HELD_IN].argmax(1)
        fired, falsely = fired[rows, HELD_OUT, level], falsely[rows, HELD_OUT, level]

        def where_found(figures: np.ndarray) -> np.ndarray:
            return np.where(found, figures, np.nan)

        return Separation(
            np.where(found, best, -1),
            where_found(choice[rows, best]),
            where_found(against_all[rows, best, HELD_OUT]),
            where_found(against_words[rows, best, HELD_OUT]),
            where_found(self.thresholds()[block][rows, level]),
            where_found(fired / np.maximum(fired + falsely, 1)),
            where_found(fired / np.maximum(wanted[:, HELD_OUT, 0], 1)),
        )


def level_of_bins(histogram: np.ndarray) -> np.ndarray:
    """Level of each bin of histograms (m, bins), 0 to `LEVELS` - 1, ascending: int64."""
    used = (histogram > 0).cumsum(1)
    before = histogram.cumsum(1) - histogram
    quantiles = before * LEVELS // np.maximum(histogram.sum(1, keepdims=True), 1)
    levels = np.where(used[:, -1:] <= LEVELS, np.maximum(used - 1, 0), quantiles)
    return np.minimum(levels, LEVELS - 1)


def effective_number(counts: np.ndarray) -> float:
    """Equivalent number of equally frequent words for words that occur n times each: (sum n)^2 / sum n^2."""
    counts = counts.astype(np.float64)
    return float(counts.sum() ** 2 / max(float((counts**2).sum()), 1.0))


def _with_zeros(counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Counts (m, C, 2, levels + 1), int64, with a first level for those of `totals` (C, 2) without activation."""
    zeros = totals - counts.sum(-1)
    return np.concatenate([zeros[..., None], counts], -1)


def _count(table: np.ndarray, flat: np.ndarray) -> None:
    np.add.at(table.reshape(-1), flat, np.ones(len(flat), table.dtype))


__all__ = ["ActivationCounts", "Places", "Separation", "effective_number", "level_of_bins"]

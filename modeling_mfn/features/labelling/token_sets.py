"""Token sets: the few tokens that a feature fires on, chosen on one half of the text and judged by the other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..harvest.firings import Firings

MAX_TOKENS = 8
"""Largest number of tokens in a set."""
MIN_FIRINGS = 20
"""Smallest number of firings in each half of the text for a feature to be judged."""
MIN_PRECISION = 0.8
"""Smallest share of a feature's firings, in the judging half, that the set must cover."""


class TokenSet(NamedTuple):
    """Tokens on which a feature fires, with figures from the judging half of the text."""

    token_ids: list[int]
    """Tokens, the one with the most firings first."""
    precision: float
    """Share of the feature's firings that are on these tokens."""
    recall: float
    """Share of these tokens' occurrences on which the feature fires."""
    auroc: float
    """Area under the ROC curve of firing or not, (1 + recall - share of other tokens it fires on) / 2."""
    firings: int
    """Number of firings of the feature."""


class TokenSetCounts:
    """Firings of one layer's m features on the tokens of their examples, counted in each half of the text."""

    def __init__(self, candidates: dict[int, set[int]], num_features: int, vocabulary: int) -> None:
        """Makes empty counts; `candidates` has the tokens that each feature is known to fire on."""
        self.vocabulary = vocabulary
        pairs = [feature * vocabulary + token for feature, tokens in candidates.items() for token in tokens]
        self.pairs = np.array(sorted(pairs), np.int64)
        self.on_pairs = np.zeros((2, len(pairs)), np.int64)
        self.firings = np.zeros((2, num_features), np.int64)

    def add(self, firings: Firings, ids: np.ndarray, half: np.ndarray) -> None:
        """Adds the firings of a batch with the tokens `ids` (B T,) in the halves `half` (B T,)."""
        side = half[firings.places]
        np.add.at(self.firings, (side, firings.features), 1)
        if len(self.pairs):
            pairs = firings.features * self.vocabulary + ids[firings.places]
            at = np.searchsorted(self.pairs, pairs).clip(max=len(self.pairs) - 1)
            known = self.pairs[at] == pairs
            np.add.at(self.on_pairs, (side[known], at[known]), 1)

    def token_sets(self, occurrences: np.ndarray) -> dict[int, TokenSet]:
        """Finds the features that a token set covers: feature -> set.

        A set is chosen in the first half of the text, from the tokens that a feature fires on most often. It has those
        on which the feature fires most surely, as many as give the best F1 score.

        Args:
            occurrences: (2, V) occurrences of each token in each half.
        """
        found = {}
        enough = (self.firings >= MIN_FIRINGS).all(0)
        features = self.pairs // self.vocabulary
        for feature in np.flatnonzero(enough):
            own = slice(*np.searchsorted(features, [feature, feature + 1]))
            tokens, on = self.pairs[own] % self.vocabulary, self.on_pairs[:, own]
            best = choose_tokens(on[0], occurrences[0, tokens], int(self.firings[0, feature]))
            covered, wanted = int(on[1, best].sum()), int(occurrences[1, tokens[best]].sum())
            firings = int(self.firings[1, feature])
            precision, recall = covered / firings, covered / max(wanted, 1)
            if precision >= MIN_PRECISION:
                elsewhere = (firings - covered) / max(int(occurrences[1].sum()) - wanted, 1)
                ids = tokens[best].tolist()
                found[int(feature)] = TokenSet(ids, precision, recall, (1 + recall - elsewhere) / 2, firings)
        return found


def choose_tokens(on: np.ndarray, occurrences: np.ndarray, firings: int) -> np.ndarray:
    """Chooses at most `MAX_TOKENS` of n tokens, so that the set has the best F1 score.

    Args:
        on: (n,) firings of the feature on each token.
        occurrences: (n,) occurrences of each token.
        firings: Firings of the feature on all tokens.

    Returns:
        Places of the chosen tokens, the one with the most firings first.
    """
    frequent = np.argsort(-on, kind="stable")[:MAX_TOKENS]
    frequent = frequent[on[frequent] > 0]
    surest = frequent[np.argsort(-on[frequent] / occurrences[frequent], kind="stable")]
    f1 = 2 * on[surest].cumsum() / (occurrences[surest].cumsum() + firings)
    chosen = surest[: int(f1.argmax()) + 1] if len(surest) else surest
    return chosen[np.argsort(-on[chosen], kind="stable")]


def example_tokens(examples: pa.Table, layer: int) -> dict[int, set[int]]:
    """Tokens on which each feature of a layer is active in its examples: feature -> tokens."""
    examples = examples.filter(pc.equal(examples["layer"], layer))
    ids = examples["token_ids"].combine_chunks()
    tokens = ids.flatten().to_numpy(zero_copy_only=False)
    starts = ids.offsets.to_numpy()[:-1] - ids.offsets[0].as_py()
    found: dict[int, set[int]] = {}
    active = tokens[starts + examples["offset"].to_numpy()]
    for feature, token in zip(examples["index"].to_pylist(), active.tolist(), strict=True):
        found.setdefault(feature, set()).add(token)
    return found


__all__ = ["TokenSet", "TokenSetCounts", "example_tokens"]

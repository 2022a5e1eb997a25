"""Counts of how often two features of a layer are active on the same token, without a table of m x m.

A feature's row has `WIDTH` counters; partner j is counted in counter j mod `WIDTH`. Counts are exact where
m <= `WIDTH`. Otherwise m / `WIDTH` features share a counter. A pair's count is then the smaller of the counters in its
two rows: a count-min sketch (Cormode & Muthukrishnan 2005). Let feature i be active on n_i tokens. The count of a pair
is never too small. On average over pairs it is too large by less than min(n_i, n_j) K / `WIDTH`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .firings import Firings

WIDTH = 2048
PAIRS_AT_ONCE = 2**20


def empty_table(num_features: int) -> np.ndarray:
    """Counters (m, width + 1) int32; the last column collects pairs that do not count."""
    return np.zeros((num_features, min(num_features, WIDTH) + 1), np.int32)


def count_pairs(table: np.ndarray, firings: Firings, indices: np.ndarray, values: np.ndarray) -> None:
    """Adds a batch to the counters. A feature is counted with itself, too.

    Args:
        table: Counters from `empty_table`.
        firings: Firings of the batch.
        indices: (B T, K) indices of the code.
        values: (B T, K) values of the code.
    """
    width = table.shape[1] - 1
    partners = np.where(values > 0, indices % width, width)
    rows = PAIRS_AT_ONCE // indices.shape[1] + 1
    ones = np.ones(rows * indices.shape[1], np.int32)  # np.add.at is slow unless types are equal
    for start in range(0, len(firings.features), rows):
        chunk = slice(start, start + rows)
        counters = partners[firings.places[chunk]] + firings.features[chunk, None] * (width + 1)
        np.add.at(table.reshape(-1), counters.reshape(-1), ones[: counters.size])


def pair_counts(table: np.ndarray, counts: np.ndarray, rows: int = 256) -> Iterator[np.ndarray]:
    """Yields the (m, m) counts in blocks of rows, (R, m) int64, with 0 on the diagonal.

    Args:
        table: Counters that `count_pairs` filled.
        counts: (m,) tokens on which each feature is active.
        rows: R, features per block.
    """
    width = table.shape[1] - 1
    every = np.arange(len(table))
    table = table[:, :width].copy()
    table[every, every % width] -= counts.astype(np.int32)  # takes out each feature's pairs with itself
    for start in range(0, len(table), rows):
        block = every[start : start + rows]
        pairs = np.minimum(table[block][:, every % width], table[:, block % width].T).astype(np.int64)
        pairs = np.minimum(pairs, np.minimum(counts[block, None], counts))
        pairs[block - start, block] = 0
        yield pairs


__all__ = ["count_pairs", "empty_table", "pair_counts"]

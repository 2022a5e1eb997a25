"""How often two features of a layer are active on the same token, without a table of m x m.

A feature's row has `WIDTH` counters; partner j is counted in counter j mod `WIDTH`. Where m <= `WIDTH` the counts are
exact. Else a counter is shared by m / `WIDTH` features, and a pair's count is read from both of its rows and the
smaller taken (a count-min sketch; Cormode & Muthukrishnan 2005): never too small, and too large, on average over pairs,
by less than min(n_i, n_j) K / `WIDTH`, where n are the tokens on which each is active.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .firings import Firings

WIDTH = 2048
PAIRS_AT_ONCE = 2**20


def empty_table(num_features: int) -> np.ndarray:
    """(m, width + 1) int32 counters; the last one takes what does not count."""
    return np.zeros((num_features, min(num_features, WIDTH) + 1), np.int32)


def count_pairs(table: np.ndarray, firings: Firings, indices: np.ndarray, values: np.ndarray) -> None:
    """Counts a batch in, of which `indices` and `values` (B T, K) are the code. A feature is counted with itself,
    too."""
    width = table.shape[1] - 1
    partners = np.where(values > 0, indices % width, width)
    rows = PAIRS_AT_ONCE // indices.shape[1] + 1
    one = np.ones(rows * indices.shape[1], np.int32)  # of the table's own type: numpy is slow on any other
    for start in range(0, len(firings.features), rows):
        chunk = slice(start, start + rows)
        counters = partners[firings.places[chunk]] + firings.features[chunk, None] * (width + 1)
        np.add.at(table.reshape(-1), counters.reshape(-1), one[: counters.size])


def pair_counts(table: np.ndarray, counts: np.ndarray, rows: int = 256) -> Iterator[np.ndarray]:
    """Blocks (R, m) of the table of how often two features were active together, 0 on the diagonal: int64.

    Args:
        table: what `count_pairs` filled.
        counts: (m,) tokens on which each feature was active.
        rows: R, features a block.
    """
    width = table.shape[1] - 1
    every = np.arange(len(table))
    table = table[:, :width].copy()
    table[every, every % width] -= counts.astype(np.int32)  # each with itself
    for start in range(0, len(table), rows):
        block = every[start : start + rows]
        pairs = np.minimum(table[block][:, every % width], table[:, block % width].T).astype(np.int64)
        pairs = np.minimum(pairs, np.minimum(counts[block, None], counts))
        pairs[block - start, block] = 0
        yield pairs

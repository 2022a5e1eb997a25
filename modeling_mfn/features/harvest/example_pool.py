"""Examples that a harvest keeps: the best few of each group, in whatever order they come.

A pool keeps what depends only on the set of examples offered. Pools of shards, or of the parts of an interrupted
harvest, therefore merge to exactly the pool of a single pass.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .firings import TOKEN_BITS, TOKEN_LIMIT

SETTLE_ABOVE, SETTLE_SHARE = 4096, 0.5
"""Candidates wait unsorted until there are more than this number, and more than this share of the pool."""

ExampleColumns = dict[str, np.ndarray]
"""Columns of n examples: `groups`, `keys` (n,) int64; `sources` (n,) int32; `tokens`, `activations` (n, C)."""


def ranking_key(scores: np.ndarray, token_numbers: np.ndarray) -> np.ndarray:
    """Keys (n,) int64 >= 0 that sort by score, and by the earlier token among equal scores.

    Args:
        scores: (n,) whole numbers in [0, 2^31).
        token_numbers: (n,) numbers of tokens in the data, below `TOKEN_LIMIT`.
    """
    return scores.astype(np.int64) << TOKEN_BITS | (TOKEN_LIMIT - 1 - token_numbers)


def token_number(keys: np.ndarray) -> np.ndarray:
    """Numbers of the tokens that keys were made with."""
    return TOKEN_LIMIT - 1 - (keys & (TOKEN_LIMIT - 1))


def activation_score(activations: np.ndarray) -> np.ndarray:
    """Scores in the order of activations, float32 and > 0: their bits as whole numbers."""
    return activations.view(np.int32)


def random_score(features: np.ndarray, token_numbers: np.ndarray) -> np.ndarray:
    """Scores in [0, 2^31), evenly distributed, that depend only on a feature and a token.

    The largest few scores of a feature are a uniform sample of its tokens. The hash is the finaliser of splitmix64
    (Steele et al. 2014).
    """
    mixed = token_numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + features.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ mixed >> np.uint64(shift)) * np.uint64(factor)
    return ((mixed ^ mixed >> np.uint64(31)) >> np.uint64(33)).astype(np.int64)


def best_of_each(groups: np.ndarray, keys: np.ndarray, capacity: int) -> np.ndarray:
    """Places of the `capacity` largest keys of each group, sorted by group and then from the largest key on."""
    order = np.lexsort((-keys, groups))
    ordered = groups[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return order[rank < capacity]


class ExamplePool:
    """The `capacity` examples with the largest keys in each of `num_groups` groups.

    The size of a pool does not grow with the data.
    """

    def __init__(self, num_groups: int, capacity: int, context: int) -> None:
        self.capacity = capacity
        self.columns: ExampleColumns = {
            "groups": np.empty(0, np.int64),
            "keys": np.empty(0, np.int64),
            "sources": np.empty(0, np.int32),
            "tokens": np.empty((0, context), np.int32),
            "activations": np.empty((0, context), np.float32),
        }
        self._waiting: list[ExampleColumns] = []
        self._key_to_beat = np.full(num_groups, -1, np.int64)

    def offer(self, groups: np.ndarray, keys: np.ndarray, describe: Callable[[np.ndarray], ExampleColumns]) -> None:
        """Takes those of n candidates that are among the best so far.

        Args:
            groups: (n,) group of each candidate.
            keys: (n,) key of each candidate.
            describe: Makes the further columns of candidates from their places. It runs only for those that are taken.
        """
        able = np.flatnonzero(keys > self._key_to_beat[groups])
        chosen = able[best_of_each(groups[able], keys[able], self.capacity)]
        if len(chosen):
            self._waiting.append({"groups": groups[chosen], "keys": keys[chosen]} | describe(chosen))
        # not at every call: candidates that wait do no harm, and each sorting moves the whole pool
        waiting = sum(len(part["keys"]) for part in self._waiting)
        if waiting > max(SETTLE_ABOVE, SETTLE_SHARE * len(self.columns["keys"])):
            self.settle()

    def settle(self) -> ExampleColumns:
        """Sorts the waiting candidates in; returns all examples kept, by group and from the largest key on."""
        if self._waiting:
            parts = [self.columns, *self._waiting]
            self._waiting = []
            columns = {name: np.concatenate([part[name] for part in parts]) for name in self.columns}
            kept = best_of_each(columns["groups"], columns["keys"], self.capacity)
            self.columns = {name: column[kept] for name, column in columns.items()}
            self._set_key_to_beat()
        return self.columns

    def merge(self, other: ExampleColumns) -> None:
        """Takes in the settled columns of a pool of other tokens."""
        self._waiting.append(other)
        self.settle()

    def restore(self, columns: ExampleColumns) -> None:
        """Replaces the content by settled columns; `ValueError` unless these are of one length and of known groups."""
        if len({len(column) for column in columns.values()}) > 1:
            raise ValueError("columns of examples differ in length")
        groups, known = columns["groups"], len(self._key_to_beat)
        if len(groups) and not 0 <= groups.min() <= groups.max() < known:
            raise ValueError(f"examples are of groups {groups.min()} to {groups.max()}; there are {known}")
        self.columns, self._waiting = columns, []
        self._set_key_to_beat()

    def _set_key_to_beat(self) -> None:
        groups, keys = self.columns["groups"], self.columns["keys"]
        last = np.arange(len(groups)) - np.searchsorted(groups, groups) == self.capacity - 1
        self._key_to_beat[groups[last]] = keys[last]


__all__ = [
    "ExampleColumns",
    "ExamplePool",
    "activation_score",
    "best_of_each",
    "random_score",
    "ranking_key",
    "token_number",
]

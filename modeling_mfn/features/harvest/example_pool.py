"""The examples that a harvest keeps: the best few of each group, whatever the order in which they come.

Which examples a pool keeps depends on the set of those that were offered alone. So pools of shards, or of the parts of
a harvest that was broken off, merge to exactly the pool of a single pass.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .firings import TOKEN_LIMIT

Columns = dict[str, np.ndarray]
"""`groups` and `keys` (n,) int64, `sources` (n,) int32, `tokens` and `activations` (n, C)."""


def ranking_key(scores: np.ndarray, token_numbers: np.ndarray) -> np.ndarray:
    """(n,) int64 >= 0: larger for a larger score, and of equal scores for the earlier token. Scores are whole numbers
    in [0, 2^31)."""
    return scores.astype(np.int64) << 32 | (TOKEN_LIMIT - 1 - token_numbers)


def token_number(keys: np.ndarray) -> np.ndarray:
    """The tokens' numbers that keys were made with."""
    return TOKEN_LIMIT - 1 - (keys & (TOKEN_LIMIT - 1))


def activation_score(activations: np.ndarray) -> np.ndarray:
    """Whole numbers in the order of the activations, float32 and > 0: their bits."""
    return activations.view(np.int32)


def random_score(features: np.ndarray, token_numbers: np.ndarray) -> np.ndarray:
    """Whole numbers in [0, 2^31) that a feature and a token alone decide, as evenly as at random: the finaliser of
    splitmix64 (Steele et al. 2014). The largest few of them are a uniform sample."""
    mixed = token_numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + features.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ mixed >> np.uint64(shift)) * np.uint64(factor)
    return ((mixed ^ mixed >> np.uint64(31)) >> np.uint64(33)).astype(np.int64)


def best_of_each(groups: np.ndarray, keys: np.ndarray, capacity: int) -> np.ndarray:
    """Places of the `capacity` largest keys of each group, by group and then from the largest key on."""
    order = np.lexsort((-keys, groups))
    ordered = groups[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return order[rank < capacity]


class ExamplePool:
    """The `capacity` examples of the largest keys in each of `num_groups` groups. Its size does not grow with the
    data."""

    def __init__(self, num_groups: int, capacity: int, context: int) -> None:
        self.capacity = capacity
        self.columns: Columns = {
            "groups": np.empty(0, np.int64),
            "keys": np.empty(0, np.int64),
            "sources": np.empty(0, np.int32),
            "tokens": np.empty((0, context), np.int32),
            "activations": np.empty((0, context), np.float32),
        }
        self._waiting: list[Columns] = []
        self._entry = np.full(num_groups, -1, np.int64)  # the key to beat

    def offer(self, groups: np.ndarray, keys: np.ndarray, describe: Callable[[np.ndarray], Columns]) -> None:
        """Takes of n candidates those that are among the best so far. `describe` gives the further columns of
        candidates, whose places it gets: it runs for those alone that are taken."""
        able = np.flatnonzero(keys > self._entry[groups])
        chosen = able[best_of_each(groups[able], keys[able], self.capacity)]
        if len(chosen):
            self._waiting.append({"groups": groups[chosen], "keys": keys[chosen]} | describe(chosen))
        # sorted in now and then: candidates that wait do no harm, and each sorting moves the whole pool
        if sum(len(part["keys"]) for part in self._waiting) > max(4096, len(self.columns["keys"]) // 2):
            self.settle()

    def settle(self) -> Columns:
        """Sorts the waiting candidates in. Returns all that is kept: by group, and from the largest key on."""
        if self._waiting:
            parts = [self.columns, *self._waiting]
            self._waiting = []
            columns = {name: np.concatenate([part[name] for part in parts]) for name in self.columns}
            kept = best_of_each(columns["groups"], columns["keys"], self.capacity)
            self.columns = {name: column[kept] for name, column in columns.items()}
            self._set_entry()
        return self.columns

    def merge(self, other: Columns) -> None:
        """Takes in what another pool kept, of other tokens."""
        self._waiting.append(other)
        self.settle()

    def restore(self, columns: Columns) -> None:
        """Becomes the pool whose settled columns these are."""
        self.columns, self._waiting = columns, []
        self._set_entry()

    def _set_entry(self) -> None:
        groups, keys = self.columns["groups"], self.columns["keys"]
        last = np.arange(len(groups)) - np.searchsorted(groups, groups) == self.capacity - 1
        self._entry[groups[last]] = keys[last]

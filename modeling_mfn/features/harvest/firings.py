"""The firings of a batch: which feature is active on which token, sorted so that all that follows is array work."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

TOKEN_LIMIT = 2**32
"""Tokens of a data set that can be told apart."""


class TokenBatch(NamedTuple):
    """B windows of T tokens that follow each other in the data."""

    first_window: int
    """The number of the first of them in the data."""
    input_ids: np.ndarray
    """(B, T) int32."""
    attended: np.ndarray
    """(B, T) bool: no padding."""
    counted: np.ndarray
    """(B, T) bool: takes part in the statistics."""
    sources: np.ndarray
    """(B,) int32, places in the harvest's list of sources."""

    def token_numbers(self, places: np.ndarray) -> np.ndarray:
        """The numbers in the data of tokens at places in [0, B T): int64, window T + position."""
        return self.first_window * self.input_ids.shape[1] + places


class Firings(NamedTuple):
    """The P active pairs on a batch's counted tokens in one layer, by feature and then by place. A feature is active on
    a token at most once."""

    features: np.ndarray
    """(P,) int64."""
    places: np.ndarray
    """(P,) int64, tokens as places in [0, B T)."""
    values: np.ndarray
    """(P,) float32, > 0."""

    @classmethod
    def of(cls, indices: np.ndarray, values: np.ndarray, counted: np.ndarray) -> Firings:
        """From a code's pairs, (B T, K) each, and the tokens that count, (B T,)."""
        pairs = np.flatnonzero((values > 0) & counted[:, None])
        ordered = np.sort(indices.ravel()[pairs] << 32 | pairs)
        pairs = ordered & 0xFFFFFFFF
        return cls(ordered >> 32, pairs // indices.shape[1], values.ravel()[pairs])

    def starts(self, *columns: np.ndarray) -> np.ndarray:
        """(S,) where in the pairs a run of equal entries of all given sorted columns begins."""
        new = np.zeros(len(self.features), bool)
        new[:1] = True
        for column in columns:
            new[1:] |= column[1:] != column[:-1]
        return np.flatnonzero(new)

    def contexts(self, batch: TokenBatch, chosen: np.ndarray, before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
        """What is around chosen firings (n,): token ids, int32, -1 where the window or its padding ends, and the
        feature's activations on these tokens, float32; (n, before + 1 + after) each.

        A feature's firings follow each other in the order of tokens: all those within some tokens of a firing are
        within as many pairs of it.
        """
        length = batch.input_ids.shape[1]
        steps = np.arange(-before, after + 1)
        row, position = self.places[chosen] // length, self.places[chosen] % length
        around = position[:, None] + steps
        inside = (around >= 0) & (around < length)
        cell = (row[:, None], around.clip(0, length - 1))
        tokens = np.where(inside & batch.attended[cell], batch.input_ids[cell], -1).astype(np.int32)

        near = (chosen[:, None] + steps).clip(0, len(self.features) - 1)
        distance = self.places[near] - self.places[chosen][:, None]
        same = (self.features[near] == self.features[chosen][:, None]) & (self.places[near] // length == row[:, None])
        same &= (distance >= -before) & (distance <= after)
        example, at = np.nonzero(same)
        activations = np.zeros(tokens.shape, np.float32)
        activations[example, distance[example, at] + before] = self.values[near[example, at]]
        return tokens, activations

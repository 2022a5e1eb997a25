"""Firings of a batch: which feature is active on which token, sorted so that everything after is array work."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

TOKEN_BITS = 32
"""Bits that hold the number of a token in the data."""
TOKEN_LIMIT = 2**TOKEN_BITS
"""Largest number of tokens in a data set."""
PAIR_BITS = 32
"""Bits of a sort key that hold a pair's place in the batch; its feature stands above them."""


class TokenBatch(NamedTuple):
    """B consecutive windows of the data with T tokens each."""

    first_window: int
    """Number of the first window in the data."""
    input_ids: np.ndarray
    """(B, T) int32."""
    attended: np.ndarray
    """(B, T) bool: true where a token is not padding."""
    counted: np.ndarray
    """(B, T) bool: true where a token takes part in the statistics."""
    sources: np.ndarray
    """(B,) int32: place of each window's source in the harvest's list of sources."""

    def token_numbers(self, places: np.ndarray) -> np.ndarray:
        """Numbers in the data, window T + position, of tokens at places in [0, B T): int64."""
        return self.first_window * self.input_ids.shape[1] + places


class Firings(NamedTuple):
    """The P active pairs of feature and counted token in one layer, sorted by feature and then by token.

    A feature is active on a token at most once.
    """

    features: np.ndarray
    """(P,) int64."""
    places: np.ndarray
    """(P,) int64: tokens as places in [0, B T)."""
    values: np.ndarray
    """(P,) float32, > 0."""

    @classmethod
    def of(cls, indices: np.ndarray, values: np.ndarray, counted: np.ndarray) -> Firings:
        """Sorts the firings out of a code, (B T, K) each, and a mask (B T,) of the tokens that count."""
        pairs = np.flatnonzero((values > 0) & counted[:, None])
        keys = np.sort(indices.ravel()[pairs] << PAIR_BITS | pairs)
        pairs = keys & (2**PAIR_BITS - 1)
        return cls(keys >> PAIR_BITS, pairs // indices.shape[1], values.ravel()[pairs])

    def starts(self, *columns: np.ndarray) -> np.ndarray:
        """Places (S,) among the pairs where a run of equal entries in all given sorted columns begins."""
        new = np.zeros(len(self.features), bool)
        new[:1] = True
        for column in columns:
            new[1:] |= column[1:] != column[:-1]
        return np.flatnonzero(new)

    def contexts(self, batch: TokenBatch, chosen: np.ndarray, before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens around chosen firings, and the activations of the firing's feature on these tokens.

        Args:
            batch: The batch that the firings are from.
            chosen: (n,) places of the chosen firings among the pairs.
            before: Tokens before the firing.
            after: Tokens after it.

        Returns:
            Token ids, int32, -1 outside the window and in padding; and activations, float32. The shape of both is
            (n, before + 1 + after).
        """
        length = batch.input_ids.shape[1]
        steps = np.arange(-before, after + 1)
        row, position = self.places[chosen] // length, self.places[chosen] % length
        around = position[:, None] + steps
        inside = (around >= 0) & (around < length)
        cell = (row[:, None], around.clip(0, length - 1))
        tokens = np.where(inside & batch.attended[cell], batch.input_ids[cell], -1).astype(np.int32)

        # a feature's firings are sorted by token: firings within n tokens of one are within n pairs of it
        near = (chosen[:, None] + steps).clip(0, len(self.features) - 1)
        distance = self.places[near] - self.places[chosen][:, None]
        same = (self.features[near] == self.features[chosen][:, None]) & (self.places[near] // length == row[:, None])
        same &= (distance >= -before) & (distance <= after)
        example, at = np.nonzero(same)
        activations = np.zeros(tokens.shape, np.float32)
        activations[example, distance[example, at] + before] = self.values[near[example, at]]
        return tokens, activations


__all__ = ["TOKEN_BITS", "TOKEN_LIMIT", "Firings", "TokenBatch"]

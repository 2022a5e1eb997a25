"""What a harvest keeps of one layer: counts, sums and examples of a size that does not grow with the data.

All of it merges exactly, to the bit and in any order: sums are whole numbers, in units of 2^-24.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..atlas.schema import NUM_BINS, NUM_STRATA, bin_of, stratum_of
from .coactivation import count_pairs, empty_table
from .example_pool import Columns, ExamplePool, activation_score, random_score, ranking_key
from .firings import Firings, TokenBatch

UNIT = 2.0**-24
"""Of summed activations: each is rounded to a multiple of it, so that sums are exact."""


class ExampleLimits(NamedTuple):
    """How many examples a feature has, and how long they are."""

    top: int = 16
    """Of the largest activations, one a window at most."""
    stratum: int = 4
    """Of each octave of activations."""
    before: int = 24
    """Tokens of context before the one that the example is about."""
    after: int = 7
    """Tokens of context after it."""

    @property
    def context(self) -> int:
        """C, tokens of an example."""
        return self.before + 1 + self.after


class LayerStatistics:
    """The statistics of the m features of one layer over the batches that were added."""

    def __init__(self, num_features: int, limits: ExampleLimits) -> None:
        self.num_features = num_features
        self.limits = limits
        self.source_counts = np.zeros((0, num_features), np.int64)
        """(S, m) tokens of each source on which a feature is active."""
        self.sums = np.zeros(num_features, np.int64)
        """(m,) of activations, in units of `UNIT`."""
        self.maxima = np.zeros(num_features, np.float32)
        self.histogram = np.zeros((num_features, NUM_BINS), np.int64)
        self.scale_sum = np.zeros(1, np.int64)
        """Over tokens, in units of `UNIT`: what an activation of 1 becomes where the final norm reads it."""
        self.pairs = empty_table(num_features)
        self.top = ExamplePool(num_features, limits.top, limits.context)
        self.strata = ExamplePool(num_features * NUM_STRATA, limits.stratum, limits.context)

    @property
    def counts(self) -> np.ndarray:
        """(m,) tokens on which a feature is active."""
        return self.source_counts.sum(0)

    def add(
        self, batch: TokenBatch, indices: np.ndarray, values: np.ndarray, scales: np.ndarray, num_sources: int
    ) -> None:
        """Counts a batch in.

        Args:
            batch: B windows of T tokens.
            indices: (B T, K) int64, the code's; distinct within a token where values are not 0.
            values: (B T, K) float32.
            scales: (B T,), what an activation of 1 becomes where the final norm reads it.
            num_sources: sources of text so far.
        """
        firings = Firings.of(indices, values, batch.counted.reshape(-1))
        self.scale_sum += fixed_point(scales[batch.counted.reshape(-1)]).sum()
        self.expect_sources(num_sources)
        if not len(firings.features):
            return
        source = batch.sources[firings.places // batch.input_ids.shape[1]]
        flat = source.astype(np.int64) * self.num_features + firings.features
        self.source_counts += np.bincount(flat, minlength=self.source_counts.size).reshape(self.source_counts.shape)
        starts = firings.starts(firings.features)
        fired = firings.features[starts]
        self.sums[fired] += np.add.reduceat(fixed_point(firings.values), starts)
        self.maxima[fired] = np.maximum(self.maxima[fired], np.maximum.reduceat(firings.values, starts))
        bins = bin_of(firings.values)
        np.add.at(self.histogram.reshape(-1), firings.features * NUM_BINS + bins, np.ones(len(bins), np.int64))
        count_pairs(self.pairs, firings, indices, values)
        self._offer_examples(batch, firings, bins)

    def _offer_examples(self, batch: TokenBatch, firings: Firings, bins: np.ndarray) -> None:
        numbers = batch.token_numbers(firings.places)
        rows = firings.places // batch.input_ids.shape[1]

        def describe(chosen: np.ndarray) -> Columns:
            tokens, activations = firings.contexts(batch, chosen, self.limits.before, self.limits.after)
            return {"sources": batch.sources[rows[chosen]], "tokens": tokens, "activations": activations}

        keys = ranking_key(activation_score(firings.values), numbers)
        starts = firings.starts(firings.features, rows)
        best = np.maximum.reduceat(keys, starts)  # of each feature in each window
        peaks = np.flatnonzero(keys == np.repeat(best, np.diff(starts, append=len(keys))))
        self.top.offer(firings.features[peaks], keys[peaks], lambda chosen: describe(peaks[chosen]))

        groups = firings.features * NUM_STRATA + stratum_of(bins)
        self.strata.offer(groups, ranking_key(random_score(firings.features, numbers), numbers), describe)

    def expect_sources(self, number: int) -> None:
        """Has a row of counts for each source."""
        missing = number - len(self.source_counts)
        if missing > 0:
            rows = np.zeros((missing, self.num_features), np.int64)
            self.source_counts = np.concatenate([self.source_counts, rows])

    def reorder_sources(self, places: np.ndarray) -> None:
        """Source s becomes `places[s]`, of which there are as many as sources, or more."""
        counts = np.zeros((int(places.max(initial=-1)) + 1, self.num_features), np.int64)
        counts[places] = self.source_counts
        self.source_counts = counts
        for pool in (self.top, self.strata):
            columns = pool.settle()
            columns["sources"] = places[columns["sources"]].astype(np.int32)

    def merge(self, other: LayerStatistics) -> None:
        """Adds the statistics of other tokens of the same sources."""
        self.expect_sources(len(other.source_counts))
        self.source_counts[: len(other.source_counts)] += other.source_counts
        self.sums += other.sums
        self.maxima = np.maximum(self.maxima, other.maxima)
        self.histogram += other.histogram
        self.scale_sum += other.scale_sum
        self.pairs += other.pairs
        self.top.merge(other.top.settle())
        self.strata.merge(other.strata.settle())

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, by name: what `restore` reads."""
        plain = ("source_counts", "sums", "maxima", "histogram", "scale_sum", "pairs")
        arrays = {name: getattr(self, name) for name in plain}
        for kind, pool in (("top", self.top), ("strata", self.strata)):
            arrays |= {f"{kind}.{name}": column for name, column in pool.settle().items()}
        return arrays

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Becomes the statistics whose `arrays` these are."""
        for name, array in arrays.items():
            if "." not in name:
                setattr(self, name, array.copy())  # what comes from bytes is read-only
        for kind, pool in (("top", self.top), ("strata", self.strata)):
            pool.restore({n.partition(".")[2]: a for n, a in arrays.items() if n.startswith(f"{kind}.")})


def fixed_point(values: np.ndarray) -> np.ndarray:
    """Numbers as multiples of `UNIT`: int64."""
    return np.rint(values.astype(np.float64) / UNIT).astype(np.int64)

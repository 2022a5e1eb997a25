"""Statistics of one layer: counts, sums and examples, of a size that does not grow with the data.

Statistics merge exactly, bit for bit and in any order: sums are whole numbers in units of 2^-24.
"""

from __future__ import annotations

import numpy as np

from ..atlas.records import ExampleLimits
from ..atlas.schema import NUM_BINS, NUM_STRATA, bin_of, stratum_of
from .coactivation import count_pairs, empty_table
from .example_pool import ExampleColumns, ExamplePool, activation_score, random_score, ranking_key
from .firings import Firings, TokenBatch

UNIT = 2.0**-24
"""Summed numbers are rounded to multiples of this unit, so that sums are exact."""


class LayerStatistics:
    """Statistics of the m features of one layer over the batches added so far."""

    def __init__(self, num_features: int, limits: ExampleLimits) -> None:
        self.num_features = num_features
        self.limits = limits
        self.source_counts = np.zeros((0, num_features), np.int64)
        """(S, m): tokens of each source on which a feature is active."""
        self.sums = np.zeros(num_features, np.int64)
        """(m,): sum of activations, in units of `UNIT`."""
        self.maxima = np.zeros(num_features, np.float32)
        """(m,): largest activation."""
        self.histogram = np.zeros((num_features, NUM_BINS), np.int64)
        """(m, bins): activations in each bin of `HISTOGRAM_EDGES`."""
        self.scale_sum = np.zeros(1, np.int64)
        """(1,): sum over tokens, in units of `UNIT`, of the scale that `recording_scales` records."""
        self.pairs = empty_table(num_features)
        self.top = ExamplePool(num_features, limits.top, limits.context)
        self.strata = ExamplePool(num_features * NUM_STRATA, limits.stratum, limits.context)

    @property
    def counts(self) -> np.ndarray:
        """Tokens on which each feature is active, (m,)."""
        return self.source_counts.sum(0)

    def add(
        self, batch: TokenBatch, indices: np.ndarray, values: np.ndarray, scales: np.ndarray, num_sources: int
    ) -> None:
        """Adds a batch.

        Args:
            batch: B windows of T tokens.
            indices: (B T, K) int64, indices of the code; distinct within a token where values are not 0.
            values: (B T, K) float32, values of the code.
            scales: (B T,) scale of each token, as `recording_scales` records it.
            num_sources: Number of sources so far.
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

        def describe(chosen: np.ndarray) -> ExampleColumns:
            tokens, activations = firings.contexts(batch, chosen, self.limits.before, self.limits.after)
            return {"sources": batch.sources[rows[chosen]], "tokens": tokens, "activations": activations}

        keys = ranking_key(activation_score(firings.values), numbers)
        starts = firings.starts(firings.features, rows)
        best = np.maximum.reduceat(keys, starts)  # one per feature and window
        peaks = np.flatnonzero(keys == np.repeat(best, np.diff(starts, append=len(keys))))
        self.top.offer(firings.features[peaks], keys[peaks], lambda chosen: describe(peaks[chosen]))

        groups = firings.features * NUM_STRATA + stratum_of(bins)
        self.strata.offer(groups, ranking_key(random_score(firings.features, numbers), numbers), describe)

    def expect_sources(self, number: int) -> None:
        """Makes sure that there is a row of counts for each source."""
        missing = number - len(self.source_counts)
        if missing > 0:
            rows = np.zeros((missing, self.num_features), np.int64)
            self.source_counts = np.concatenate([self.source_counts, rows])

    def reorder_sources(self, places: np.ndarray) -> None:
        """Moves source s to place `places[s]`, in the counts and in the examples; places may leave gaps."""
        counts = np.zeros((int(places.max(initial=-1)) + 1, self.num_features), np.int64)
        counts[places] = self.source_counts
        self.source_counts = counts
        for pool in (self.top, self.strata):
            columns = pool.settle()
            columns["sources"] = places[columns["sources"]].astype(np.int32)

    def merge(self, other: LayerStatistics) -> None:
        """Adds the statistics of other tokens, whose sources have the same places."""
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
        """Everything as arrays by name, for `restore`."""
        plain = ("source_counts", "sums", "maxima", "histogram", "scale_sum", "pairs")
        arrays = {name: getattr(self, name) for name in plain}
        for kind, pool in (("top", self.top), ("strata", self.strata)):
            arrays |= {f"{kind}.{name}": column for name, column in pool.settle().items()}
        return arrays

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Replaces everything by the `arrays` of other statistics.

        Raises:
            ValueError: If an array is missing or does not have the type and size that it has here.
        """
        for name, own in self.arrays().items():
            found, grows = arrays.get(name), name == "source_counts" or "." in name
            if found is None or (found.dtype, found.shape[1:]) != (own.dtype, own.shape[1:]):
                raise ValueError(f"{name} is missing or of another type than in this harvest")
            if not grows and len(found) != len(own):
                raise ValueError(f"{name} has {len(found)} rows; this harvest has {len(own)}")
            if "." not in name:
                setattr(self, name, found.copy())  # arrays made from bytes are read-only
        for kind, pool in (("top", self.top), ("strata", self.strata)):
            pool.restore({name: arrays[f"{kind}.{name}"] for name in pool.columns})


def fixed_point(values: np.ndarray) -> np.ndarray:
    """Numbers as multiples of `UNIT`, int64."""
    return np.rint(values.astype(np.float64) / UNIT).astype(np.int64)


__all__ = ["UNIT", "LayerStatistics"]

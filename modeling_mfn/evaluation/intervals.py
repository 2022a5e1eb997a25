"""Estimates with their 95 % confidence intervals.

- [`mean`]: independent values, in groups that count alike (Student's t);
- [`mean_of_pairs`]: values of pairs that share members;
- [`bootstrap`]: any statistic of independent units, by resampling them;
- [`resampling_weights`], [`percentile_interval`]: equal resamples for several models, so that differences are paired;
- [`jackknife`]: any statistic of a text, from its values without one group of windows at a time;
- [`difference`], [`differences_by_seed`]: two estimates compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BeforeValidator

from ..utils.extras import needs

CONFIDENCE = 0.95


NullIsNaN = Annotated[float, BeforeValidator(lambda number: math.nan if number is None else number)]
"""Number that a file of results has as null where it is NaN."""


class Estimate(NamedTuple):
    """A number with the ends of its 95 % confidence interval, NaN where there is no interval."""

    value: NullIsNaN
    low: NullIsNaN = math.nan
    high: NullIsNaN = math.nan

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.value:.3g}{interval}"


def mean(values: Sequence[float] | np.ndarray, groups: Sequence[Any] | np.ndarray | None = None) -> Estimate:
    """Mean of independent values with Student's t interval. NaN values are left out.

    A percentile bootstrap of ten values would be too narrow: it holds their mean in 88 to 90 % of cases, not in 95.

    Args:
        values: (n,).
        groups: (n,) group of each value. Each group counts as much as another, however many values it has. Values are
            taken to spread equally around the means of their groups. By default there is one group.
    """
    values = np.asarray(values, np.float64)
    known = ~np.isnan(values)
    if not known.any():
        return Estimate(math.nan)
    values = values[known]
    numbers = np.unique(np.zeros(len(values)) if groups is None else np.asarray(groups)[known], return_inverse=True)[1]
    counts = np.bincount(numbers)
    means = np.bincount(numbers, values) / counts
    value, freedom = float(means.mean()), len(values) - len(counts)
    if freedom == 0:
        return Estimate(value)
    variance = ((values - means[numbers]) ** 2).sum() / freedom
    margin = _students_t(freedom) * math.sqrt(variance * (1 / counts).sum()) / len(counts)
    return Estimate(value, float(value - margin), float(value + margin))


def mean_of_pairs(values: np.ndarray, ends: np.ndarray, weights: np.ndarray | None = None) -> Estimate:
    """Mean of values that belong to pairs, such as the similarity of two features. NaN values are left out.

    Two pairs with a member in common are correlated. The variance therefore includes the products of their residuals
    (Fafchamps & Gubert 2007, "The formation of risk sharing networks"; Aronow et al. 2015). It is never less than the
    variance of independent values. Pairs of equal weight that share no member get the interval of [`mean`].

    Args:
        values: (P,).
        ends: (P, 2) int, the two members of each pair.
        weights: (P,), at least 0. Equal by default.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones(len(values)) if weights is None else weights
    known = ~np.isnan(values) & (weights > 0)
    if not known.any():
        return Estimate(math.nan)
    values, shares = values[known], weights[known] / weights[known].sum()
    value = float(shares @ values)
    members, places = np.unique(ends[known], return_inverse=True)
    independent = len(members) / 2  # as many pairs as there would be if none shared a member
    if independent < 2:
        return Estimate(value)
    residuals = shares * (values - value)
    of_members = np.bincount(places.ravel(), np.repeat(residuals, 2))
    alone = residuals @ residuals
    variance = max(of_members @ of_members - alone, alone) * independent / (independent - 1)
    margin = float(_students_t(independent - 1) * math.sqrt(variance))
    return Estimate(value, value - margin, value + margin)


def bootstrap(statistic: Callable[..., Any], *samples: np.ndarray, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Statistic of samples with the percentile interval from resampling their independent units.

    Args:
        statistic: function of the resampled samples that returns a number.
        samples: arrays (n, ...) of the same n units: windows of text, concepts, features. They are resampled together.
        resamples: number of resamples.
        seed: seed of the resampling.
    """
    value, numbers = float(statistic(*samples)), np.arange(len(samples[0]))
    if len(numbers) < 2:
        return Estimate(value)
    with needs("evaluate"):
        from scipy import stats
    found = stats.bootstrap(
        (numbers,),
        lambda rows: statistic(*(sample[rows] for sample in samples)),
        vectorized=False,
        n_resamples=resamples,
        batch=100,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=seed,
    )
    return Estimate(value, *map(float, found.confidence_interval))


def resampling_weights(n: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """(1 + R, n) weights of n units, whose product with the units' values is their mean and its bootstrap.

    Each row has the sum 1: equal weights first, then those of R samples with replacement, NaN for a single unit.
    """
    samples = generator.multinomial(n, np.full(n, 1 / n), resamples) if n > 1 else np.full((resamples, n), np.nan)
    return np.concatenate([np.ones((1, n)), samples]) / n


def percentile_interval(draws: np.ndarray) -> Estimate:
    """Value, the first of (1 + R,), with the percentile interval of its R resamples."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(draws[1:], [tail, 100 - tail])
    return Estimate(float(draws[0]), float(low), float(high))


def jackknife(replicates: np.ndarray) -> Estimate:
    """Statistic of a text with the interval of its jackknife pseudo-values, G s - (G - 1) s_without_g (Tukey 1958).

    Args:
        replicates: (1 + G,), the statistic of all groups, then without each of the G groups.
    """
    whole, without = float(replicates[0]), replicates[1:]
    spread = mean(len(without) * whole - (len(without) - 1) * without)
    return Estimate(whole, whole + spread.low - spread.value, whole + spread.high - spread.value)


def difference(ours: Estimate, theirs: Estimate) -> Estimate:
    """Difference of two independent estimates whose intervals are symmetric."""
    value, margin = ours.value - theirs.value, math.hypot(ours.high - ours.value, theirs.high - theirs.value)
    return Estimate(value, value - margin, value + margin)


def differences_by_seed(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Difference of each seed from the same seed of a baseline, or from the baseline's mean where it lacks the seed."""
    average = float(np.mean(theirs))
    return [own - (theirs[seed] if seed < len(theirs) else average) for seed, own in enumerate(ours)]


def _students_t(freedom: float) -> float:
    """Half the width of the interval, in standard errors."""
    with needs("evaluate"):
        from scipy import stats
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


__all__ = [
    "CONFIDENCE",
    "Estimate",
    "bootstrap",
    "difference",
    "differences_by_seed",
    "jackknife",
    "mean",
    "mean_of_pairs",
    "percentile_interval",
    "resampling_weights",
]
